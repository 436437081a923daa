"""How many questions a study needs: the power of its test on changed answers, simulated before a model is loaded."""

import numpy as np

from pdrop_jax.analysis.significance import LEVEL
from pdrop_jax.errors import UserError

STUDIES, RESAMPLES = 500, 1000
EFFECTS = (0.01, 0.02, 0.05, 0.1, 0.2)


def power_of(samples: int, baseline: float, effect: float, seed: int = 0) -> float:
    """Share of simulated studies in which a drop changes significantly more answers than a rewording does.

    The test is ``paired_bootstrap`` on the flip rate at p <= 0.05; its resamples draw the numbers of questions that
    only the drop, or only the rewording, changes. Whether one changes a question is independent of whether the other
    does, which is on the safe side. Questions are independent of each other: count pictures, not questions, if several
    questions about a picture are answered alike.

    Args:
      samples: questions.
      baseline: share of answers that the rewording changes.
      effect: by how much the drop changes more of them.

    Raises:
      UserError: a share is not in 0..1, or there are fewer than 2 questions.
    """
    target = baseline + effect
    _check(samples, baseline, target)
    rng = np.random.default_rng(seed)
    more, fewer = target * (1 - baseline), baseline * (1 - target)
    studies = rng.multinomial(samples, [more, fewer, 1 - more - fewer], STUDIES)
    drawn = rng.multinomial(samples, studies / samples, (RESAMPLES, STUDIES))
    difference = drawn[..., 0] - drawn[..., 1]
    p = np.minimum(1, 2 * np.minimum((difference <= 0).mean(0), (difference >= 0).mean(0)))
    return float((p <= LEVEL).mean())


def power_table(samples: int, baseline: float) -> str:
    """``power_of`` for some effects and numbers of questions, ``samples`` among them, as a Markdown table."""
    _check(samples, baseline, baseline)
    numbers = sorted({max(2, samples // 4), max(2, samples), 4 * samples})
    effects = [effect for effect in EFFECTS if baseline + effect <= 1]
    rows = [
        ["answers changed, %", *(f"{n:,} questions" for n in numbers)],
        ["---"] * (len(numbers) + 1),
        *([f"{100 * (baseline + x):g}", *(f"{power_of(n, baseline, x):.2f}" for n in numbers)] for x in effects),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _check(samples: int, baseline: float, target: float) -> None:
    if samples < 2 or not 0 <= baseline <= 1 or not 0 <= target <= 1:
        raise UserError(
            f"a power simulation needs at least 2 questions and shares in 0..1, got {samples} questions, a rewording "
            f"that changes {baseline:.0%} of the answers and a drop that changes {target:.0%}"
        )
