"""Training rows: beside the recorded ones of the official code, beside its way of counting, and invalid records."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageSize
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER, TEMPLATES, render, token_ids
from pdrop_jax.inputs.prompts import LlavaTemplate
from pdrop_jax.inputs.targets import Example, ends_answers, tokenize, training_text, turns_of
from pdrop_jax.inputs.tokenizer import load_tokenizer
from pdrop_jax.train.data.examples import fit, read_example
from pdrop_jax.train.data.invalid import InvalidRecord
from pdrop_jax.train.data.sources.json_source import read_records
from pdrop_jax.train.data.sources.source import reference_finder

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
MASKS = json.loads((GOLDEN / "preprocess_masks.json").read_text())
ASK, SAY = "human", "gpt"
VICUNA, PLAIN = LlavaTemplate(None, "vicuna_v1"), LlavaTemplate(None, "plain")


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer(ROOT / "examples/tiny_tokenizer")


def messages(*texts, first=ASK):
    roles = (ASK, SAY) if first == ASK else (SAY, ASK)
    return [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]


def example_of(tokenizer, turns, template):
    (example,) = tokenize(tokenizer, [training_text(turns, template)], template)
    return example


def runs(labels):
    target = np.asarray(labels) != IGNORE
    return int((target[1:] & ~target[:-1]).sum() + target[0])


def test_recorded_rows(llama):
    tokenizer, legacy = llama
    arrays = np.load(GOLDEN / "preprocess_masks.npz")
    compared = 0
    for sample in MASKS["samples"]:
        if sample["legacy"] != legacy:
            continue
        example = example_of(tokenizer, turns_of(sample["conversations"]), sample["template"])
        np.testing.assert_array_equal(example.ids, arrays[f"{sample['key']}.input_ids"], sample["key"])
        np.testing.assert_array_equal(example.labels, arrays[f"{sample['key']}.labels"], sample["key"])
        compared += 1
    assert compared == 14


TEXT = st.text(alphabet=" abeUSERINT:[/]\n\té你▁.'2", min_size=1, max_size=12) | st.text(min_size=1, max_size=8)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@examples(max_examples=150)
@given(turns=TURNS, template=st.sampled_from(["vicuna_v1", "llava_llama_2"]), image=st.booleans())
def test_masks_are_those_of_counting_rounds(llama, turns, template, image):
    tokenizer, legacy = llama
    # Marks inside messages are a test of their own; a private-use character would be normalised away.
    assume(not any(mark in text for turn in turns for text in turn for mark in ("<", "ASSISTANT", "INST]")))
    if image:
        turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    example = example_of(tokenizer, turns, template)
    assert example.ids.tolist() == token_ids(tokenizer, render(turns, template))
    assert example.labels.tolist() == counted_labels(tokenizer, example.ids, turns, template, legacy)
    assert runs(example.labels) == len(turns)


def counted_labels(tokenizer, ids, turns, template, legacy):
    """The official way: each round by itself, its tokens counted; the marks between rounds are worth what BOS is."""
    labels = np.full(len(ids), IGNORE)
    parts = TEMPLATES[template]
    at = 1
    for number, (question, answer) in enumerate(turns):
        asked = (parts.question if number else parts.first_question) + question + parts.asked + parts.answer
        whole = asked + answer + parts.answered.removesuffix("</s>")
        # BOS, and the space that ends the question, are no part of it; our token_ids folds a written BOS into its own.
        doubled = int(whole.startswith("<s>"))
        prompt = len(token_ids(tokenizer, asked)) + doubled - 2
        length = len(token_ids(tokenizer, whole)) + doubled
        if number and not legacy and template == "vicuna_v1":
            prompt, length = prompt - 1, length - 1
        labels[at + prompt : at + length] = ids[at + prompt : at + length]
        at += length
    assert at == len(ids)
    return labels.tolist()


@examples(max_examples=100)
@given(turns=TURNS, template=st.sampled_from(sorted(set(TEMPLATES) - {"plain"})))
def test_targets_are_ids_and_decode_to_the_answers(tiny, turns, template):
    assume(not any(mark in text for turn in turns for text in turn for mark in ("<", "INST]", "�", "▁")))
    example = example_of(tiny, turns, template)
    target = example.labels != IGNORE
    np.testing.assert_array_equal(example.labels[target], example.ids[target])
    if not ends_answers(tiny, template):
        assert not target.any()
        return
    answers = [parts.answer + answer + parts.answered for parts in [TEMPLATES[template]] for _, answer in turns]
    pieces = np.split(np.arange(len(target)), np.flatnonzero(np.diff(target)) + 1)
    decoded = [tiny.decode(example.ids[piece]) for piece in pieces if target[piece[0]]]
    assert [text.lstrip(" ") for text in decoded] == [text.lstrip(" ") for text in answers]


def byte_level(bos, *marks):
    """A tokenizer like Llama 3's or Qwen2's: bytes and a few merges, marks, a BOS or none."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*([bos] if bos else []), *marks],
        initial_alphabet=backend.pre_tokenizer.alphabet(),
    )
    backend.train_from_iterator(["system user assistant helpful assistant user"], trainer)
    if bos:
        template = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos)


