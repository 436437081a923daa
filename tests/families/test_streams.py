"""Streams of models whose positions and windows go by more than slots: a bank that keeps all tokens changes nothing."""

import pytest
from checks import SAMPLING
from tiny_qwen import photo

from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.pretrained import load
from pdrop_jax.schedule import DropSchedule

FRAMES = [photo(60, 90, number) for number in range(4)]


@pytest.mark.parametrize(("kind", "mode"), [("qwen2_5_vl", "rerank"), ("gemma3", "keep")])
def test_a_frame_in_the_bank_is_where_it_was(kind, mode, folders, gemma):
    """With a bank that keeps all tokens, a short window gives the answer of one that holds every frame."""
    schedule = DropSchedule((1, 3), (0.5, 0.2)) if kind.startswith("qwen") else None
    model = load(gemma[1] if kind == "gemma3" else folders[kind][1], schedule=schedule)
    short, long, plain = (Session(model, mode) for _ in range(3))
    short.watch(FRAMES[:1], window=1, bank=1000, ratio=1.0, question="What?")
    long.watch(FRAMES[:1], window=4, question="What?")
    assert short.ask("What?", sampling=SAMPLING).token_ids == plain.ask("What?", FRAMES[0], SAMPLING).token_ids
    assert (short.watch(FRAMES[1:]).bank, long.watch(FRAMES[1:]).bank) == (3, 0)
    answers = [session.ask("So?", sampling=SAMPLING) for session in (short, long)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].stage_lengths == answers[1].stage_lengths
