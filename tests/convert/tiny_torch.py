"""Tiny PyTorch models, and what tests do to their files."""

import json
import pathlib

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2, "head_dim": 16},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "bias": {"num_key_value_heads": 2, "attention_bias": True},
    "llama_3": {
        "num_key_value_heads": 2,
        "rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 6},
    "qwen2_siglip": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True, "siglip": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "next_mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "kind": "llava_next"},
    "onevision": {"model_type": "qwen2", "num_key_value_heads": 2, "siglip": True, "kind": "llava_onevision"},
    "next_video": {"num_key_value_heads": 2, "kind": "llava_next_video"},
    "qwen2_siglip_head": {"model_type": "qwen2", "num_key_value_heads": 2, "siglip": True, "vision_use_head": True},
}


PINPOINTS = {
    "llava_next": [[28, 56], [56, 28], [56, 56]],
    "llava_next_video": [[28, 56], [56, 28], [56, 56]],
    "llava_onevision": [[28 * h, 28 * w] for h in range(1, 4) for w in range(1, 4)],
}


def tiny_llava(
    *,
    kind="llava",
    model_type="llama",
    siglip=False,
    vision_use_head=False,
    patch_size=None,
    image_token_index=70,
    **text,
):
    """A random model of transformers. Norms and biases are random too, or a forgotten one would not show."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"image_size": 28, "patch_size": patch_size or (7 if kind == "llava_next_video" else 14)}
    if siglip:
        vision = transformers.SiglipVisionConfig(**sizes, vision_use_head=vision_use_head)
    else:
        vision = transformers.CLIPVisionConfig(**sizes)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    own = {} if kind == "llava" else {"image_grid_pinpoints": PINPOINTS[kind]}
    if kind in ("llava_next_video", "llava_onevision"):
        own["video_token_index"] = image_token_index - 1
    if kind == "llava_onevision":
        own["vision_aspect_ratio"] = "anyres_max_2"
    config = transformers.AutoConfig.for_model(
        kind,
        vision_config=vision,
        text_config=transformers.AutoConfig.for_model(
            model_type, **{"vocab_size": 71, "max_position_embeddings": 1024, **sizes, **text}
        ),
        image_token_index=image_token_index,
        **own,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return model


def byte_tokenizer():
    """A tokenizer whose tokens are bytes and some marks; the last is "<image>". It puts nothing in front of a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<video>", "<image>"]})
    fast.image_token, fast.video_token = "<image>", "<video>"
    return fast


def weights(folder):
    """Every tensor of a safetensors checkpoint."""
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def rewrite(folder, change, file="model.safetensors"):
    """Replaces a checkpoint's tensors by ``change`` of them."""
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_version_4(tensors):
    """transformers 5 saves what 4 saved but for one part of the tower's prefix."""
    return {name.replace("vision_tower.", "vision_tower.vision_model.", 1): x for name, x in tensors.items()}


def assert_same(found, expected):
    """Two dicts of arrays are equal bit by bit."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(x).tobytes(), name
