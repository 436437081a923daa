"""Early compression in Qwen's towers, against transformers' own blocks with the module built of torch's classes."""

import functools

import jax
import numpy as np
import pytest
import torch
from tiny_qwen import PATCH, image_processor, photo, torch_model

from pdrop_jax.config import EarlyCompression, LlavaConfig
from pdrop_jax.convert.importer import write
from pdrop_jax.convert.sources import open_source
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen2_vl.inputs import order_inside
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model.compression import with_compression
from pdrop_jax.model.vision import tower_features
from pdrop_jax.schedule import DropSchedule

ROWS, COLUMNS = 8, 12  # patches of the picture: 2 x 3 tokens


def change(config):
    return with_compression(config, EarlyCompression(0))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def model(request, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / request.param
    write(open_source(folders[request.param][0], change=change), out)
    return request.param, load(out, schedule=DropSchedule((1,), (0.5,)))


def rope(at, head_dim):
    """cos and sin (n, head_dim) at rows and columns (n, 2)."""
    inverse = 1 / 10000 ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = (torch.as_tensor(at).float()[..., None] * inverse).flatten(1)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def module(block, x, position):
    """The compressor of patches (n, D), four of a square after each other."""
    x = x + block.attn(block.norm1(x), torch.arange(0, len(x) + 1, 4), position_embeddings=position)
    joined, mlp, norm = x.reshape(len(x) // 4, -1), block.mlp, block.norm2
    if hasattr(norm, "bias"):
        scale, bias = norm.weight.repeat(4), norm.bias.repeat(4)
        h = torch.nn.functional.layer_norm(joined, joined.shape[1:], scale, bias, norm.eps)
    else:
        h = torch.nn.functional.rms_norm(joined, joined.shape[1:], norm.weight.repeat(4), 1e-6)

    def first(linear):
        return torch.nn.functional.linear(h, torch.block_diag(*[linear.weight] * 4), linear.bias.repeat(4))

    def last(linear, y):
        return torch.nn.functional.linear(y, torch.cat([linear.weight] * 4, 1) / 4, linear.bias)

    if hasattr(mlp, "gate_proj"):
        fused = last(mlp.down_proj, torch.nn.functional.silu(first(mlp.gate_proj)) * first(mlp.up_proj))
    else:
        fused = last(mlp.linear_fc2, mlp.act_fn(first(mlp.linear_fc1)))
    return x.reshape(len(x) // 4, 4, -1).mean(1) + fused


@torch.no_grad()
def theirs(kind, picture, layout, window):
    """Features (6, D), and those of DeepStack's layers; patches are taken in our order, ``window`` at a time."""
    visual = torch_model(kind).model.visual
    found = image_processor(kind)(picture, return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, ROWS, COLUMNS]]
    r, c = layout[:, 0], layout[:, 1]
    ours = ((r // 2) * (COLUMNS // 2) + c // 2) * 4 + r % 2 * 2 + c % 2  # of a patch in transformers' order
    x = visual.patch_embed(found["pixel_values"])
    if kind == "qwen3_vl":  # with its positions, which the model adds between the two
        seen = []
        hook = visual.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        visual(found["pixel_values"], found["image_grid_thw"])
        hook.remove()
        (x,) = seen
    x, at = x[ours], torch.as_tensor(layout[:, :2]).float()
    n, early = len(x), []
    for number, block in enumerate(visual.blocks):
        full = kind == "qwen3_vl" or number in visual.fullatt_block_indexes
        size = len(x) if full else window * len(x) // n
        position = rope(at, x.shape[1] // 4)
        x = block(x, torch.arange(0, len(x) + 1, size), position_embeddings=position)
        if number == 0:
            x = module(block, x, position)
            at = at.reshape(-1, 4, 2).mean(1)
        elif kind == "qwen3_vl" and number in visual.deepstack_visual_indexes:
            early.append(visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)](x))
    return [visual.merger(x), *early]


def test_features_are_those_of_torch(model):
    kind, ours = model
    picture = photo(ROWS * PATCH[kind], COLUMNS * PATCH[kind], 1)
    batch = ours.processor(["What?"], [[picture]])
    assert (batch.image_id[0] == 1).sum() == 6
    layout = np.asarray(batch.patch_layout)[0].reshape(-1, batch.patch_layout.shape[-1])
    window = ours.config.vision.window_patches
    expected = theirs(kind, picture, layout[layout[:, 2] == 1], window)
    features = jax.jit(tower_features, static_argnums=0)(ours.config, ours.params, batch).tokens
    for pool, x in zip(np.split(np.asarray(features)[0], len(expected)), expected, strict=True):
        np.testing.assert_allclose(pool[:6], x.numpy(), atol=2e-4)


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_it_answers_with_drops(model):
    kind, ours = model
    answer = generate(ours, ["What?"], [photo(ROWS * PATCH[kind], COLUMNS * PATCH[kind], 1)], Sampling(2))
    assert answer.image_tokens == [[6]]
    assert [len(kept) for kept in answer.kept[0][0]] == [3]


def test_patches_of_a_square_follow_each_other():
    """The example of ``order_inside``."""
    config = change(LlavaConfig.qwen2_5_vl("7b")).vision
    assert order_inside(config).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert order_inside(LlavaConfig.qwen2_5_vl("7b").vision).tolist() == [0, 1, 2, 3]


def test_what_cannot_be_compressed_is_refused(folders):
    with pytest.raises(UserError, match="after layer 8 is too late: the output of layer 8"):
        with_compression(LlavaConfig.qwen3_vl("8b"), EarlyCompression(8))
    late = functools.partial(with_compression, compression=EarlyCompression(3))
    with pytest.raises(UserError, match="the vision tower runs layers 0 to 3, choose one of 0 to 2"):
        open_source(folders["qwen2_5_vl"][0], change=late)
