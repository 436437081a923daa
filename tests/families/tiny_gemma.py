"""A tiny random Gemma 3 of transformers, of the true structure, and its processor."""

import functools
import json

import tokenizers
import torch
import transformers
from tiny_qwen import photo
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

__all__ = ["image_processor", "photo", "save", "tokenizer", "torch_inputs", "torch_model"]

MARKS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
SIDE, TOKENS, WINDOW = 112, 16, 12  # the window is smaller than a picture
TEXT = {
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "max_position_embeddings": 4096,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
    "vision_use_head": False,
}


@functools.cache
def tokenizer():
    """A tokenizer of bytes with Gemma's marks, which starts a text with BOS."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    named = {"boi_token": MARKS[2], "eoi_token": MARKS[3], "image_token": MARKS[4]}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", extra_special_tokens=named
    )
    fast.add_special_tokens({"additional_special_tokens": MARKS[:2]}, replace_extra_special_tokens=False)
    return fast


def image_processor(**settings):
    return Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, **settings)


@functools.cache
def torch_model(seed=7):
    """Every parameter is random, or a forgotten norm or bias would not show. Answers of this seed vary."""
    start, end, image = tokenizer().convert_tokens_to_ids(MARKS[2:])
    text = {**TEXT, "vocab_size": len(tokenizer()), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(
        "gemma3",
        vision_config=VISION,
        text_config=text,
        mm_tokens_per_image=TOKENS,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in model.named_parameters():
        layer_norm = "norm" in name and "vision_tower" in name and "weight" in name
        torch.nn.init.normal_(parameter, 1.0 if layer_norm else 0.0, 0.1)
    return model


def save(folder, **settings):
    """The checkpoint as transformers saves it, with tokenizer and image processor."""
    torch_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    image_processor(**settings).save_pretrained(folder)
    ends = [tokenizer().eos_token_id, tokenizer().convert_tokens_to_ids("<end_of_turn>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 40, "pan_and_scan_max_num_crops": 3}


def torch_inputs(question, images, **settings):
    """What transformers' processor makes of one question with images in front; ``settings`` are pan-and-scan's."""
    processor = transformers.Gemma3Processor(image_processor(), tokenizer(), image_seq_length=TOKENS)
    marks = processor.boi_token * len(images)
    text = f"<start_of_turn>user\n{marks}{question}<end_of_turn>\n<start_of_turn>model\n"
    found = dict(processor(images=[images] if images else None, text=[text], return_tensors="pt", **settings))
    found.pop("num_crops", None)
    return found
