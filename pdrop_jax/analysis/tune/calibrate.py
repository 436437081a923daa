"""What a calibration measures on samples: how far quantization moves each layer's input, and where text looks."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.eval.batching import plan_batches, read_batches
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import ROUNDED, on_devices, rows_on_devices
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.model.params import Params
from pdrop_jax.model.vlm import forward_hidden
from pdrop_jax.schedule import DropSchedule

ETA = 1e-6  # of the relative distance's denominator


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measurements on Q samples, all without drops.

    Attributes:
      sensitivity: (L,), median over samples of |x_q - x| / (|x| + eta), where x and x_q are the image tokens at the
        input of a layer in the model as it is and in the quantized one; before it is rescaled.
      attention: (L,), mean share of the attention of text tokens that image tokens get, in the quantized model.
      image_tokens: mean number of image tokens.
      samples: Q.
    """

    sensitivity: np.ndarray
    attention: np.ndarray
    image_tokens: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """A batch of samples; rows from ``rows`` on are padding."""

    batch: Batch
    rows: int


def read_samples(model: Model, questions: Sequence[Question], batch_size: int) -> list[Sample]:
    """The samples in batches; all pictures are in memory at once.

    Raises:
      UserError: a sample has no picture, or ``plan_batches`` or ``read_batches`` raises it.
    """
    without = next((question for question in questions if not question.images), None)
    if without:
        raise UserError(
            f"sample {without.id!r}{without.where and f', {without.where}'} has no picture: a schedule is calibrated "
            "on image tokens"
        )
    groups = plan_batches(model.processor, questions, batch_size, 1)
    batches = read_batches(model.processor, questions, groups, batch_size)
    return [Sample(batch, len(group.questions)) for group, batch in zip(groups, batches, strict=True)]


def calibrate(exact: Model, quantized: Model, samples: Sequence[Sample]) -> Calibration:
    """Runs the samples through the model as it is and as it is deployed.

    Args:
      exact, quantized: the same model; the same object if it is not quantized.
    """
    L = exact.config.text.num_layers
    # A drop in front of every layer that keeps all: its record has the attention of that layer.
    every = DropSchedule(tuple(range(L)), (1.0,) * L, exact.config.schedule.positions, "all_text")
    watched, dense = reschedule(quantized, every), reschedule(exact, DropSchedule.none())
    distances, attention, tokens = [], [], []
    quantized_at_all = quantized is not exact
    for sample in tqdm(samples, "calibrating", unit=" batches", disable=None):
        with on_devices(dense):
            batch = rows_on_devices(dense, sample.batch)
            moved, seen = jax.device_get(_measure(dense.config, dense.params, watched.config, watched.params, batch))
        distances.append(moved[:, : sample.rows] * quantized_at_all)  # else the rounding of two programs of one model
        attention.append(seen[:, : sample.rows])
        tokens.append((np.asarray(sample.batch.image_id)[: sample.rows] > 0).sum(1))
    return Calibration(
        np.median(np.concatenate(distances, axis=1), axis=1),
        np.concatenate(attention, axis=1).mean(1),
        round(np.concatenate(tokens).mean()),
        sum(sample.rows for sample in samples),
    )


@functools.partial(jax.jit, static_argnums=(0, 2), compiler_options=ROUNDED)
def _measure(
    dense: LlavaConfig, params: Params, watched: LlavaConfig, watched_params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Relative distance and attention, (L, B) each."""
    image = jnp.asarray(batch.image_id) > 0
    (exact,) = forward_hidden(dense, params, batch, keep_hidden=True).layer_inputs
    out = forward_hidden(watched, watched_params, batch, keep_hidden=True)
    assert exact is not None
    ours = jnp.concatenate([x for x in out.layer_inputs if x is not None])
    S = image.shape[1]

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt((jnp.square(x) * image[..., None]).sum((2, 3)))

    exact, ours = (x[:, :, :S].astype(jnp.float32) for x in (exact, ours))
    attention = jnp.stack([(drop.scores[:, :S] * image).sum(1) for drop in out.drops])
    return norm(ours - exact) / (norm(exact) + ETA), attention