LLAMA_3 = byte_level("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN2 = byte_level(None, "<|im_start|>", "<|im_end|>")


@examples(max_examples=100)
@given(turns=TURNS, template=st.sampled_from(["llama_3", "qwen"]), image=st.booleans())
def test_targets_of_byte_level_tokenizers_are_the_answers(turns, template, image):
    assume(not any("<" in text for turn in turns for text in turn))
    tokenizer = LLAMA_3 if template == "llama_3" else QWEN2
    if image:
        turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    example = example_of(tokenizer, turns, template)
    assert example.ids.tolist() == token_ids(tokenizer, render(turns, template))
    assert (example.ids == 0).sum() == 1 if template == "llama_3" else example.ids[0] == 0  # BOS, or <|im_start|>
    target = example.labels != IGNORE
    np.testing.assert_array_equal(example.labels[target], example.ids[target])
    pieces = np.split(np.arange(len(target)), np.flatnonzero(np.diff(target)) + 1)
    decoded = [tokenizer.decode(example.ids[piece]) for piece in pieces if target[piece[0]]]
    assert decoded == [answer + TEMPLATES[template].answered for _, answer in turns]


def test_many_conversations_at_once_are_each_by_itself(tiny):
    conversations = [
        [("<image>\nWhat?", "A bus <image>.")],
        [("Hi", "Hello"), ("Bye", "See you")],
        [("x", "")],
        [("<image>", "z")],
    ]
    texts = [training_text(turns, "mistral_instruct") for turns in conversations]
    for text, together in zip(texts, tokenize(tiny, texts, "mistral_instruct"), strict=True):
        (alone,) = tokenize(tiny, [text], "mistral_instruct")
        np.testing.assert_array_equal(together.ids, alone.ids)
        np.testing.assert_array_equal(together.labels, alone.labels)
    assert tokenize(tiny, [], "plain") == []


def test_a_picture_in_an_answer_is_no_target(tiny):
    example = example_of(tiny, [("What?", "<image>\nthis")], "mistral_instruct")
    place = example.ids.tolist().index(IMAGE_PLACEHOLDER)
    assert example.labels[place] == IGNORE
    np.testing.assert_array_equal(example.labels[place + 1 :], example.ids[place + 1 :])


def test_plain_learns_all_behind_the_picture(tiny):
    example = example_of(tiny, [("Say.\n<image>", "\na cat")], "plain")
    assert example.ids[:2].tolist() == [1, IMAGE_PLACEHOLDER]
    np.testing.assert_array_equal(example.labels, [IGNORE, IGNORE, *example.ids[2:]])


@pytest.mark.parametrize(
    "turns",
    [
        [("a", "b"), ("c", None)],
        [("a", "")],
        [("", "b")],
        [("a", "b</s>c")],
        [("a</s>", "b")],
        [("a", "b ASSISTANT: c")],
        [("a ASSISTANT: b", "c"), ("d", "e")],
    ],
)
def test_conversations_that_the_official_code_loses_count_of(turns):
    assert training_text(turns, "vicuna_v1").spans == []


def test_turns():
    assert turns_of(messages("a", "b", "c")) == [("a", "b"), ("c", None)]
    assert turns_of(messages("x", "a", "b", first=SAY)) == [("a", "b")]
    assert turns_of(messages(" What \n<image> ", "b")) == [("<image>\nWhat", "b")]
    assert turns_of(messages("What <im<image>age>", "b")) == [("<image>\nWhat", "b")]
    assert turns_of(messages("<image>", "b")) == [("<image>", "b")]
    assert turns_of(messages("a<image>b<image>", "b")) == [("<image>\nab", "b")]
    assert turns_of(messages("a<image>b<image> ", "b", "c <image>", "d"), several=True) == [
        ("a<image>b<image> ", "b"),
        ("<image>\nc", "d"),
    ]
    assert turns_of(messages(" kept ", "as it is\n")) == [(" kept ", "as it is\n")]


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    """References of pictures in a folder with a.png and b.png."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    return reference_finder(str(folder))


GOOD = messages("<image>\na", "b")
TEXT_ONLY = messages("a", "b")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "malformed JSON"),
        ([], "malformed JSON"),
        ({}, "no conversations or messages"),
        ({"conversations": []}, "malformed conversation"),
        ({"conversations": {}}, "malformed conversation"),
        ({"conversations": ["a"]}, "malformed conversation"),
        ({"conversations": [{"from": ASK}]}, "malformed conversation"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "malformed conversation"),
        ({"conversations": messages("x", first=SAY)}, "malformed conversation"),
        ({"conversations": [*TEXT_ONLY, *TEXT_ONLY[1:]]}, "malformed conversation"),
        ({"conversations": messages("half \ud83d", "a pair")}, "malformed conversation"),
        ({"image": 3, "conversations": GOOD}, "malformed image entry"),
        ({"image": [None], "conversations": GOOD}, "malformed image entry"),
        ({"image": "c.png", "conversations": GOOD}, "no image file"),
        ({"image": "", "conversations": GOOD}, "no image file"),
        ({"conversations": GOOD}, "<image> tag without image"),
        ({"image": None, "conversations": GOOD}, "<image> tag without image"),
        ({"image": "a.png", "conversations": [*GOOD, *GOOD]}, "<image> tag without image"),
        ({"image": "a.png", "conversations": TEXT_ONLY}, "image without <image> tag"),
        ({"image": ["a.png"] * 2, "conversations": GOOD}, "image without <image> tag"),
        (
            {"image": ["a.png"] * 2, "conversations": messages("<image><image>", "a", "<image>", "b")},
            "<image> tag without",
        ),
        ({"image": ["a.png", "c.png"], "conversations": [*GOOD, *GOOD]}, "no image file"),
        ({"conversations": messages("a", "b", "c")}, "no target"),
        ({"conversations": messages("a", "")}, "no target"),
    ],
)
def test_broken_records(record, reason, find):
    with pytest.raises(InvalidRecord) as error:
        read_example(record, VICUNA, find)
    assert error.value.reason.startswith(reason)


@pytest.mark.parametrize("conversation", [TEXT_ONLY, [*GOOD, *TEXT_ONLY], GOOD[:1]])
def test_plain_takes_a_picture_and_its_caption(conversation, find):
    image = {"image": "a.png"} if conversation is not TEXT_ONLY else {}
    with pytest.raises(InvalidRecord, match="not for this template"):
        read_example({**image, "conversations": conversation}, PLAIN, find)


def test_good_records(find):
    for image in ("a.png", ["a.png"]):
        text, pictures = read_example({"image": image, "conversations": GOOD}, VICUNA, find)
        assert pictures == ["a.png"]
        assert [text.text[slice(*span)] for span in text.spans] == [" b</s>"]
    assert read_example({"conversations": TEXT_ONLY}, VICUNA, find)[1] == []


def test_a_record_of_several_pictures(find):
    two = {"image": ["a.png", "b.png"], "conversations": messages("Is <image> as <image>?", "No", "Why?", "So")}
    text, pictures = read_example(two, VICUNA, find)
    assert pictures == ["a.png", "b.png"]
    assert "USER: Is <image> as <image>? ASSISTANT: No</s>USER: Why?" in text.text
    assert [text.text[slice(*span)] for span in text.spans] == [" No</s>", " So</s>"]
    with pytest.raises(InvalidRecord, match="not for this template"):
        read_example(two | {"conversations": messages("<image><image>", "b")}, PLAIN, find)


def sizes(*tokens):
    return [ImageSize(1, n) for n in tokens]


def test_rows_are_cut_where_the_expanded_row_ends():
    ids = np.array([1, IMAGE_PLACEHOLDER, 7, 8, 9], np.int32)
    example = Example(ids, np.array([IGNORE, IGNORE, IGNORE, 8, 9], np.int32))
    assert fit(example, 8, sizes(4), "skip") == (example, 1)
    cut, _ = fit(example, 7, sizes(4), "truncate")
    assert cut.ids.tolist() == [1, IMAGE_PLACEHOLDER, 7, 8]
    assert cut.labels.tolist() == [IGNORE, IGNORE, IGNORE, 8]
    with pytest.raises(InvalidRecord, match="no target"):
        fit(example, 6, sizes(4), "truncate")
    with pytest.raises(InvalidRecord, match="too long"):
        fit(example, 7, sizes(4), "skip")


def test_an_image_that_is_cut_goes_altogether():
    example = Example(np.array([1, 7, 8, IMAGE_PLACEHOLDER, 9]), np.array([IGNORE, 7, 8, IGNORE, 9]))
    assert fit(example, 5, sizes(4), "truncate")[0].ids.tolist() == [1, 7, 8]
    two = Example(np.array([IMAGE_PLACEHOLDER, 7, IMAGE_PLACEHOLDER, 9]), np.array([IGNORE, 7, IGNORE, 9]))
    assert fit(two, 8, sizes(3, 4), "truncate")[0].ids.tolist() == [IMAGE_PLACEHOLDER, 7, IMAGE_PLACEHOLDER]
    assert fit(two, 7, sizes(3, 4), "truncate")[0].ids.tolist() == [IMAGE_PLACEHOLDER, 7]


def test_an_image_in_parts_goes_with_all_of_them():
    """Two tiles of three tokens each, with a text before each of them."""
    ids = np.array([7, 8, 1, IMAGE_PLACEHOLDER, 2, IMAGE_PLACEHOLDER, 3, 9])
    example = Example(ids, np.where(np.arange(8) == 7, 9, np.where(np.arange(8) == 1, 8, IGNORE)))
    tiles = [ImageSize(2, 6, texts=("a", "b", "c"))]
    assert fit(example, 12, tiles, "skip")[1] == 1
    for room in (6, 9):  # the second tile is cut, or the first
        cut, left = fit(example, room, tiles, "truncate")
        assert (cut.ids.tolist(), left) == ([7, 8, 1], 0)
    assert fit(example, 10, tiles, "truncate")[1] == 1


def test_a_target_that_nothing_predicts_is_none():
    with pytest.raises(InvalidRecord, match="no target"):
        fit(Example(np.array([7, 8]), np.array([7, IGNORE])), 5, [], "truncate")


@pytest.mark.parametrize("start", ["", "\n \n", "\ufeff"])
def test_lists_and_lines(tmp_path, start):
    path = tmp_path / "a.json"
    path.write_text(start + json.dumps([{"a": 1}, None, "é"], indent=1))
    assert list(read_records(path)) == [{"a": 1}, None, "é"]
    path.write_text(start + '{"a": 1}\n\n{"b": \n"é"\r\n')
    assert list(read_records(path)) == [{"a": 1}, None, "é"]
    path.write_bytes(b'{"a": 1}\n"\xff"\n' + b"[" * 100_000)
    assert list(read_records(path)) == [{"a": 1}, None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "is empty: expected a JSON list"),
        (b"\n  \n", "is empty: expected a JSON list"),
        (b'[{"a": 1},', "starts like a JSON list but is malformed: "),
        (b'[{"a": "\xff"}]', "starts like a JSON list but is malformed: "),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_records(tmp_path / "a.json"))
    assert "\n" not in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="is a folder, expected a file"):
        list(read_records(tmp_path))
