"""Sharding rules, and the runs on eight devices."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from tiny import GQA, MHA, TWO_DROPS, VISION, llava_config, params_of

from pdrop_jax import sharding
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.lora import add_lora
from pdrop_jax.model.params import abstract_params, path_name
from pdrop_jax.model.quantization import quantize_decoder

HERE = pathlib.Path(__file__).parent


SIGLIP = dataclasses.replace(VISION, kind="siglip")


@pytest.mark.parametrize("config", [llava_config(MHA), llava_config(GQA), LlavaConfig(SIGLIP, GQA, TWO_DROPS)])
def test_every_parameter_has_one_row(config):
    params = jax.eval_shape(lambda params: add_lora(params, config, 2, 4.0), abstract_params(config))
    for path, x in jax.tree.leaves_with_path(params):
        assert len(sharding.logical_axes(path_name(path))) == x.ndim, path_name(path)


def test_a_quantized_kernel_is_cut_as_the_kernel_and_its_scales_along_the_outputs():
    mesh = jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
    params = jax.eval_shape(quantize_decoder, abstract_params(llava_config(MHA)))
    layer = sharding.shardings(params, mesh)["stages"]["0"]
    up, down, o = layer["mlp"]["up"]["kernel"], layer["mlp"]["down"]["kernel"], layer["attention"]["o"]["kernel"]
    spec = jax.sharding.PartitionSpec
    assert (up.qvalue.spec, up.scale.spec) == (spec(None, "fsdp", "tensor"), spec(None, None, "tensor"))
    assert (down.qvalue.spec, down.scale.spec) == (spec(None, "tensor", "fsdp"), spec(None, None, "fsdp"))
    assert (o.qvalue.spec, o.scale.spec) == (spec(None, "tensor", None, "fsdp"), spec(None, None, None, "fsdp"))


def test_every_row_is_of_some_parameter():
    config = llava_config(GQA)
    params = jax.eval_shape(lambda params: add_lora(params, config, 2, 4.0), abstract_params(config))
    names = {path_name(path) for path, _ in jax.tree.leaves_with_path(params)}
    used = {id(sharding.logical_axes(name)) for name in names}
    assert used == {id(axes) for axes in sharding.PARAMETERS.values()}


def test_a_table_that_is_wrong_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"0 rows of the sharding table fit stages\.0\.attention\.z"):
        sharding.logical_axes("stages.0.attention.z")
    monkeypatch.setattr(sharding, "PARAMETERS", {r"norm\..*": (None,), r".*\.scale": (None,)})
    with pytest.raises(ValueError, match="2 rows"):
        sharding.logical_axes("norm.scale")
    monkeypatch.setattr(sharding, "PARAMETERS", {r"head\.kernel": ("mlp", "vocab")})
    with pytest.raises(ValueError, match="along the same axis"):
        sharding.logical_axes("head.kernel")


def test_what_does_not_divide_is_not_cut():
    mesh = jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
    spec = sharding.partition((None, "model", "heads", None), (3, 32, 2, 16), mesh)
    assert spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_bad_meshes():
    with pytest.raises(UserError, match="give data, fsdp, tensor"):
        sharding.make_mesh({"model": 1})
    with pytest.raises(UserError, match=r"takes 6 devices \(data 1 \* fsdp 3 \* tensor 2\), there are 1"):
        sharding.make_mesh({"fsdp": 3, "tensor": 2})


def test_without_a_mesh_nothing_is_constrained():
    params = params_of(llava_config())
    x = params["norm"]["scale"]
    assert sharding.constrain(x, "model") is x


def test_on_eight_devices():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", HERE / "on_eight_devices.py"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
