"""Scores of answer files, computed as the benchmarks' public evaluation scripts do."""

from pdrop_jax.eval.scoring.choices import score_scienceqa
from pdrop_jax.eval.scoring.files import ScoreReport
from pdrop_jax.eval.scoring.open_ended import score_gqa, score_textvqa, score_vqav2
from pdrop_jax.eval.scoring.yes_no import score_mme, score_pope

__all__ = ["ScoreReport", "score_gqa", "score_mme", "score_pope", "score_scienceqa", "score_textvqa", "score_vqav2"]
