"""Every block and the whole dense model beside transformers' torch classes, on tiny random weights in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import CROP, IMAGE_TOKENS, VOCAB, assert_close, forward, llava_config, make_batch, params_of
from torch_weights import (
    decoder_layer_params,
    decoder_params,
    hf_inputs,
    llava_params,
    mlp_params,
    projector_params,
    random,
    randomised,
    shapes,
    vision_params,
    weights,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as HFLlavaConfig
from transformers.models.llama import modeling_llama as hf
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_parts import text_from_hf, vision_from_hf
from pdrop_jax.model import layers
from pdrop_jax.model.attention import attention
from pdrop_jax.model.params import abstract_params
from pdrop_jax.model.rope import _swap_by_product, _swap_halves, rope_tables, rotate
from pdrop_jax.model.stacking import restage
from pdrop_jax.model.vision import averaged, vision_features
from pdrop_jax.model.vlm import embed
from pdrop_jax.schedule import DropSchedule

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "bias": {"attention_bias": True},
    "head_dim": {"head_dim": 16},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {"rope_parameters": LLAMA3},
}


def texts(*names):
    return pytest.mark.parametrize("text", [TEXTS[name] for name in names], ids=names)


def llama_config(**changes):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        **changes,
    )
    config._attn_implementation = "sdpa"
    return config


def clip_config(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionConfig(image_size=CROP, patch_size=4, **sizes, **changes)


def test_rms_norm():
    module = randomised(hf.LlamaRMSNorm(32, eps=1e-2))
    x = random(2, 5, 32)
    ours = layers.rms_norm({"scale": weights(module)["weight"]}, x, 1e-2)
    assert_close(ours, module(torch.tensor(x)), atol=1e-5)


@texts(*TEXTS)
def test_rope_tables(text):
    config = llama_config(**{**text, "head_dim": 64})  # 32 wavelengths: some are stretched, some blended, some not
    positions = np.arange(200)[None]
    cos, sin = hf.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    ours = rope_tables(text_from_hf(config.to_dict()), positions)
    sign = np.repeat([-1, 1], 32)  # of the first half's sines, see ``rotate``
    assert_close(ours[0], cos)
    assert_close(ours[1] * sign, sin)


def test_halves_are_swapped_by_slices_as_by_a_product():
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(jax.random.key(0), (2, 3, 4, 64), dtype)
        np.testing.assert_array_equal(_swap_halves(x), _swap_by_product(x))
        np.testing.assert_array_equal(_swap_halves(x)[..., :32], x[..., 32:].astype(jnp.float32))


def test_rotate():
    config = llama_config()
    positions, q, k = np.array([[0, 1, 2, 7, 40]]), random(1, 5, 4, 8), random(1, 5, 4, 8)[::-1]
    tables = hf.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    theirs = hf.apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k.copy()), *tables, unsqueeze_dim=2)
    rope = rope_tables(text_from_hf(config.to_dict()), positions)
    assert_close(rotate(q, rope), theirs[0], atol=1e-5)
    assert_close(rotate(k, rope), theirs[1], atol=1e-5)


def attend(q, k, v):
    return attention(q, k, v, causal=True, implementation="xla"), None


def decoder_layer(text):
    """A torch decoder layer as a function of x, its config, and ours of the same weights."""
    config = llama_config(**text)
    module = randomised(hf.LlamaDecoderLayer(config, 0))
    ours = text_from_hf(config.to_dict())
    return module, ours, decoder_layer_params(weights(module), ours.head_dim)


def run_both(module, ours, params, x):
    positions = np.arange(x.shape[1])[None]
    tables = hf.LlamaRotaryEmbedding(module.self_attn.config)(torch.tensor(x), torch.tensor(positions))
    theirs = module(torch.tensor(x), position_embeddings=tables)
    layer = jax.jit(lambda params, x: layers.decoder_layer(ours, params, x, rope_tables(ours, positions), attend)[0])
    return layer(params, x), theirs


@texts("mha", "gqa", "mqa", "bias", "head_dim")
def test_attention(text):
    module, ours, params = decoder_layer(text)
    module.mlp.down_proj.weight.zero_()  # leaves x + attention(norm(x))
    params["mlp"]["down"]["kernel"] = np.zeros_like(params["mlp"]["down"]["kernel"])
    assert_close(*run_both(module, ours, params, random(2, 9, 32)), atol=1e-5)


def test_mlp():
    module = randomised(hf.LlamaMLP(llama_config()))
    x = random(2, 5, 32)
    assert_close(layers.gated_mlp(mlp_params(weights(module)), x), module(torch.tensor(x)), atol=1e-5)


@texts("mha", "gqa", "llama3")
def test_decoder_layer(text):
    assert_close(*run_both(*decoder_layer(text), random(2, 9, 32)), atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("select_layer", [-1, -2, 1])
def test_clip_tower(activation, select_layer):
    hf_config = clip_config(hidden_act=activation)
    module = randomised(CLIPVisionModel(hf_config))
    pixels = random(2, CROP, CROP, 3)
    theirs = module(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[select_layer]

    vision = vision_from_hf(hf_config.to_dict())
    config = LlavaConfig(vision, schedule=DropSchedule.none(), select_layer=select_layer)
    params = vision_params(weights(module), vision, config.vision_layers)
    ours = jax.jit(vision_features, static_argnums=0)(config, params, pixels)[0]
    assert_close(ours, theirs)


@pytest.mark.parametrize(("side", "stride"), [(4, 2), (5, 2), (7, 3), (3, 1)])
def test_frames_are_averaged_as_torch_pools_them(side, stride):
    x = random(2, 1 + side**2, 6)  # a class token in front
    grid = torch.tensor(x[:, 1:]).reshape(2, side, side, 6).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.avg_pool2d(grid, stride, stride).flatten(2).transpose(1, 2)
    assert_close(averaged(jnp.asarray(x), side, stride), theirs, atol=1e-6)


def test_projector_mlp2x_gelu():
    module = randomised(
        LlavaMultiModalProjector(HFLlavaConfig(vision_config=clip_config(), text_config=llama_config()))
    )
    x = random(2, 5, 16)
    ours = layers.projector(projector_params(weights(module)), x)
    assert_close(ours, module(torch.tensor(x)), atol=1e-5)


def test_projector_linear():
    module = randomised(torch.nn.Linear(16, 32))
    x = random(2, 5, 16)
    params = {"linear_0": {"kernel": weights(module)["weight"].T, "bias": weights(module)["bias"]}}
    assert_close(layers.projector(params, x), module(torch.tensor(x)), atol=1e-5)


WHOLE = {
    "mha": ({}, "default"),
    "gqa_bias": ({"num_key_value_heads": 2, "attention_bias": True}, "default"),
    "head_dim_llama3": ({"head_dim": 16, "rope_parameters": LLAMA3}, "default"),
    "tied": ({"tie_word_embeddings": True}, "default"),
    "class_token": ({}, "full"),
}


@pytest.mark.parametrize(("text", "strategy"), WHOLE.values(), ids=WHOLE)
def test_whole_model(text, strategy):
    n = IMAGE_TOKENS + (strategy == "full")  # with the class token
    hf_config = HFLlavaConfig(
        vision_config=clip_config(),
        text_config=llama_config(**text),
        image_token_index=VOCAB - 1,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    module = randomised(LlavaForConditionalGeneration(hf_config))
    config = LlavaConfig(
        vision_from_hf(hf_config.vision_config.to_dict()),
        text_from_hf(hf_config.text_config.to_dict()),
        DropSchedule.none(),
        keep_class_token=strategy == "full",
    )
    params = llava_params(weights(module), config)
    assert shapes(params) == shapes(abstract_params(config))

    rows = [[1, 5, -n, 6, -n, 7, 8], [1, -n, 9], [1, 3, 4, 10]]
    batch = make_batch(rows, Bucket(6, (n, n)), image_tokens=n)
    theirs = module(**hf_inputs(batch, VOCAB - 1)).logits
    ours = forward(config, params, batch).logits
    for b, length in enumerate(batch.length):
        assert_close(ours[b, :length], theirs[b, :length])


@pytest.mark.parametrize("positions", ["dense", "original"])
def test_layers_behind_a_drop_see_the_kept_tokens_at_their_positions(positions):
    module = randomised(hf.LlamaForCausalLM(llama_config()))
    text = text_from_hf(module.config.to_dict())
    config = llava_config(text, DropSchedule((0,), (0.5,), positions))  # before the first layer: nothing else differs
    decoder = decoder_params(weights(module), text, "model.")
    params = {**params_of(config), **restage(decoder, llava_config(text, DropSchedule.none()), config.schedule)}

    batch = make_batch([[1, -8, 5, 6]], Bucket(3, (8,)))
    out = forward(config, params, batch)
    n = int(out.buffer.length[0])
    index = np.asarray(out.buffer.index[0, :n])
    at = index if positions == "original" else np.arange(n)
    first = jax.jit(embed, static_argnums=(0, 3, 4))(config, params, batch, batch.bucket.slots, "xla")
    embedded = np.asarray(first.hidden)[:, index]
    theirs = module(inputs_embeds=torch.tensor(embedded), position_ids=torch.tensor(at)[None]).logits
    assert n == 3 + 4
    assert_close(out.logits[:, :n], theirs)
