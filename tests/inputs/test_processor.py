import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdrop_jax.batch import IGNORE, Bucket
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs import Processor, Row, assemble, choose_bucket
from pdrop_jax.inputs.anyres import whole
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.images import to_crop
from pdrop_jax.schedule import DropSchedule

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = ROOT / "examples/tiny_tokenizer"
CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=28, patch_size=14),
    text=TextConfig(vocab_size=320, num_layers=4, max_length=256),
    schedule=DropSchedule.none(),
    template="plain",
)
RED, BLUE = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")


@pytest.fixture(scope="module")
def processor():
    return Processor.load(TOKENIZER, CONFIG)


def crop(value=1.0):
    return whole(np.full((28, 28, 3), value, np.float32), CONFIG)


def test_ragged_batch(processor):
    batch = processor(
        ["Look", "no picture", "<image> and <image>?"],
        [RED, None, [RED, BLUE]],
    )
    assert batch.bucket == Bucket(32, (4, 4))
    assert batch.token_ids.shape == batch.feature_index.shape[:2] == batch.image_id.shape == (3, 40)
    assert batch.crops.shape == (3, 2, 28, 28, 3)
    assert {a.dtype for a in (batch.token_ids, batch.feature_index, batch.image_id, batch.length)} == {
        np.dtype("int32")
    }
    assert batch.crops.dtype == np.float32
    assert batch.labels is None
    np.testing.assert_array_equal(batch.query_rows[:, 0], batch.length - 1)
    # "plain" is tag, line break, question, line break: <s> image ▁ \n L o o k \n
    np.testing.assert_array_equal(batch.image_id[0, :7], [0, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.feature_index[0, :7, 0], [-1, 0, 1, 2, 3, -1, -1])
    assert batch.token_ids[0, batch.length[0] - 1] == 13
    assert not batch.image_id[1].any()
    assert (batch.feature_index[1] == -1).all()
    np.testing.assert_array_equal(batch.feature_index[2, :, 0][batch.image_id[2] == 2], [4, 5, 6, 7])
    np.testing.assert_array_equal(batch.crops[0, 0], to_crop(RED, processor.image_processor, "square"))
    np.testing.assert_array_equal(batch.crops[2, 0], batch.crops[0, 0])
    assert (batch.crops[2, 1, ..., 2] > batch.crops[2, 1, ..., 0]).all()
    assert not batch.crops[0, 1].any()
    assert not batch.crops[1].any()


def test_text_only_batch_has_no_crops(processor):
    batch = processor(["hi", "hello"])
    assert batch.bucket == Bucket(32)
    assert batch.crops.shape == (2, 0, 28, 28, 3)


def test_conversation_and_template(processor):
    text = "[INST] a [/INST] b </s>[INST] c [/INST]"
    batch = processor([[("a", "b"), ("c", None)]], template="mistral_instruct")
    assert batch.token_ids[0, : batch.length[0]].tolist() == processor.tokenizer(text)["input_ids"]


def test_pad_comes_from_the_config():
    batch = Processor.load(TOKENIZER, dataclasses.replace(CONFIG, image_aspect="pad"))(["a"], [RED])
    assert not np.array_equal(batch.crops, Processor.load(TOKENIZER, CONFIG)(["a"], [RED]).crops)


@pytest.mark.parametrize(
    ("text", "images", "bucket"),
    [
        (1, 0, Bucket(32)),
        (32, 1, Bucket(32, (4,))),
        (33, 2, Bucket(64, (4, 4))),
        (65, 3, Bucket(128, (4,) * 4)),
        (129, 5, Bucket(200, (4,) * 8)),
    ],
)
def test_buckets(text, images, bucket):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, max_length=200))
    row = Row([1] * text + [IMAGE_PLACEHOLDER] * images, [crop()] * images)
    assert choose_bucket([Row([1]), row], config) == bucket
    assert assemble([row], config, bucket).length == text + 4 * images


