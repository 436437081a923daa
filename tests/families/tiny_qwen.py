"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL models of transformers, of the true structure, and their processors."""

import copy
import functools
import json

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

MARKS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}  # pixels a side
SEED = {"qwen2_vl": 0, "qwen2_5_vl": 0, "qwen3_vl": 1}  # whose answers are longer than the tests ask for
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION = {
    "qwen2_5_vl": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    },
    "qwen3_vl": {
        "depth": 5,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": [1, 2, 3],
    },
    "qwen2_vl": {"depth": 3, "embed_dim": 32, "mlp_ratio": 3, "num_heads": 4, "hidden_size": 64},
}


# What Qwen's chat template writes, as far as it goes without tools.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- 'SYSTEM' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}
                {{- part.text }}
            {%- else %}
                {{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@functools.cache
def tokenizer():
    """A tokenizer of bytes with Qwen's marks."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": MARKS})
    return fast


def image_processor(kind="qwen2_vl"):
    cell = 4 * PATCH[kind] ** 2  # pixels of a token
    return Qwen2VLImageProcessorPil(patch_size=PATCH[kind], min_pixels=cell * 4, max_pixels=cell * 60)


@functools.cache
def torch_model(kind):
    """Every parameter is random, or a forgotten norm or bias would not show."""
    ids = tokenizer().convert_tokens_to_ids(MARKS)
    special = dict(
        zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), ids[1:], strict=True)
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    if kind == "qwen3_vl":  # heads that are wider than their share of the hidden size
        rope = {**rope, "mrope_section": [5, 4, 3], "mrope_interleaved": True}
    own = {"head_dim": 24} if kind == "qwen3_vl" else {}
    text = {**TEXT, **own, "vocab_size": len(tokenizer()), "rope_parameters": rope, "bos_token_id": None}
    text["eos_token_id"] = tokenizer().eos_token_id
    config = transformers.AutoConfig.for_model(kind, vision_config=VISION[kind], text_config=text, **special)
    torch.manual_seed(SEED[kind])
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
    return model


def save(kind, folder):
    """The checkpoint as the hub has it, with tokenizer and image processor."""
    torch_model(kind).save_pretrained(folder)
    asked = copy.copy(tokenizer())
    asked.chat_template = CHAT_TEMPLATE.replace("SYSTEM", system_prompt(kind).replace("\n", "\\n"))
    asked.save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer().eos_token_id]}))
    return folder


def photo(height, width, seed=0):
    """A picture with structure at several scales."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(small, np.int64) + noise, 0, 255).astype(np.uint8))


def system_prompt(kind):
    return "" if kind == "qwen3_vl" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def torch_inputs(kind, question, images, video=(), fps=2.0):
    """What transformers' processor makes of one question with images and a video's frames in front.

    Its class wants torchvision for videos, so its steps are written out here; a frame is resized as a picture is.
    """
    found = dict(image_processor(kind)(images, return_tensors="pt")) if images else {}
    marks = [marked("image", int(grid.prod() // 4)) for grid in found.get("image_grid_thw", ())]
    if video:
        pixels, grid = patchify(kind, [*video, *video[-1:] * (len(video) % 2)])
        found |= {"pixel_values_videos": pixels, "video_grid_thw": grid}
        if kind == "qwen2_5_vl":
            found["second_per_grid_ts"] = torch.tensor([2 / fps])
        marks.append(
            timestamps(grid, len(video), fps) if kind == "qwen3_vl" else marked("video", int(grid.prod() // 4))
        )
    text = f"{system_prompt(kind)}<|im_start|>user\n{''.join(marks)}{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer()(text, return_tensors="pt")["input_ids"]
    image, clip = tokenizer().convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return {"input_ids": ids, "mm_token_type_ids": (ids == image).int() + 2 * (ids == clip).int(), **found}


def marked(what, tokens):
    return f"<|vision_start|>{f'<|{what}_pad|>' * tokens}<|vision_end|>"


def timestamps(grid, frames, fps):
    """What Qwen3-VL's processor puts in place of a video, marks included."""
    processor = object.__new__(Qwen3VLProcessor)  # its constructor wants torchvision for a video processor
    processor.video_processor = image_processor("qwen3_vl")
    processor.vision_start_token, processor.video_token, processor.vision_end_token = MARKS[1], MARKS[4], MARKS[2]
    metadata = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=list(range(frames)))
    return processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [metadata]}, 0)


def patchify(kind, frames):
    """Patches and grid of an even number of frames, by the shapes of transformers' video processor."""
    read = [image_processor(kind)(frame, return_tensors="pt") for frame in frames]
    _, rows, columns = read[0]["image_grid_thw"][0].tolist()
    side = PATCH[kind]
    # Undo a picture's patches: (row, column, row in token, column in token, channel, frame, y, x).
    pixels = [
        x["pixel_values"]
        .view(rows // 2, columns // 2, 2, 2, 3, 2, side, side)[:, :, :, :, :, 0]
        .permute(4, 0, 2, 5, 1, 3, 6)
        .reshape(3, rows * side, columns * side)
        for x in read
    ]
    steps = len(frames) // 2
    video = torch.stack(pixels).view(steps, 2, 3, rows // 2, 2, side, columns // 2, 2, side)
    patches = video.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * columns, -1)
    return patches, torch.tensor([[steps, rows, columns]])
