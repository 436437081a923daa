"""Training step, prefill and decode as programs of shapes alone, to be compiled for devices that are not there."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.generation import Sampling, State, decode, start
from pdrop_jax.model.params import abstract_params
from pdrop_jax.schedule import Bucket
from pdrop_jax.sharding import abstract, batch_sharding, partition

from .optimizer import make_optimizer
from .recipe import Optimizer
from .step import init_state, train_step

Mode = Literal["train", "prefill", "decode"]
GROUPS = ("projector", "llm")
QUERIES = 4  # query rows of a training row
CAPACITY = 128  # new tokens of an answer
STEPS = 1000  # of a training run; only its rates follow from it


def lowering(
    mode: Mode, config: LlavaConfig, mesh: Mesh, bucket: Bucket, rows: int, accumulate: int = 1
) -> Callable[[], Any]:
    """A function that lowers the program, bfloat16 with splash attention, for the devices of ``mesh``.

    Args:
      mode: "train" is the full fine-tune of projector and language model, with float32 masters and moments.
      rows: of a batch, all devices together.
      accumulate: parts that a training step's rows are cut into.
    """
    batch = abstract_batch(config, mesh, bucket, rows, training=mode == "train")
    program: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    if mode == "train":
        optimizer = make_optimizer(Optimizer(), STEPS)
        init = functools.partial(init_state, groups=GROUPS, optimizer=optimizer, dtype=jnp.bfloat16)
        train_state = abstract(jax.eval_shape(init, abstract_params(config)), mesh)
        program, arguments = train_step, (config, optimizer, train_state, batch)
        settings = {"accumulate": accumulate, "implementation": "splash"}
    else:
        params = abstract(abstract_params(config, jnp.bfloat16), mesh)
        greedy, stop = Sampling(np.float32(1), np.int32(0), np.float32(1), greedy=True), np.zeros(1, np.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        program, arguments = start, (config, params, batch, key, greedy, stop)
        settings = {"capacity": CAPACITY, "implementation": "splash"}
        if mode == "decode":
            state, _ = jax.eval_shape(functools.partial(start, config, **settings), *arguments[1:])
            program, settings = decode, {}
            arguments = config, params, _state_placed(state, mesh), np.int32(CAPACITY), greedy, stop

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return program.lower(*arguments, **settings)

    return lower


def abstract_batch(config: LlavaConfig, mesh: Mesh, bucket: Bucket, rows: int, training: bool) -> Batch:
    """Shapes of a batch that fills ``bucket``, its rows cut over the mesh."""
    where = batch_sharding(mesh, rows)

    def leaf(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    S, size = bucket.slots, config.vision.image_size
    crops = -(-sum(bucket.images) // config.image_tokens)
    return Batch(
        leaf(S),
        leaf(S),
        leaf(S),
        leaf(),
        leaf(crops, size, size, 3, dtype=jnp.float32),
        leaf(QUERIES if training else 1),
        leaf(S) if training else None,
        bucket,
    )


def _state_placed(state: State, mesh: Mesh) -> State:
    """Caches cut by rows and heads, everything else of a decode state whole."""

    def place(x: Any) -> Any:
        axes = (None, "batch", "heads", None, None) if x.ndim == 5 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition(axes, x.shape, mesh)))

    return jax.tree.map(place, state)