def test_prompt_that_does_not_fit(processor):
    row = Row([1] * 240 + [IMAGE_PLACEHOLDER] * 2, [crop()] * 2)
    assert choose_bucket([row], CONFIG, max_new_tokens=8).text == 256
    message = (
        r"^prompt 2 needs 257 positions \(240 text tokens \+ 8 image tokens of 2 pictures \+ 9 new tokens\), but the "
        r"model has 256"
    )
    with pytest.raises(UserError, match=message):
        choose_bucket([Row([1]), row], CONFIG, max_new_tokens=9)
    with pytest.raises(UserError, match=r"prompt 1 needs \d+ positions \(\d+ text tokens"):
        processor(["word " * 400])
    with pytest.raises(UserError, match=r"\+ 300 new tokens\), but the model has 256"):
        processor(["a"], max_new_tokens=300)


def test_placeholders_become_slots():
    rows = [Row([1, 7, IMAGE_PLACEHOLDER, 8], [crop(2)]), Row([5])]
    batch = assemble(rows, CONFIG, Bucket(4, (4,)))
    assert batch.token_ids.tolist() == [[1, 7, 0, 0, 0, 0, 8, 0], [5, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.feature_index[..., 0].tolist() == [[-1, -1, 0, 1, 2, 3, -1, -1], [-1] * 8]
    assert batch.image_id.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [0] * 8]
    assert batch.length.tolist() == [7, 1]
    assert batch.query_rows.tolist() == [[6], [0]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.just(IMAGE_PLACEHOLDER), st.integers(0, 319)), min_size=1, max_size=20), min_size=1)
)
def test_assembled_rows_say_what_went_in(all_ids):
    rows = [Row(ids, [crop(k + 1) for k in range(ids.count(IMAGE_PLACEHOLDER))]) for ids in all_ids]
    batch = assemble(rows, CONFIG, choose_bucket(rows, CONFIG))
    for b, ids in enumerate(all_ids):
        expected = []
        image = 0
        for i in ids:
            if i == IMAGE_PLACEHOLDER:
                image += 1
                expected += [(0, 4 * (image - 1) + k, image) for k in range(4)]
            else:
                expected.append((i, -1, 0))
        n = batch.length[b]
        arrays = (batch.token_ids[b], batch.feature_index[b, :, 0], batch.image_id[b])
        assert list(zip(*(a[:n].tolist() for a in arrays), strict=True)) == expected
        assert [set(a[n:].tolist()) - {pad} for a, pad in zip(arrays, (0, -1, 0), strict=True)] == [set()] * 3
        means = batch.crops[b].mean((1, 2, 3)).tolist()
        assert means == [k + 1 if k < image else 0 for k in range(len(means))]


def test_labels_stand_where_their_tokens_do():
    rows = [
        Row([1, 7, IMAGE_PLACEHOLDER, 8, 9, 10], [crop()], [IGNORE, 7, IMAGE_PLACEHOLDER, 8, IGNORE, 10]),
        Row([5, 6], labels=[IGNORE, IGNORE]),
        Row([5, 6, IMAGE_PLACEHOLDER], [crop()], [IGNORE] * 3),
        Row([5, 6], labels=[5, 6]),
        Row([5, 6, 7]),
    ]
    batch = assemble(rows, CONFIG, Bucket(6, (4,)), queries=4)
    no = IGNORE
    assert batch.labels.dtype == batch.query_rows.dtype == np.int32
    assert batch.labels[0].tolist() == [no, 7, no, no, no, no, 8, no, 10, no]
    assert (batch.labels[[1, 2, 4]] == no).all()
    assert batch.labels[3].tolist() == [5, 6] + [no] * 8
    # Right before each run of targets, or the last text slot if there is none; nothing precedes slot 0.
    assert batch.query_rows.tolist() == [
        [0, 5, 7, -1],
        [1, -1, -1, -1],
        [1, -1, -1, -1],
        [1, -1, -1, -1],
        [2, -1, -1, -1],
    ]


