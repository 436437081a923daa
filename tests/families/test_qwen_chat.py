"""Conversations about pictures of any size: as if everything was asked at once."""

import pytest
from checks import SAMPLING, at_once, check_conversation
from tiny_qwen import photo

from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.pretrained import load
from pdrop_jax.schedule import DropSchedule

TURNS = [("What?", photo(60, 200, 1)), ("And it?", None), ("Here?", photo(300, 90, 2)), ("So?", None)]


@pytest.mark.parametrize(
    ("kind", "schedule", "mode"),
    [
        ("qwen2_vl", DropSchedule((1, 3), (0.5, 0.2)), "rerank"),
        ("qwen2_5_vl", DropSchedule((1, 3), (0.5, 0.2), "dense"), "rerank"),
        ("qwen2_5_vl", DropSchedule.none(), "keep"),
        ("qwen3_vl", DropSchedule((1, 3), (0.5, 0.2)), "rerank"),
        ("qwen3_vl", DropSchedule((0,), (0.5,)), "rerank"),
        ("qwen3_vl", DropSchedule.none(), "keep"),
    ],
)
def test_a_conversation_is_answered_as_if_asked_at_once(kind, schedule, mode, folders):
    model = load(folders[kind][1], schedule=schedule)
    check_conversation(model, mode, TURNS)


def test_tokens_that_were_dropped_stay_dropped(folders):
    """The first turn is a prefill; afterwards the cache of every stage is only continued."""
    model = load(folders["qwen2_5_vl"][1], schedule=DropSchedule((1, 3), (0.5, 0.2)))
    session = Session(model, "keep")
    first = session.ask(*TURNS[0], SAMPLING)
    assert first.kept == at_once(model, Session(model), f"<image>{TURNS[0][0]}", [TURNS[0][1]]).kept[0]
    assert session.ask("And it?", None, SAMPLING).kept == first.kept
    both = session.ask(*TURNS[2], SAMPLING).kept
    assert [images[0] for images in both] == [images[0] for images in first.kept]
    assert [len(images[1]) for images in both] == [16, 6]  # of 11 x 3 tokens
