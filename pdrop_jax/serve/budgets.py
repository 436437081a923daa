"""Drop budgets by their names, and a model with each of them over the same weights."""

import re
from collections.abc import Sequence

import jax

from pdrop_jax.analysis.budget import schedule_for_budget
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.schedule import PRESETS, DropSchedule

OWN, DENSE = "own", "dense"
_TOKENS = re.compile(r"tokens-([1-9]\d{0,6})")


def parse_budget(name: str, config: LlavaConfig) -> DropSchedule:
    """The schedule that a budget names.

    "own" is the model's, "dense" drops nothing. "paper" and "tokens-N", an average of N image tokens over the layers,
    are the presets of ``schedule`` for a decoder like theirs; for another one "tokens-N" is
    ``analysis.budget.schedule_for_budget``. "8,16:0.5,0.25" are layers and ratios.

    Raises:
      UserError: there is no such budget, or it cannot be met.
    """
    if name == OWN:
        return config.schedule
    if name == DENSE:
        return DropSchedule.none()
    made_for = config.text.num_layers == 32 and config.image_tokens == 576
    if name in PRESETS and (made_for or not _TOKENS.fullmatch(name)):
        return PRESETS[name]
    if found := _TOKENS.fullmatch(name):
        return schedule_for_budget(config.text, average_tokens=int(found[1]), image_tokens=config.image_tokens)
    layers, colon, ratios = name.partition(":")
    try:
        if not colon:
            raise ValueError
        return DropSchedule(tuple(map(int, layers.split(","))), tuple(map(float, ratios.split(","))))
    except UserError:
        raise
    except ValueError:
        raise UserError(
            f"unknown schedule {name!r}: write {OWN}, {DENSE}, paper, tokens-N, or LAYERS:RATIOS such as 8,16:0.5,0.25"
        ) from None


def models_for(model: Model, names: Sequence[str]) -> dict[str, Model]:
    """``model`` with each budget. Weights are shared where the platform holds them layer by layer, on CPUs and GPUs."""
    return {name: reschedule(model, parse_budget(name, model.config)) for name in dict.fromkeys(names)}


def copied_bytes(models: Sequence[Model]) -> int:
    """Bytes of weights that are held more than once, because these models cut their stacks at different layers."""
    arrays = {id(leaf): leaf for model in models for leaf in jax.tree.leaves(model.params)}
    once = sum(leaf.nbytes for leaf in jax.tree.leaves(models[0].params))
    return sum(leaf.nbytes for leaf in arrays.values()) - once
