"""The other language models and the SigLIP tower beside transformers' torch classes, tiny and random, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import CROP, VOCAB, assert_close, decode_step, forward, llava_config, make_batch, params_of, prefill
from torch_weights import decoder_params, hf_inputs, llava_params, random, randomised, shapes, vision_params, weights

from pdrop_jax.batch import IGNORE, Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import llava_from_hf
from pdrop_jax.convert.hf_parts import text_from_hf, vision_from_hf
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.model.params import abstract_params, path_name
from pdrop_jax.model.stacking import restage
from pdrop_jax.model.vision import vision_features
from pdrop_jax.schedule import DropSchedule

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",  # the only one that shows its attention
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOW = 5
TEXTS = {
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2_tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_window": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, max_window_layers=0, sliding_window=WINDOW
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "mistral_window": transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "llama_3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
}


def language_model(name):
    """A torch language model, our config of it without drops, and our parameters of the same weights."""
    module = randomised(transformers.AutoModelForCausalLM.from_config(TEXTS[name]))
    text = text_from_hf(module.config.to_dict())
    config = llava_config(text, DropSchedule.none())
    params = {**params_of(config), **decoder_params(weights(module), text, "model.")}
    assert shapes(params) == shapes(abstract_params(config))
    return module, config, params


IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 15))
LENGTHS = (15, 9)


@pytest.mark.parametrize("name", TEXTS)
def test_language_model(name):
    module, config, params = language_model(name)
    batch = make_batch([row[:n].tolist() for row, n in zip(IDS, LENGTHS, strict=True)], Bucket(16, ()))
    ours = forward(config, params, batch).logits
    for b, n in enumerate(LENGTHS):
        assert_close(ours[b, :n], module(torch.tensor(IDS[b : b + 1, :n])).logits[0])


def test_decoding_slides_the_window_on():
    module, config, params = language_model("mistral_window")
    prompts = (3, 8)  # shorter and longer than the window
    batch = make_batch([row[:n].tolist() for row, n in zip(IDS, prompts, strict=True)], Bucket(8, ()))
    logits, state, _ = prefill(config, params, batch, new_slots=8)
    found = [logits]
    for step in range(6):
        tokens = np.array([IDS[b, n + step] for b, n in enumerate(prompts)], np.int32)
        logits, state = decode_step(config, params, tokens, state, jnp.int32(step))
        found.append(logits)
    for b, n in enumerate(prompts):
        theirs = module(torch.tensor(IDS[b : b + 1, : n + 6])).logits[0, n - 1 :]
        assert_close(np.stack(found)[:, b], theirs)


@pytest.mark.parametrize("name", ["mistral", "mistral_window"])
def test_scores_are_the_attention_of_the_next_layer(name):
    module, config, params = language_model(name)
    schedule = DropSchedule((1,), (0.5,))
    params = restage(params, config, schedule)
    config = dataclasses.replace(config, schedule=schedule)
    batch = make_batch([[1, -10, 5, 6]], Bucket(3, (10,)))
    out = forward(config, params, batch, keep_hidden=True)
    module.config.output_attentions = True
    theirs = module.model(inputs_embeds=torch.tensor(np.array(out.layer_inputs[0][0]))).attentions[1]  # (1, N, S, S)
    (drop,) = out.drops
    assert_close(drop.scores[0], theirs[0, :, -1].mean(0), atol=1e-6)
    assert (np.asarray(drop.scores[0]) > 0).sum() == (WINDOW if name == "mistral_window" else 13)


def siglip_config(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.SiglipVisionConfig(image_size=CROP, patch_size=4, **sizes, **changes)


@pytest.mark.parametrize("select_layer", [-1, -2, 1])
def test_siglip_tower(select_layer):
    module = randomised(transformers.SiglipVisionModel(siglip_config()))
    pixels = random(2, CROP, CROP, 3)
    theirs = module(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[select_layer]
    vision = vision_from_hf(module.config.to_dict())
    config = LlavaConfig(vision, schedule=DropSchedule.none(), select_layer=select_layer)
    params = vision_params(weights(module), vision, config.vision_layers)
    assert shapes(params) == shapes(abstract_params(config)["vision"])
    assert_close(jax.jit(vision_features, static_argnums=0)(config, params, pixels)[0], theirs)


@pytest.fixture(scope="module")
def qwen2_siglip():
    """A LLaVA of both, in torch, our config and our parameters."""
    module = randomised(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=siglip_config(vision_use_head=False),
                text_config=TEXTS["qwen2_tied"],
                image_token_index=VOCAB - 1,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                tie_word_embeddings=True,
            )
        )
    )
    config = llava_from_hf(module.config.to_dict(), schedule=DropSchedule.none())
    params = llava_params(weights(module), config)
    assert shapes(params) == shapes(abstract_params(config))
    return module, config, params


ROWS = [[1, 5, -16, 6, -16, 7, 8], [1, -16, 9, 4], [1, 3, 4, 10]]


def test_qwen2_with_siglip(qwen2_siglip):
    module, config, params = qwen2_siglip
    batch = make_batch(ROWS, Bucket(6, (16, 16)))
    theirs = module(**hf_inputs(batch, VOCAB - 1)).logits
    ours = forward(config, params, batch).logits
    for b, length in enumerate(batch.length):
        assert_close(ours[b, :length], theirs[b, :length])


def test_loss_and_gradients_of_qwen2_with_siglip(qwen2_siglip):
    module, config, params = qwen2_siglip
    batch = make_batch(ROWS, Bucket(6, (16, 16)))
    text = (batch.image_id == 0) & (np.arange(batch.bucket.slots) < batch.length[:, None])
    batch = dataclasses.replace(batch, labels=np.where(text, batch.token_ids, IGNORE).astype(np.int32))

    def mean_loss(params):
        return compute_loss(config, params, batch)[0] / count_targets(batch.labels)

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    module.requires_grad_(True)
    theirs = module(**hf_inputs(batch, VOCAB - 1), labels=torch.tensor(batch.labels, dtype=torch.long)).loss
    theirs.backward()
    assert_close(loss, theirs.detach(), atol=1e-5)
    # The tower's last norm runs in torch too, but into nothing.
    taken = {name: x for name, x in module.named_parameters() if "post_layernorm" not in name}
    like = llava_params({name: x.grad.numpy() for name, x in taken.items()}, config)
    jax.tree.map(lambda x, y: assert_close(x, y, atol=1e-4 * np.abs(y).max() + 1e-6), gradients, like)
    sizes = {path_name(path): np.abs(x).max() for path, x in jax.tree.leaves_with_path(like)}
    # A softmax does not feel a bias that all keys share.
    assert min(size for name, size in sizes.items() if not name.endswith("attention.k.bias")) > 1e-4
