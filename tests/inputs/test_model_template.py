"""Models' own chat templates: text and ids beside those of transformers' processor, and what no template may do."""

import functools

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER, LLAVA_PLACES, ImagePlaces
from pdrop_jax.inputs.messages import read_conversation
from pdrop_jax.inputs.model_template import ModelTemplate, find_chat_template
from pdrop_jax.inputs.prompts import LlavaTemplate

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# What llava-hf/llava-1.5-7b-hf ships: images first, no system prompt, no end of an answer.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# ChatML with images, as llava-interleave and LLaVA-OneVision have it.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ChatML of a language model, with a system message of its own, and for text alone.
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3's writes BOS, and strips what it is given.
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = {
    LLAVA: ("<s>", "</s>", "<image>"),
    CHATML: ("<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    SMOL: ("<|im_start|>", "<|im_end|>"),
    LLAMA_3: ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"),
}


@functools.cache
def tokenizer_of(template, special=None):
    """LLaVA's is like LLaMA's, with spaces as ▁ and bytes; the others are byte-level, Llama 3's adds BOS."""
    special = special or SPECIAL[template]
    if template == LLAVA:
        pieces = [
            "<unk>",
            *special,
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            "U",
            "S",
            "E",
            "R",
            ":",
            "▁c",
            "a",
        ]
        vocab = {piece: i for i, piece in enumerate([*pieces, "t", "c", "at", "▁cat"])}
        merges = [("▁", "c"), ("a", "t"), ("▁c", "at")]
        backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        vocab = {piece: i for i, piece in enumerate([*special, *BYTES, "Ġc", "at"])}
        backend = Tokenizer(models.BPE(vocab, [("Ġ", "c"), ("a", "t")]))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = {LLAVA: "<s>", LLAMA_3: "<|begin|>"}.get(template)
    if bos:
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos)


@functools.cache
def processor_of(template):
    tokenizer = tokenizer_of(template)
    tokenizer.image_token = "<image>"
    side = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side)
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


@functools.cache
def ours(template):
    return ModelTemplate(tokenizer_of(template), template, LLAVA_PLACES)


def text(value):
    return {"type": "text", "text": value}


def user(*contents):
    return {"role": "user", "content": list(contents)}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


IMAGE = {"type": "image"}
CONVERSATIONS = [
    [user(IMAGE, text("What cat?"))],
    [user(text("Hm, cat?\n")), assistant(" A é cat. "), user(text("\nWhy?"), IMAGE)],
    [user(text("a"), IMAGE, text("b "), IMAGE), assistant("no"), user(text("and"))],
    [{"role": "system", "content": [text("Be cat.")]}, user(IMAGE, text("{{ x }} cat"))],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [LLAVA, CHATML, LLAMA_3], ids=["llava", "chatml", "llama_3"])
def test_text_and_ids_are_those_of_the_processor(template, messages, picture):
    processor, found = processor_of(template), ours(template)
    read, _ = read_conversation(messages, [None] * sum(item == IMAGE for m in messages for item in m["content"]))
    assert found.render(read) == processor.apply_chat_template(messages, add_generation_prompt=True)
    shown = [
        {**m, "content": [{**item, "image": picture} if item == IMAGE else item for item in m["content"]]}
        for m in messages
    ]
    (theirs,) = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    image = processor.image_token_id
    assert expanded(found.ids(read), image) == list(theirs)
    # What the user does not send as messages is the same conversation.
    assert read_conversation(shown)[0] == read


def expanded(ids, image):
    """An image of 28 x 28 pixels has 4 patches of 14 x 14."""
    return [i for token in ids for i in ([image] * 4 if token == IMAGE_PLACEHOLDER else [token])]


@pytest.fixture(scope="module")
def picture():
    from PIL import Image

    return Image.new("RGB", (40, 30), "red")


def test_plain_prompts_and_turns_are_messages():
    for template in (LLAVA, CHATML, LLAMA_3):
        wanted = ours(template).render(read_conversation([user(IMAGE, text("What?"))], [None])[0])
        for prompt in ("What?", "<image>\nWhat?", [("What?", None)], [{"role": "user", "content": "What?"}]):
            assert ours(template).render(read_conversation(prompt, [None])[0]) == wanted


