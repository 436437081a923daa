"""Sharding rules, and the runs on eight devices."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny import GQA, MHA, TWO_DROPS, VISION, llava_config, params_of

from pdrop_jax import sharding
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.lora import add_lora
from pdrop_jax.model.params import ParamSpec, abstract_params, path_name, spec_of
from pdrop_jax.model.placement import shardings
from pdrop_jax.model.quantization import quantize_decoder
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import OptimizerRecipe
from pdrop_jax.train.step import split

HERE = pathlib.Path(__file__).parent


SIGLIP = dataclasses.replace(VISION, kind="siglip")


def with_adapters(config):
    return jax.eval_shape(lambda params: add_lora(params, config, 2, 4.0), abstract_params(config))


@pytest.mark.parametrize("config", [llava_config(MHA), llava_config(GQA), LlavaConfig(SIGLIP, GQA, TWO_DROPS)])
def test_every_parameter_has_a_declaration_of_its_rank(config):
    for path, x in jax.tree.leaves_with_path(with_adapters(config)):
        assert len(spec_of(config, path_name(path)).axes) == x.ndim, path_name(path)


def test_a_quantized_kernel_is_sharded_as_the_kernel_and_its_scales_along_the_outputs():
    config, mesh = llava_config(MHA), jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
    params = jax.eval_shape(functools.partial(quantize_decoder, config), abstract_params(config))
    layer = shardings(config, params, mesh)["stages"]["0"]
    up, down, o = layer["mlp"]["up"]["kernel"], layer["mlp"]["down"]["kernel"], layer["attention"]["o"]["kernel"]
    spec = jax.sharding.PartitionSpec
    assert (up.qvalue.spec, up.scale.spec) == (spec(None, "fsdp", "tensor"), spec(None, None, "tensor"))
    assert (down.qvalue.spec, down.scale.spec) == (spec(None, "tensor", "fsdp"), spec(None, None, "fsdp"))
    assert (o.qvalue.spec, o.scale.spec) == (spec(None, "tensor", None, "fsdp"), spec(None, None, None, "fsdp"))


def test_adapters_are_sharded_as_their_kernel():
    config, mesh = llava_config(MHA), jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
    layer = shardings(config, with_adapters(config), mesh)["stages"]["0"]
    q, down = layer["attention"]["q"]["lora"], layer["mlp"]["down"]["lora"]
    spec = jax.sharding.PartitionSpec
    assert (q["a"].spec, q["b"].spec, q["scale"].spec) == (spec(None, "fsdp"), spec(None, None, "tensor"), spec())
    assert (down["a"].spec, down["b"].spec) == (spec(None, "tensor"), spec(None, None, "fsdp"))


def test_a_declaration_that_cannot_be_sharded_is_refused():
    with pytest.raises(ValueError, match="do not fit an array"):
        ParamSpec((8, 4), ("mlp", "vocab"), "normal", "llm", inputs=(0,))  # both along tensor
    with pytest.raises(ValueError, match="do not fit an array"):
        ParamSpec((8, 4), ("mlp",), "normal", "llm")
    with pytest.raises(KeyError, match=r"attention\.z"):
        spec_of(llava_config(), "stages.0.attention.z")


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_a_projector_of_any_depth_is_sharded_and_trained(num_layers):
    config = dataclasses.replace(llava_config(), projector_layers=num_layers)
    mesh = jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
    placed = shardings(config, abstract_params(config), mesh)["projector"]
    spec = jax.sharding.PartitionSpec
    kernels = [placed[f"linear_{n}"]["kernel"].spec for n in range(num_layers)]
    assert (
        kernels
        == [spec("fsdp", "tensor"), spec("tensor", "fsdp"), spec("fsdp", "tensor"), spec("tensor", "fsdp")][:num_layers]
    )
    optimizer = make_optimizer(config, OptimizerRecipe("muon"), 10)
    trained, frozen = split(config, params_of(config), ("projector",))
    state = optimizer.init(trained)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trained), state, trained)
    assert jax.tree.structure(updates) == jax.tree.structure(trained)
    assert not jax.tree.leaves(frozen["projector"])


def test_what_does_not_divide_is_not_cut():
    mesh = jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
    spec = sharding.partition((None, "model", "heads", None), (3, 32, 2, 16), mesh)
    assert spec == jax.sharding.PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(("rows", "axes"), [(8, ("fsdp", "tensor")), (6, ("fsdp",)), (3, None)])
def test_rows_are_sharded_over_as_many_devices_as_they_divide(rows, axes):
    mesh = jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
    expected = jax.sharding.PartitionSpec(axes) if axes else jax.sharding.PartitionSpec()
    assert sharding.partition(("rows", None), (rows, 7), mesh) == expected


def test_bad_meshes():
    with pytest.raises(UserError, match="the axes are data, fsdp, tensor"):
        sharding.make_mesh({"model": 1})
    with pytest.raises(UserError, match=r"needs 6 devices \(data 1 \* fsdp 3 \* tensor 2\), but there are 1"):
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
