"""Tiny random models of transformers whose pictures are tiles, of the true structure, and their processors.

The processors' constructors want torchvision for videos, so what they do with a prompt is written out here, with their
own texts in place of a picture.
"""

import copy
import functools
import json

import tokenizers
import torch
import transformers
from tiny_qwen import photo
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOL_VIDEO_TEMPLATE
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.video_utils import VideoMetadata

__all__ = ["image_processor", "photo", "save", "tokenizer", "torch_inputs", "torch_model"]

# InternVL's towers of 300M and of 6B parameters differ: norms, biases and a norm of queries and keys. The second one
# stands in front of a Qwen3 decoder here, as in InternVL3.5-38B.
KINDS = ("internvl", "internvl-6b", "smolvlm", "idefics3")
DECODERS = {"internvl": "qwen2", "internvl-6b": "qwen3", "smolvlm": "llama", "idefics3": "llama"}
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
# As of SmolVLM2, "<video>" is no token.
SMOL = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *PLACES]
MARKS = {
    "internvl": ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "smolvlm": SMOL,
    "idefics3": SMOL,
}
PLACE = {"internvl": "<IMG_CONTEXT>", "smolvlm": "<image>", "idefics3": "<image>"}  # the token of a picture
TOKENS = {"internvl": 4, "smolvlm": 4, "idefics3": 4}  # of a crop
SIDE = 56
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
}
VISION = {
    "internvl": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [SIDE, SIDE],
        "patch_size": [14, 14],
        "attention_bias": True,
    },
}
VISION["internvl-6b"] = VISION["internvl"] | {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"}
VISION["smolvlm"] = VISION["idefics3"] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE + 4,  # a part of a patch is left over, as of SmolVLM2-2.2B's 384 pixels
    "patch_size": 9,
}
SMOL_TEMPLATE = """\
<|im_start|>{% for message in messages %}{{ message.role | capitalize }}\
{{ ':' if message.content[0].type == 'image' else ': ' }}\
{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}\
"""
CHAT_TEMPLATE = {
    "smolvlm": SMOL_TEMPLATE,
    "idefics3": SMOL_TEMPLATE,
    "internvl": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<IMG_CONTEXT>\\n' }}
            {%- elif part.type == 'video' %}
                {{- '<video>\\n' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
}


def family(kind):
    return kind.partition("-")[0]


@functools.cache
def tokenizer(kind):
    """A tokenizer of bytes with the family's marks."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    marks = MARKS[family(kind)]
    bos = None if family(kind) == "internvl" else marks[0]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=marks[1], bos_token=bos)
    fast.add_special_tokens({"additional_special_tokens": marks})
    fast.chat_template = CHAT_TEMPLATE[family(kind)]
    return fast


def image_processor(kind):
    if family(kind) != "internvl":
        edges = {"size": {"longest_edge": 2 * SIDE + 8}, "max_image_size": {"longest_edge": SIDE + 4}}
        return SmolVLMImageProcessorPil(**edges)
    return GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_patches=1, max_patches=6)


@functools.cache
def torch_model(kind):
    """Every parameter is random, or a forgotten norm, bias or scale would not show."""
    name = family(kind)
    text = {**TEXT, "model_type": DECODERS[kind], "vocab_size": len(tokenizer(kind))}
    text["eos_token_id"] = tokenizer(kind).eos_token_id
    own = {"image_seq_length": TOKENS[name]} if name == "internvl" else {"scale_factor": 3, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(
        name,
        vision_config=VISION[kind],
        text_config=text,
        image_token_id=tokenizer(kind).convert_tokens_to_ids(PLACE[name]),
        tie_word_embeddings=kind == "internvl-6b",
        **own,
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in model.named_parameters():
        scale = ("norm" in name and "weight" in name) or "lambda" in name
        torch.nn.init.normal_(parameter, 1.0 if scale else 0.0, 0.1)
    return model


def save(kind, folder):
    """The checkpoint as transformers saves it, with tokenizer and image processor."""
    torch_model(kind).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer(kind).eos_token_id]}))
    return folder


def torch_inputs(kind, question, images, frames=()):
    """What transformers' processor makes of one question with images and a video's frames in front."""
    content = [*[{"type": "image"} for _ in images], *[{"type": "video"}] * bool(frames)]
    content.append({"type": "text", "text": question})
    return torch_inputs_of(kind, [{"role": "user", "content": content}], images, frames)


def torch_inputs_of(kind, messages, images, frames=()):
    """The same of a whole conversation that the model continues, and the "crops" of each picture or video."""
    template = SMOL_VIDEO_TEMPLATE if frames and family(kind) == "smolvlm" else None
    text = tokenizer(kind).apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    place, found, crops = PLACE[family(kind)], {}, []
    if images:
        written, found, crops = (intern_pictures if family(kind) == "internvl" else smol_pictures)(kind, images)
        first, *rest = text.split(place)
        text = first + "".join(shown + more for shown, more in zip(written, rest, strict=True))
    if frames:
        written, clip = (intern_video if family(kind) == "internvl" else smol_video)(kind, frames)
        text = text.replace("<video>", written)
        pixels = [found["pixel_values"].flatten(0, -4)] * bool(images)
        found = {"pixel_values": torch.cat([*pixels, clip])}
        if family(kind) != "internvl":
            found["pixel_values"] = found["pixel_values"][None]
        crops.append(len(frames))
    ids = tokenizer(kind)(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, **found}, crops


def intern_processor():
    processor = object.__new__(InternVLProcessor)
    processor.image_seq_length = TOKENS["internvl"]
    processor.start_image_token, processor.end_image_token, processor.image_token = MARKS["internvl"][2:5]
    return processor


def intern_video(kind, frames):
    """What the processor writes for a video, and its frames."""
    clip = image_processor(kind)(frames, crop_to_patches=False, return_tensors="pt")["pixel_values"]
    return intern_processor().replace_video_token({"pixel_values_videos": clip[None]}, 0), clip


def smol_video(kind, frames, fps=1.0):
    """The same. The video processor takes the sizes of pictures too, and resizes in torchvision: its pixels differ."""
    processor, alone = smol_processor(kind), copy.copy(image_processor(kind))
    alone.do_image_splitting = False
    clip = alone([frames], return_tensors="pt")["pixel_values"][0]
    data = VideoMetadata(len(frames), fps=fps, duration=len(frames) / fps, frames_indices=list(range(len(frames))))
    return processor.replace_video_token({"pixel_values": clip[None], "video_metadata": [data]}, 0), clip


def intern_pictures(kind, images):
    """What the processor writes for each picture, the model's inputs, and the number of crops of each."""
    found = dict(image_processor(kind)(images, crop_to_patches=True, return_tensors="pt"))
    crops = list(map(int, found.pop("num_patches")))
    written = [intern_processor().replace_image_token({"num_patches": crops}, n) for n in range(len(images))]
    return written, found, crops


def smol_processor(kind):
    processor = object.__new__(SmolVLMProcessor if kind == "smolvlm" else Idefics3Processor)
    processor.image_seq_len, processor.fake_image_token, processor.image_token = TOKENS[kind], *SMOL[2:4]
    processor.global_image_token = processor.global_image_tag = SMOL[4]
    return processor


def smol_pictures(kind, images):
    processor = smol_processor(kind)
    found = dict(image_processor(kind)([images], return_row_col_info=True, return_tensors="pt"))
    written = [processor.replace_image_token(found, n) for n in range(len(images))]
    sizes = zip(found.pop("rows")[0], found.pop("cols")[0], strict=True)
    return written, found, [int(rows * columns) + 1 for rows, columns in sizes]
