"""Scores of answer files, each benchmark's as LLaVA's evaluation scripts compute it."""

from .choices import score_scienceqa
from .files import Score
from .open_ended import score_gqa, score_textvqa, score_vqav2
from .yes_no import score_mme, score_pope

__all__ = ["Score", "score_gqa", "score_mme", "score_pope", "score_scienceqa", "score_textvqa", "score_vqav2"]