def test_caption_right_behind_the_picture_is_asked_by_its_last_slot():
    row = Row([1, IMAGE_PLACEHOLDER, 8, 9], [crop()], [IGNORE, IGNORE, 8, 9])
    assert assemble([row], CONFIG, Bucket(4, (4,))).query_rows.tolist() == [[4]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(st.just(IMAGE_PLACEHOLDER), st.integers(0, 319)), st.booleans()), min_size=1, max_size=20
    )
)
def test_query_rows_are_right_before_targets(tokens):
    ids = [i for i, _ in tokens]
    row = Row(ids, [crop()] * ids.count(IMAGE_PLACEHOLDER), [i if target else IGNORE for i, target in tokens])
    batch = assemble([row], CONFIG, choose_bucket([row], CONFIG), queries=16)
    labels, used = batch.labels[0], batch.query_rows[0][batch.query_rows[0] >= 0]
    target = labels != IGNORE
    np.testing.assert_array_equal(labels[target], batch.token_ids[0][target])
    assert target.sum() == sum(target for i, target in tokens if i != IMAGE_PLACEHOLDER)
    runs = [i - 1 for i in range(1, len(labels)) if target[i] and not target[i - 1]]
    text = np.flatnonzero(batch.image_id[0, : batch.length[0]] == 0)
    assert used.tolist() == (runs or [text[-1] if len(text) else batch.length[0] - 1])


def test_labels_that_do_not_fit():
    with pytest.raises(UserError, match="prompt 1 has 2 tokens but 3 labels"):
        assemble([Row([1, 2], labels=[1, 2, 3])], CONFIG, Bucket(4))
    with pytest.raises(UserError, match="prompt 1 has 2 runs of targets, but its batch holds 1"):
        assemble([Row([1, 2, 3, 4], labels=[IGNORE, 2, IGNORE, 4])], CONFIG, Bucket(4))


def test_more_query_rows_than_a_prompt_needs():
    assert assemble([Row([1, 2])], CONFIG, Bucket(4), queries=3).query_rows.tolist() == [[1, -1, -1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one prompt"),
        ([Row([])], "prompt 1 has no tokens"),
        ([Row([1]), Row([IMAGE_PLACEHOLDER])], "prompt 2 has 1 image placeholders but 0 pictures"),
        ([Row([1] * 5)], "prompt 1 has 5 text tokens and 0 images, but its bucket holds 4 and 1"),
        ([Row([IMAGE_PLACEHOLDER] * 2, [crop()] * 2)], "0 text tokens and 2 images, but its bucket holds 4 and 1"),
        ([Row([1, 320])], r"token ids 1\.\.320 but the model knows 0\.\.319: the tokenizer belongs to another model"),
        ([Row([-1])], r"token ids -1\.\.-1 but"),
        ([Row([IMAGE_PLACEHOLDER], [whole(np.zeros((3, 28, 28)), CONFIG)])], r"shape \(3, 28, 28\), .* \(28, 28, 3\)"),
    ],
)
def test_rows_that_cannot_be_assembled(rows, message):
    with pytest.raises(UserError, match=message):
        assemble(rows, CONFIG, Bucket(4, (4,)))


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ("hi", None, "got one string: put it in a list"),
        ([], None, "at least one prompt"),
        (["a", "b"], [None], "2 prompts but 1 entries of pictures"),
        (["a"], RED, "1 prompts but 1 entries of pictures"),
        (["a", "b"], "xy", "2 prompts but 1 entries of pictures"),
        (["<image><image>"], [RED], "the prompt has 2 <image> tags but 1 picture"),
        (["<image>"], None, "the prompt has 1 <image> tag but 0 pictures"),
        ([[]], [RED], "at least one question"),
        (["a"], ["/absent.png"], "^/absent.png cannot be read: there is no such file"),
    ],
)
def test_bad_calls(processor, prompts, images, message):
    with pytest.raises(UserError, match=message) as error:
        processor(prompts, images)
    assert "\n" not in str(error.value)


