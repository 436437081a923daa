"""Tiny PyTorch models, and what tests do to their files."""

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
VARIANTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2, "head_dim": 16},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "bias": {"num_key_value_heads": 2, "attention_bias": True},
}


def tiny_llava(**text):
    """A random LlavaForConditionalGeneration; norms and biases are random too, or a forgotten one would not show."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=14
    )
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = transformers.LlamaConfig(vocab_size=71, max_position_embeddings=128, **sizes, **text)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=70)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return model


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