def test_a_template_for_text_alone_is_given_tags():
    """Whose tokenizer need not have one: the text is split there."""
    found = ours(SMOL)
    (read, _) = read_conversation([user(IMAGE, text("What?")), assistant("A cat"), user(text("Why?"))], [None])
    assert found.render(read) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    before, behind = found.render(read).split("<image>")
    tokenizer = found.tokenizer
    assert found.ids(read) == [*tokenizer(before)["input_ids"], IMAGE_PLACEHOLDER, *tokenizer(behind)["input_ids"]]
    plain = [{**m, "content": "".join(item["text"] for item in m["content"])} for m in (user(text("Hi")),)]
    theirs = tokenizer.apply_chat_template(plain, chat_template=SMOL, add_generation_prompt=True)["input_ids"]
    assert found.ids(read_conversation("Hi")[0]) == list(theirs)


def test_a_family_says_its_placeholders():
    qwen = CHATML.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>").replace("<video>", "<|video_pad|>")
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    places = ImagePlaces({"image": "<|image_pad|>", "video": "<|video_pad|>"}, ("<|vision_start|>", "<|vision_end|>"))
    found = ModelTemplate(tokenizer_of(CHATML, special), qwen, places)
    messages = [user(IMAGE, {"type": "video"}, text("<image>?"))]
    read, _ = read_conversation(messages, [None] * 3)
    assert "user\n<|vision_start|><|image_pad|><|vision_end|>" in found.render(read)
    assert "<|video_pad|>" in found.render(read)
    ids = found.ids(read)
    assert ids.count(IMAGE_PLACEHOLDER) == 3
    at = ids.index(IMAGE_PLACEHOLDER)
    assert found.tokenizer.convert_ids_to_tokens([ids[at - 1], ids[at + 1]]) == ["<|vision_start|>", "<|vision_end|>"]
    assert found.without_places("a <|image<|image_pad|>_pad|>b<image>") == "a b"
    with pytest.raises(UserError, match="has 1 image, but its text by the model's chat template has places for 2"):
        found.ids(read_conversation([user(IMAGE, text("<|image_pad|>"))], [None])[0])


def test_the_token_of_a_video_is_refused_where_there_is_one():
    messages, _ = read_conversation("What is <video>?")
    plain = LlavaTemplate(tokenizer_of(SMOL), "vicuna_v1")
    assert "<video>" in plain.tokenizer.decode(plain.ids(messages))
    assert plain.without_places("a <video>") == "a <video>"
    special = LlavaTemplate(tokenizer_of(CHATML), "vicuna_v1")
    with pytest.raises(UserError, match=r"^the text has <video>, which stands for an image: leave it out of questions"):
        special.ids(messages)
    assert special.without_places("a <vid<video>eo>") == "a "


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('not\ntoday') }}", [user(text("a"))], "refuses the conversation: not today$"),
        ("{{ messages[0]['content'] + 1 }}", [user(text("a"))], "refuses the conversation: "),
        ("{% for", [user(text("a"))], "refuses the conversation: "),
        ("always this", [user(text("a"))], "does not write what the user asks: it cannot be used$"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('') }}{% endif %}{{ messages[0]['content'] }}",
            [{"role": "system", "content": "Be."}, user(text("a"))],
            "takes no system message: leave it out$",
        ),
    ],
)
def test_templates_that_refuse(template, messages, message):
    found = ModelTemplate(tokenizer_of(CHATML), template, LLAVA_PLACES)
    with pytest.raises(UserError, match=message) as error:
        found.ids(read_conversation(messages)[0])
    assert "\n" not in str(error.value)


GENERATION = CHATML.replace(
    "{{ '\n' + content['text'] }}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ content['text'] }}{% endif %}",
).replace(
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add",
    "{% if message['role'] == 'user' %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add",
)


