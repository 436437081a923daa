"""How far int8 weights are from bfloat16 weights, on pictures that the demo model was not trained on.

The bfloat16 model answers greedily. Then each contender reads the same questions and the same
answers, and its next-token distributions are compared: KL(bfloat16 || contender) in nats, and the best token. Finally
each contender answers on its own. float32 is the baseline: it shows the effect of rounding to bfloat16 alone.

    python -m benchmarks.quantized                  # five or six questions about each of 200 pictures
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from examples.demo.evaluate import BATCH, NEW_TOKENS, Case, draw_cases
from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.generation.engine import generate_batch
from pdrop_jax.generation.pretrained import DEMO, Model, load
from pdrop_jax.generation.result import Generation
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model.vlm import decode_step, prefill

CONTENDERS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8 weights": {"dtype": "bfloat16", "quantize": "int8"},
    "float32": {"dtype": "float32"},
}


@dataclasses.dataclass(frozen=True)
class Flags:
    model: pathlib.Path = DEMO
    pictures: int = 200
    seed: int = 0


def main(flags: Flags) -> None:
    """Prints a table with one column per contender."""
    models = {name: load(flags.model, **options) for name, options in CONTENDERS.items()}
    first = next(iter(models))
    cases = draw_cases(flags.pictures, flags.seed)
    found: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in models}
    for start in tqdm(range(0, len(cases), BATCH), unit=" batches", disable=None):
        group = cases[start : start + BATCH]
        batch = models[first].processor([case.turns for case in group], [case.picture for case in group])
        said = answer(models[first], batch)
        tokens, used = table_of(said)
        expected = follow(models[first].config, models[first].params, batch, tokens)
        for name, model in models.items():
            ours = follow(model.config, model.params, batch, tokens)
            kl, same = jax.device_get(compare(expected, ours))
            found[name].append((kl[used], same[used], *compare_answers(said, answer(model, batch), group)))
    print_table(models, {name: [np.concatenate(x) for x in zip(*parts, strict=True)] for name, parts in found.items()})


def answer(model: Model, batch: Batch) -> Generation:
    return generate_batch(model, batch, Sampling(NEW_TOKENS))


def table_of(said: Generation) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, T) int32, and which of them (B, T) were generated, the stop token (written as 0) included."""
    tokens = np.zeros((len(said.token_ids), NEW_TOKENS), np.int32)
    for row, ids in zip(tokens, said.token_ids, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in said.token_ids])
    return tokens, np.arange(NEW_TOKENS) <= lengths[:, None]


@functools.partial(jax.jit, static_argnums=0)
def follow(config: LlavaConfig, params: Any, batch: Batch, tokens: jax.Array) -> jax.Array:
    """Log probabilities (B, T, V) of the next token, before each of ``tokens`` (B, T)."""
    T = tokens.shape[1]
    first, state, _ = prefill(config, params, batch, T)

    def step(state: Any, n: jax.Array) -> tuple[Any, jax.Array]:
        logits, state = decode_step(config, params, tokens[:, n], state, n)
        return state, logits

    _, later = jax.lax.scan(step, state, jnp.arange(T - 1))
    return jax.nn.log_softmax(jnp.concatenate([first[None], later]).swapaxes(0, 1))


@jax.jit
def compare(expected: jax.Array, ours: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(expected || ours) of log probabilities (B, T, V), and whether the best token is the same; (B, T) each."""
    kl = jnp.sum(jnp.exp(expected) * (expected - ours), axis=-1)
    return kl, expected.argmax(-1) == ours.argmax(-1)


def compare_answers(said: Generation, ours: Generation, cases: list[Case]) -> tuple[np.ndarray, ...]:
    """For each row: same answer, right answer, and the share of equal image tokens in the last stage."""
    rows = zip(said.texts, ours.texts, cases, said.kept, ours.kept, strict=True)
    return tuple(
        np.transpose([(a == b, b == case.answer, np.isin(x[-1][0], y[-1][0]).mean()) for a, b, case, x, y in rows])
    )


def print_table(models: dict[str, Model], found: dict[str, list[np.ndarray]]) -> None:
    def row(label: str, column: int, form: str) -> list[str]:
        return [label, *(format(parts[column].mean(), form) for parts in found.values())]

    kl, _, same, *_ = next(iter(found.values()))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(model.params)) for model in models.values()]
    largest = [f"{parts[0].max():.1e}" for parts in found.values()]
    rows = [
        ["", *found],
        ["---"] * (len(found) + 1),
        ["parameters", *(f"{size / 1e6:.1f} MB" for size in sizes)],
        row(f"KL of {len(kl):,} next tokens, mean", 0, ".1e"),
        ["largest", *largest],
        row("the same best token", 1, ".2%"),
        row(f"the same answer, of {len(same):,}", 2, ".2%"),
        row("the right answer", 3, ".1%"),
        row("the same image tokens in the last stage", 4, ".1%"),
    ]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
