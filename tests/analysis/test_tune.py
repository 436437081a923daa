"""Tuned schedules: the allocation's properties, the search, and what both measure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrop_jax.analysis.budget import Budget
from pdrop_jax.analysis.cost import paper_macs, token_bytes
from pdrop_jax.analysis.tune.allocation import (
    BudgetTooSmall,
    allocate,
    candidate_layers,
    drop_shares,
    rescaled_sensitivity,
)
from pdrop_jax.analysis.tune.search import Point, search
from pdrop_jax.analysis.tune.tune import _remembered
from pdrop_jax.config import TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

TEXT = TextConfig(num_layers=12)
TOKENS = 576


def mean_ratio(schedule, text=TEXT):
    ratios, ranges = (1.0, *schedule.ratios), schedule.layer_ranges(text.num_layers)
    return sum(ratio * (b - a) for ratio, (a, b) in zip(ratios, ranges, strict=True)) / text.num_layers


def at(layers):
    return DropSchedule(tuple(layers), (0.0,) * len(layers))


@given(
    st.lists(st.floats(0, 1), min_size=12, max_size=12),
    st.sets(st.integers(0, 11), min_size=1, max_size=8).map(sorted),
    st.floats(0.02, 0.98),
    st.sampled_from(["average tokens", "MACs", "cache bytes"]),
)
def test_an_allocation_is_monotone_and_meets_its_budget_exactly(sensitivity, layers, share, name):
    scaled = rescaled_sensitivity(sensitivity)
    assert ((scaled >= 0.1 - 1e-12) & (scaled <= 0.9 + 1e-12)).all()
    shares = drop_shares(scaled[layers])
    budget = Budget(name, share * Budget(name, 0).cost(TEXT, DropSchedule.none(), image_tokens=TOKENS))
    try:
        found = allocate(TEXT, at(layers), shares, budget, TOKENS)
    except BudgetTooSmall:
        assert mean_ratio(at(layers)) + 0.9 > share  # the layers before the drops cost something
        return
    ratios = np.array([1.0, *found.ratios])
    drops = -np.diff(ratios)
    assert (drops >= 0).all()
    assert 0 <= ratios[-1] <= 1
    np.testing.assert_allclose(drops, shares * drops.sum(), atol=1e-9)
    order = np.argsort(scaled[layers])
    assert (np.diff(drops[order]) <= 1e-9).all()  # more sensitive layers drop less
    if name == "MACs":
        assert paper_macs(TEXT, found, TOKENS) == pytest.approx(budget.value, rel=1e-9)
    else:
        one = token_bytes(TEXT, 2) * TEXT.num_layers if name == "cache bytes" else 1
        assert mean_ratio(found) * TOKENS * one == pytest.approx(budget.value, rel=1e-9)
    assert budget.cost(TEXT, found, image_tokens=TOKENS) <= budget.value * (1 + 1e-9)


def test_budgets_that_cannot_be_met():
    with pytest.raises(UserError, match=r"57.6 average tokens cannot be met with drops after layers \[6\].*costs 288;"):
        allocate(TEXT, at([6]), [1.0], Budget("average tokens", 57.6), TOKENS)
    with pytest.raises(
        UserError, match="a budget of 600 average tokens is met without drops, which cost 576: lower it"
    ):
        allocate(TEXT, at([6]), [1.0], Budget("average tokens", 600), TOKENS)


def test_candidates_are_where_text_attends_to_the_picture():
    attention = [0.9, 0.9, *[0.3] * 4, *[0.01] * 10]
    assert candidate_layers(attention) == (2, 3, 4, 5)
    assert candidate_layers([0.5] * 8) == (2, 3, 4, 5)
    with pytest.raises(UserError, match="a decoder of 3 layers has no candidates for drops: name layers"):
        candidate_layers([0.5] * 3)


def bowl(schedule):
    """Least where two drops are after layers 5 and 9, the first of which makes most of it."""
    drops = -np.diff([1.0, *schedule.ratios])
    return abs(schedule.layers[0] - 5) + abs(schedule.layers[1] - 9) + abs(drops[0] / drops.sum() - 0.8)


def test_a_search_descends_and_every_candidate_meets_the_budget():
    asked = []

    def objective(schedule):
        asked.append(schedule)
        return bowl(schedule)

    budget = Budget("average tokens", 0.6 * TOKENS)
    fields = DropSchedule((), (), score="norm")
    found, value = search(TEXT, Point((4, 8), (0.5, 0.5)), fields, budget, TOKENS, objective, rounds=3)
    assert (found.layers, found.score) == ((5, 9), "norm")
    assert value == bowl(found) < 0.2
    assert len(set(asked)) == len(asked)
    assert {round(mean_ratio(schedule), 9) for schedule in asked} == {0.6}


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    arguments = TEXT, Point((4, 8), (0.5, 0.5)), DropSchedule((), ()), Budget("average tokens", 0.6 * TOKENS), TOKENS

    def run(limit, identity="one"):
        count = 0

        def objective(schedule):
            nonlocal count
            if count == limit:
                raise KeyboardInterrupt
            count += 1
            return bowl(schedule)

        with _remembered(objective, identity, tmp_path / "out") as remembered:
            return search(*arguments, remembered)[0], count

    whole, all_of_them = run(None, "another model")
    with pytest.raises(KeyboardInterrupt):
        run(4)
    (file,) = tmp_path.iterdir()
    assert file.name == "out.search.unfinished"
    with file.open("ab") as torn:
        torn.write(b'{"answer_id": "torn')
    assert run(None) == (whole, all_of_them - 4)
