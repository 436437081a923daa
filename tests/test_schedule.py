"""DropSchedule and its plan: counts, lengths, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule, Stage, keep_count, keep_table


def test_the_paper_schedule_on_llava_1_5():
    plan = DropSchedule().plan(32, Bucket(64, (576,)))
    assert plan == (
        Stage(0, 8, 1.0, 64 + 576),
        Stage(8, 16, 0.5, 64 + 288),
        Stage(16, 24, 0.25, 64 + 144),
        Stage(24, 32, 0.125, 64 + 72),
    )


def test_quarters_are_the_papers_layers_at_its_depth():
    assert DropSchedule.quarters(32) == DropSchedule()
    assert DropSchedule.quarters(28).layers == (7, 14, 21)
    assert DropSchedule.quarters(4).layers == (1, 2, 3)


def test_quarters_are_at_layers_with_full_attention_where_others_have_windows():
    assert DropSchedule.quarters(34, range(5, 34, 6)).layers == (11, 17, 23)
    assert DropSchedule.quarters(8, (5,)) == DropSchedule((5,), (0.5,))


def test_none_is_one_stage_of_full_length():
    assert DropSchedule.none().plan(32, Bucket(64, (576,))) == (Stage(0, 32, 1.0, 640),)


def test_each_image_is_counted_alone():
    # int(5 * .5) + int(7 * .5) = 2 + 3, not int(12 * .5) = 6
    assert DropSchedule((1,), (0.5,)).plan(2, Bucket(4, (5, 7)))[1].slots == 4 + 2 + 3


def test_alignment_rounds_lengths_up():
    slots = [stage.slots for stage in DropSchedule().plan(32, Bucket(64, (576,)), align=128)]
    assert slots == [640, 384, 256, 256]


def test_a_drop_at_layer_0_leaves_the_first_stage_empty():
    first, second = DropSchedule((0,), (0.5,)).plan(4, Bucket(3, (8,)))
    assert (first.num_layers, first.slots) == (0, 11)
    assert (second.num_layers, second.slots) == (4, 7)


def test_a_ratio_of_0_keeps_the_text():
    assert DropSchedule((1,), (0.0,)).plan(2, Bucket(5, (8, 8)))[1].slots == 5


def test_counts_are_truncated_in_double_precision():
    assert keep_count(100, 0.29) == 28  # 100 * 0.29 is 28.999999999999996


@given(st.integers(0, 3000), st.floats(0, 1))
def test_the_table_holds_the_counts(n, ratio):
    assert keep_table(n, ratio)[n] == keep_count(n, ratio)


@given(st.integers(0, 3000), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_ratio_never_keeps_more(n, a, b):
    assert 0 <= keep_count(n, min(a, b)) <= keep_count(n, max(a, b)) <= n


def test_layer_ranges_cover_every_layer_once():
    ranges = DropSchedule((2, 3, 7), (0.9, 0.5, 0.1)).layer_ranges(9)
    assert [layer for start, stop in ranges for layer in range(start, stop)] == list(range(9))


def test_lists_become_tuples():
    schedule = DropSchedule([1, 2], [1, 0])
    assert schedule == DropSchedule((1, 2), (1.0, 0.0))
    assert hash(schedule) == hash(DropSchedule((1, 2), (1.0, 0.0)))


@pytest.mark.parametrize("positions", ["dense", "original"])
def test_json_round_trip(positions):
    schedule = DropSchedule((1, 5), (0.3, 0.1), positions)
    assert DropSchedule.from_json(schedule.to_json()) == schedule


def test_json_without_positions_is_what_suits_the_model():
    schedule = DropSchedule.from_json({"layers": [1], "ratios": [0.5]})
    mrope = TextConfig(mrope_sections=(16, 24, 24))
    assert schedule.positions == "auto"
    assert LlavaConfig(schedule=schedule).schedule.positions == "dense"
    assert LlavaConfig(text=mrope, schedule=schedule).schedule.positions == "original"
    renumbered = dataclasses.replace(schedule, positions="dense")
    assert LlavaConfig(text=mrope, schedule=renumbered).schedule.positions == "dense"


@pytest.mark.parametrize(
    ("layers", "ratios", "message"),
    [
        ((8, 16), (0.5,), "2 drop layers .* but 1 ratios"),
        ((8, 8), (0.5, 0.4), "must be ascending"),
        ((16, 8), (0.5, 0.4), "must be ascending"),
        ((-1, 8), (0.5, 0.4), "must be ascending"),
        ((8,), (1.5,), r"must be in 0\.\.1"),
        ((8,), (-0.1,), r"must be in 0\.\.1"),
        ((8,), (float("nan"),), r"must be in 0\.\.1"),
        ((8, 16), (0.5, 0.6), "must not increase"),
    ],
)
def test_a_wrong_schedule_is_refused(layers, ratios, message):
    with pytest.raises(UserError, match=message):
        DropSchedule(layers, ratios)


def test_unknown_positions_are_refused():
    with pytest.raises(UserError, match="'dense' or 'original', got 'sparse'"):
        DropSchedule((1,), (0.5,), "sparse")


def test_a_drop_after_the_last_layer_is_refused():
    with pytest.raises(UserError, match="drop after layer 32 in a decoder of 32 layers"):
        DropSchedule((32,), (0.5,)).plan(32, Bucket(4))
