"""Random torch models, and their weights as our parameter tree: written out by hand, apart from convert's tables."""

import jax
import numpy as np
import torch


def randomised(module):
    """``module`` with every parameter random, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = around + scale * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def random(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def weights(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def linear(w, name):
    """A torch linear layer as kernel (in, out) and, if there is one, bias."""
    bias = {"bias": w[f"{name}.bias"]} if f"{name}.bias" in w else {}
    return {"kernel": w[f"{name}.weight"].T, **bias}


def norm(w, name):
    return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}


def attention_params(w, prefix, output, H, qk_norm=False):
    def heads(x):
        return x.reshape(*x.shape[:-1], -1, H)

    projections = {name: jax.tree.map(heads, linear(w, f"{prefix}.{name}_proj")) for name in "qkv"}
    o = linear(w, f"{prefix}.{output}")
    norms = {name: {"scale": w[f"{prefix}.{name}.weight"]} for name in ("q_norm", "k_norm")} if qk_norm else {}
    return {**projections, **norms, "o": {**o, "kernel": o["kernel"].reshape(-1, H, o["kernel"].shape[-1])}}


def mlp_params(w, prefix=""):
    return {name: linear(w, f"{prefix}{name}_proj") for name in ("gate", "up", "down")}


def decoder_layer_params(w, H, prefix="", qk_norm=False):
    return {
        "attention_norm": {"scale": w[f"{prefix}input_layernorm.weight"]},
        "attention": attention_params(w, f"{prefix}self_attn", "o_proj", H, qk_norm),
        "mlp_norm": {"scale": w[f"{prefix}post_attention_layernorm.weight"]},
        "mlp": mlp_params(w, f"{prefix}mlp."),
    }


def vision_params(w, config, num_layers, prefix=""):
    def layer(n):
        at = f"{prefix}encoder.layers.{n}"
        return {
            "attention_norm": norm(w, f"{at}.layer_norm1"),
            "attention": attention_params(w, f"{at}.self_attn", "out_proj", config.head_dim),
            "mlp_norm": norm(w, f"{at}.layer_norm2"),
            "mlp": {"up": linear(w, f"{at}.mlp.fc1"), "down": linear(w, f"{at}.mlp.fc2")},
        }

    embeddings = f"{prefix}embeddings"
    embed = {
        "patch": {"kernel": w[f"{embeddings}.patch_embedding.weight"].transpose(2, 3, 1, 0)},
        "position": w[f"{embeddings}.position_embedding.weight"],
    }
    if config.kind == "siglip":
        embed["patch"]["bias"] = w[f"{embeddings}.patch_embedding.bias"]
    else:
        embed |= {"class_token": w[f"{embeddings}.class_embedding"], "norm": norm(w, f"{prefix}pre_layrnorm")}
    return {"embed": embed, "layers": stack([layer(n) for n in range(num_layers)])}


def projector_params(w, prefix=""):
    return {f"linear_{n}": linear(w, f"{prefix}linear_{n + 1}") for n in range(2)}


def stack(layers):
    return jax.tree.map(lambda *xs: np.stack(xs), *layers)


def decoder_params(w, text, prefix):
    """The language model's part of our tree, without stage boundaries."""
    H, places = text.head_dim, [f"{prefix}layers.{n}." for n in range(text.num_layers)]
    layers = [decoder_layer_params(w, H, place, text.qk_norm) for place in places]
    head = {} if text.tie_embeddings else {"head": linear(w, "lm_head")}
    return {
        "embed": {"embedding": w[f"{prefix}embed_tokens.weight"]},
        "stages": {"0": stack(layers)},
        "norm": {"scale": w[f"{prefix}norm.weight"]},
        **head,
    }


def llava_params(w, config):
    """The state dict of a LlavaForConditionalGeneration as our tree, without stage boundaries."""
    return {
        "vision": vision_params(w, config.vision, config.vision_layers, "model.vision_tower."),
        "projector": projector_params(w, "model.multi_modal_projector."),
        **decoder_params(w, config.text, "model.language_model."),
    }


def shapes(tree):
    return jax.tree.map(lambda x: x.shape, tree)


def hf_inputs(batch, image_token):
    """Our batch as keyword arguments of a LlavaForConditionalGeneration: pictures in the order of their tokens."""
    ids = np.where(batch.image_id > 0, image_token, batch.token_ids)
    mask = np.arange(batch.bucket.slots) < batch.length[:, None]
    used = [batch.crops[b, m] for b, row in enumerate(batch.image_id) for m in range(row.max())]
    pixels = np.stack(used).transpose(0, 3, 1, 2)
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "attention_mask": torch.tensor(mask, dtype=torch.long),
        "pixel_values": torch.tensor(pixels),
    }
