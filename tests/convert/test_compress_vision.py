"""``pdrop convert --compress-vision``: the tower and its gradients are those of the same module in torch."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from tiny_torch import tiny_llava

from pdrop_jax import checkpoint
from pdrop_jax.config import EarlyCompression, LlavaConfig
from pdrop_jax.convert.importer import write
from pdrop_jax.convert.sources import open_source
from pdrop_jax.convert.upload import write_card
from pdrop_jax.model.compression import with_compression
from pdrop_jax.model.vision import vision_features

K = 1  # of 4 layers, of which 3 run


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    """transformers' model, with 4 x 4 patches, and its folder."""
    root = tmp_path_factory.mktemp("compress") / request.param
    model = tiny_llava(siglip=request.param == "siglip", patch_size=7)
    model.save_pretrained(root)
    return model, root


class Module(torch.nn.Module):
    """The compressor between layers of transformers' tower, with weights of the layer in front."""

    def __init__(self, layer):
        super().__init__()
        D, F = layer.mlp.fc1.in_features, layer.mlp.fc1.out_features
        self.layer_norm1, self.self_attn, self.act = layer.layer_norm1, layer.self_attn, layer.mlp.activation_fn
        self.norm = torch.nn.LayerNorm(4 * D, layer.layer_norm2.eps)
        self.fc1, self.fc2 = torch.nn.Linear(4 * D, 4 * F), torch.nn.Linear(4 * F, D)
        with torch.no_grad():
            self.norm.weight.copy_(layer.layer_norm2.weight.repeat(4))
            self.norm.bias.copy_(layer.layer_norm2.bias.repeat(4))
            self.fc1.weight.copy_(torch.block_diag(*[layer.mlp.fc1.weight] * 4))
            self.fc1.bias.copy_(layer.mlp.fc1.bias.repeat(4))
            self.fc2.weight.copy_(torch.cat([layer.mlp.fc2.weight] * 4, dim=1) / 4)
            self.fc2.bias.copy_(layer.mlp.fc2.bias)

    def forward(self, x, side):
        skipped, x = x[:, : -(side**2)], x[:, -(side**2) :]
        N, _, D = x.shape
        windows = torch.nn.functional.unfold(x.transpose(1, 2).reshape(N, D, side, side), 2, stride=2)
        windows = windows.reshape(N, D, 4, -1).permute(0, 3, 2, 1)  # (N, windows, patches, D)
        flat = windows.reshape(-1, 4, D)
        flat = flat + self.self_attn(self.layer_norm1(flat))[0]
        y = flat.reshape(windows.shape)
        fused = self.fc2(self.act(self.fc1(self.norm(y.flatten(2)))))
        return torch.cat([skipped, y.mean(2) + fused], dim=1)


def test_the_tower_and_its_gradients_are_those_of_torch(folder, tmp_path):
    model, source = folder
    change = functools.partial(with_compression, compression=EarlyCompression(K), merge_size=1)
    write(open_source(source, change=change), tmp_path / "out")
    config, params = checkpoint.load(tmp_path / "out")
    assert (config.vision_layers, config.image_tokens) == (3, 4)
    pixels = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal((2, config.vision.class_tokens + 4, 32)).astype(np.float32)

    def loss(vision):
        features = vision_features(config, vision, pixels).tokens
        return (features * weight).sum(), features

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params["vision"])
    tower = model.model.vision_tower
    x = tower.embeddings(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    x = tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x
    for layer in tower.encoder.layers[: K + 1]:
        x = layer(x, attention_mask=None)
    module = Module(tower.encoder.layers[K])
    x = module(x, 4)
    x = tower.encoder.layers[K + 1](x, attention_mask=None)
    np.testing.assert_allclose(ours, x.detach().numpy(), atol=2e-4)
    (x * torch.from_numpy(weight)).sum().backward()

    found = flatten_dict(jax.tree.map(np.asarray, gradients), sep=".")
    assert all(np.abs(g).max() > 0 for name, g in found.items() if not name.endswith("k.bias"))  # softmax ignores it
    for ours, theirs in {
        "compressor.mlp.up.kernel": module.fc1.weight.grad.T,
        "compressor.mlp.down.kernel": module.fc2.weight.grad.T,
        "compressor.mlp_norm.scale": module.norm.weight.grad,
        "later_layers.mlp.up.kernel": tower.encoder.layers[K + 1].mlp.fc1.weight.grad.T[None],
    }.items():
        expected = theirs.numpy()
        np.testing.assert_allclose(found[ours], expected, atol=2e-4 * np.abs(expected).max(), err_msg=ours)
    # In torch the layer and the module share these weights; here they only begin alike.
    shared = tower.encoder.layers[K].self_attn.out_proj.weight.grad.numpy().T.reshape(4, 8, 32)
    both = found["layers.attention.o.kernel"][K] + found["compressor.attention.o.kernel"]
    np.testing.assert_allclose(both, shared, atol=2e-4 * np.abs(shared).max())


def test_the_command_converts_and_refuses(folder, tmp_path, pdrop, fails):
    _, source = folder
    result = pdrop("convert", source, tmp_path / "out", "--compress-vision", 0)
    assert result.code == 0
    assert "train the model before use" in result.stdout
    config = LlavaConfig.load(tmp_path / "out")
    assert config.vision.early_compression == EarlyCompression(0)
    assert config.image_tokens == 1  # 16 times fewer
    assert "no other library can load" in fails("export", tmp_path / "out", tmp_path / "hf", "--format", "hf")
    assert "no other library can load" in fails("export", tmp_path / "out", tmp_path / "hf", "--format", "original")
    exported = pdrop("export", tmp_path / "out", tmp_path / "ours", "--format", "pdrop")
    assert "no other library can load" in exported.stdout
    write_card(tmp_path / "ours", tmp_path / "out", "me/compressed", "pdrop")
    assert "No other library can load" in (tmp_path / "ours" / "README.md").read_text()
    line = fails("convert", source, tmp_path / "no", "--compress-vision", 2)
    assert "early compression after layer 2 leaves no layer behind it: the vision tower runs layers 0 to 2" in line
    data = json.loads((source / "config.json").read_text())
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps(data | {"vision_config": data["vision_config"] | {"image_size": 21}}))
    line = fails("convert", odd, tmp_path / "no", "--compress-vision", 0)  # it has no weights to read either
    assert "3 patches a side (21 pixels in patches of 7)" in line
    line = fails("convert", source, tmp_path / "no", "--compress-vision", 0, "--check")
    assert "leave out --check" in line
    assert not (tmp_path / "no").exists()
    assert dataclasses.replace(config.vision, early_compression=None, merge_size=1) == open_source(source).config.vision
