"""Scores of answer files, computed as the benchmarks' public evaluation scripts do."""

import os

from pdrop_jax.errors import UserError
from pdrop_jax.eval.benchmarks import Benchmark
from pdrop_jax.eval.scoring.choices import score_scienceqa
from pdrop_jax.eval.scoring.files import ScoreReport
from pdrop_jax.eval.scoring.open_ended import score_gqa, score_textvqa, score_vqav2
from pdrop_jax.eval.scoring.yes_no import score_mme, score_pope

__all__ = [
    "ScoreReport",
    "score",
    "score_gqa",
    "score_mme",
    "score_pope",
    "score_scienceqa",
    "score_textvqa",
    "score_vqav2",
]


def score(
    benchmark: Benchmark,
    answers: str | os.PathLike,
    annotations: str | os.PathLike,
    *,
    questions: str | os.PathLike | None = None,
    split: str = "test",
) -> ScoreReport:
    """Scores an answer file by the rules of a benchmark.

    Args:
      questions: the question file, which POPE needs.
      split: of ScienceQA.

    Raises:
      UserError: see the function of the benchmark; or the questions of POPE are missing.
    """
    if benchmark == "pope":
        if questions is None:
            raise UserError("pope needs the question file with the category of each question")
        return score_pope(answers, questions, annotations)
    if benchmark == "scienceqa":
        return score_scienceqa(answers, annotations, split)
    others = {"textvqa": score_textvqa, "gqa": score_gqa, "vqav2": score_vqav2, "mme": score_mme}
    return others[benchmark](answers, annotations)