def test_targets_are_the_assistants_tokens_of_transformers():
    """Of a template that says which they are, with images and answers at every edge."""
    found = ModelTemplate(tokenizer_of(CHATML), GENERATION, LLAVA_PLACES)
    messages = [user(IMAGE, text("What cat?")), assistant("A cat,\n\né."), user(text("Why?")), assistant("cat")]
    turns, _ = read_conversation([("<image>\nWhat cat?", "A cat,\n\né."), ("Why?", "cat")], [None])
    found.check_trainable()
    (example,) = found.tokenize([found.training_text(turns)])
    theirs = found.tokenizer.apply_chat_template(
        messages, chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    image = found.tokenizer.convert_tokens_to_ids("<image>")
    assert [image if i == IMAGE_PLACEHOLDER else i for i in example.ids.tolist()] == theirs["input_ids"]
    assert (example.labels != IGNORE).tolist() == [bool(x) for x in theirs["assistant_masks"]]


@pytest.mark.parametrize("template", [CHATML, SMOL, LLAMA_3], ids=["chatml", "smol", "llama_3"])
def test_a_model_learns_what_follows_its_prompts(template):
    """The ids before each answer are those of its prompt; the targets are the answer and what ends it."""
    found, turns = ours(template), [("<image>\nWhat cat?", "A é."), ("Why?", "cat")]
    found.check_trainable()
    (example,) = found.tokenize([found.training_text(read_conversation(turns, [None])[0])])
    ids, target = example.ids.tolist(), example.labels != IGNORE
    for n in (1, 2):
        prompt = found.ids(read_conversation([*turns[: n - 1], (turns[n - 1][0], None)], [None])[0])
        assert ids[: len(prompt)] == prompt
        assert not target[len(prompt) - 1]
        assert target[len(prompt)]
    decoded = found.tokenizer.decode(example.ids[target])
    newline = "\n" if template == CHATML else ""  # it stands between the role and the text
    assert decoded == "".join(f"{newline}{answer}{found.end_token}" for _, answer in turns)
    assert not target[ids.index(IMAGE_PLACEHOLDER)]


def test_templates_that_cannot_be_learned():
    with pytest.raises(UserError, match="ends its answers with no special token"):
        ours(LLAVA).check_trainable()
    thinks = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    with pytest.raises(UserError, match="asks for an answer with a text that its answers do not start with"):
        ModelTemplate(tokenizer_of(CHATML), thinks, LLAVA_PLACES).check_trainable()
    upper = CHATML.replace("content['text']", "content['text'] | upper")
    with pytest.raises(UserError, match="does not write what the user asks"):
        ModelTemplate(tokenizer_of(CHATML), upper, LLAVA_PLACES).check_trainable()
    for change, why in (("replace('A', 'B')", "changes the answers of"), ("replace('Pdrop', '')", "does not write")):
        other = SMOL.replace("message['content']", f"message['content'] | {change}")
        with pytest.raises(UserError, match=why):
            ModelTemplate(tokenizer_of(SMOL), other, LLAVA_PLACES).check_trainable()
    mark = "('<|im_end|>' if loop.last or message['role'] == 'user' else '!')"
    ends_once = SMOL.replace("+ '<|im_end|>\n' }}{% endfor", f"+ {mark} }}}}{{% endfor")
    with pytest.raises(UserError, match="ends an answer differently once other messages follow"):
        ModelTemplate(tokenizer_of(SMOL), ends_once, LLAVA_PLACES).check_trainable()
    # As Qwen3's: an empty thought stands before the last answer alone.
    thought = "('<think></think>' if loop.last and message['role'] == 'assistant' else '')"
    thinks_last = SMOL.replace("message['content']", f"{thought} + message['content']")
    with pytest.raises(UserError, match="begins an answer differently once other messages follow"):
        ModelTemplate(tokenizer_of(SMOL), thinks_last, LLAVA_PLACES).check_trainable()
    forgets = SMOL.replace("message['content']", "(message['content'] if loop.last or loop.first else '')")
    with pytest.raises(UserError, match="takes no assistant message"):
        ModelTemplate(tokenizer_of(SMOL), forgets, LLAVA_PLACES).check_trainable()


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        ({"chat_template.jinja": "a"}, "a"),
        ({"chat_template.json": '{"chat_template": "b"}', "chat_template.jinja": "a"}, "b"),
        ({"tokenizer_config.json": '{"chat_template": "c"}', "chat_template.jinja": "a"}, "a"),
        (
            {
                "tokenizer_config.json": '{"chat_template": [{"name": "tool_use", "template": "d"}, '
                '{"name": "default", "template": "e"}]}'
            },
            "e",
        ),
        ({"tokenizer_config.json": "{}", "processor_config.json": "{}"}, None),
    ],
)
def test_where_a_template_is_found(files, wanted, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert find_chat_template(tmp_path) == wanted


def test_a_malformed_file(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": 5}')
    with pytest.raises(UserError, match="its chat_template is a int, expected text"):
        find_chat_template(tmp_path)
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        find_chat_template(tmp_path)