def test_one_picture_needs_a_list(processor):
    with pytest.raises(UserError, match="give one for each prompt, a picture, a list or None"):
        processor(["a"], RED)


def test_folder_without_tokenizer(tmp_path):
    for name in (None, "tokenizer_config.json"):  # transformers makes an empty tokenizer out of the latter
        if name:
            shutil.copy(TOKENIZER / name, tmp_path)
        with pytest.raises(
            UserError, match=r"holds no tokenizer: copy tokenizer\.json, or tokenizer\.model with"
        ) as error:
            Processor.load(tmp_path, CONFIG)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "no json", "{}", '{"version": "1.0"}'])
def test_damaged_tokenizer(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be read|tokenizer\.json is malformed") as error:
        Processor.load(tmp_path, CONFIG)
    assert "\n" not in str(error.value)


def test_stop_ids(processor):
    assert processor.stop_ids == (2,)
    other = dataclasses.replace(CONFIG, eos_token_ids=(7, 5))
    assert Processor(other, processor.tokenizer, None).stop_ids == (2, 5, 7)
    chatml = Processor.load(TOKENIZER, CONFIG)
    chatml.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert chatml.stop_ids == (2, 320)


def test_a_mark_of_another_model_ends_no_answer_where_it_is_ordinary_text():
    backend = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    backend.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    config = dataclasses.replace(CONFIG, bos_token_id=None, eos_token_ids=())
    assert Processor(config, tokenizer, None).stop_ids == (2,)


def test_decode(processor):
    ids = processor.tokenizer(" What is it ? é", add_special_tokens=False)["input_ids"]
    assert processor.decode([1, *ids, 2]) == "What is it ? é"
    assert processor.decode(np.array(ids, np.int32)) == "What is it ? é"
    assert processor.decode([]) == ""


def streamed(processor, ids):
    stream = processor.stream()
    return [stream.put(i) for i in ids] + [stream.end()]


def test_stream_keeps_spaces_and_whole_characters(processor):
    text = "What is\n in  the picture? 你好 👩‍👧, é."
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = streamed(processor, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 10


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 330), max_size=30))
def test_stream_of_any_ids_is_the_decoded_text(processor, ids):
    assert "".join(streamed(processor, ids)) == processor.decode(ids)


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer like GPT-2's: bytes as letters, no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Processor(CONFIG, PreTrainedTokenizerFast(tokenizer_object=tokenizer), None)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=12).map(lambda s: s.encode()), st.binary(max_size=12)))
def test_stream_of_byte_level_tokens(byte_level, data):
    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_to_char = _gpt2_bytes()
    ids = [order.index(byte_to_char[byte]) for byte in data]
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids) == data.decode(errors="replace").strip()


def _gpt2_bytes():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(rest)}


def test_tiny_tokenizer_is_of_llamas_kind(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) == 320
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "What colour is the 9th café?\nRed."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_messages_are_asked_as_the_same_turns(processor):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    found = processor([messages, "d"], template="mistral_instruct")
    wanted = processor([[("a", "b"), ("c", None)], "d"], [RED, None], template="mistral_instruct")
    for name in ("token_ids", "crops", "image_id", "length"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_messages_that_no_template_takes(processor):
    with pytest.raises(UserError, match=r"^prompts must be a list of conversations, got the messages of one"):
        processor([{"role": "user", "content": "a"}])
    system = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UserError, match=r"^template 'plain' has a fixed system prompt: leave the system message out"):
        processor([system])


def test_the_end_of_an_answer_by_its_own_template_stops_it():
    template = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    config = dataclasses.replace(CONFIG, template="own", eos_token_ids=(2,))
    assert Processor(config, tokenizer, None, template).stop_ids == (2, 320)
    assert Processor(CONFIG, tokenizer, None, template).stop_ids == (2,)
