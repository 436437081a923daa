"""Conversations about pictures of any size: as if everything was asked at once."""

import pytest
import tiny_qwen
from checks import SAMPLING, at_once, check_conversation
from tiny_qwen import photo

from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import DropSchedule

# The first two questions fit in a bucket, the third in a larger one.
TURNS = [("What is this?", [photo(60, 200, 1)]), ("Hm?", []), ("Here?", [photo(300, 90, 2)])]


def in_one_bucket(kind):
    """Turns that all fit in the bucket of the first one, so that few programs are compiled."""
    question = "Look closely. " * (5 if tiny_qwen.system_prompt(kind) else 8) + "What?"
    pictures = [photo(60, 200, 1), photo(200, 60, 2), photo(110, 120, 3)]
    return [(question, pictures), ("And it?", []), ("Here?", [photo(50, 190, 4)]), ("So?", [])]


@pytest.mark.parametrize(
    ("kind", "schedule", "mode"),
    [
        ("qwen2_vl", DropSchedule((0,), (0.5,), "dense"), "rerank"),
        ("qwen3_vl", DropSchedule((1, 3), (0.5, 0.2)), "rerank"),
        ("qwen3_vl", DropSchedule.none(), "keep"),
    ],
)
def test_a_conversation_is_answered_as_if_asked_at_once(kind, schedule, mode, folders):
    model = load(folders[kind][1], schedule=schedule)
    assert len(check_conversation(model, mode, in_one_bucket(kind))) == 1


def test_a_conversation_that_grows_is_answered_as_if_asked_at_once(folders):
    model = load(folders["qwen2_5_vl"][1], schedule=DropSchedule((1, 3), (0.5, 0.2)))
    assert len(check_conversation(model, "rerank", TURNS)) == 2


def test_tokens_that_were_dropped_stay_dropped(folders):
    """The first turn is a prefill; afterwards the cache of every stage is only continued."""
    model = load(folders["qwen2_5_vl"][1], schedule=DropSchedule((1, 3), (0.5, 0.2)))
    session = Session(model, "keep")
    first = session.ask(*TURNS[0], SAMPLING)
    assert first.kept == at_once(model, Session(model), f"<image>{TURNS[0][0]}", TURNS[0][1]).kept[0]
    assert session.ask(*TURNS[1], SAMPLING).kept == first.kept
    both = session.ask(*TURNS[2], Sampling(max_new_tokens=1)).kept
    assert [images[0] for images in both] == [images[0] for images in first.kept]
    assert [len(images[1]) for images in both] == [16, 6]  # of 11 x 3 tokens
