"""What a schedule costs by the paper's formula, against its printed values, and schedules for a budget."""

import dataclasses

import pytest

from pdrop_jax.analysis.budget import schedule_for_budget
from pdrop_jax.analysis.cost import layer_tokens, paper_macs, token_bytes
from pdrop_jax.config import LlavaConfig, config_of
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import PRESETS, DropSchedule

SEVEN = LlavaConfig.llava_1_5_7b().text
THIRTEEN = LlavaConfig.llava_1_5_13b().text


def pyramid(ratio: float) -> DropSchedule:
    return DropSchedule((8, 16, 24), (ratio, ratio**2, ratio**3))


@pytest.mark.parametrize(
    ("config", "schedule", "tokens", "tera"),
    [
        (SEVEN, DropSchedule.none(), 576, 3.8172),
        (SEVEN, pyramid(0.4), 576, 1.5403),
        (SEVEN, pyramid(0.5), 576, 1.7774),
        (SEVEN, pyramid(0.6), 576, 2.0626),
        (SEVEN, DropSchedule.none(), 2880, 20.825),
        (SEVEN, pyramid(0.4), 2880, 8.219),
        (SEVEN, pyramid(0.5), 2880, 9.4646),
        (SEVEN, pyramid(0.6), 2880, 10.981),
        (SEVEN, DropSchedule.none(), 5184, 40.616),
        (SEVEN, pyramid(0.5), 5184, 18.076),
        (SEVEN, DropSchedule((2,), (0.5,)), 576, 2.0075),  # FastV
        (SEVEN, DropSchedule((2,), (0.5,)), 2880, 10.554),
        (SEVEN, DropSchedule.none(), 2048, 14.362),
        (SEVEN, pyramid(0.5), 2048, 6.582),
        (SEVEN, DropSchedule((2,), (0.5,)), 2048, 7.372),
        (SEVEN, DropSchedule((10, 20), (0.5, 0.25)), 576, 2.1342),
        (THIRTEEN, DropSchedule.none(), 576, 7.444),
    ],
)
def test_the_papers_values(config, schedule, tokens, tera):
    digits = len(str(tera).partition(".")[2])
    assert abs(paper_macs(config, schedule, tokens) / 1e12 - tera) <= 0.51 * 10**-digits


@pytest.mark.parametrize(("schedule", "average"), [(pyramid(0.5), 270), (DropSchedule((2,), (0.5,)), 306)])
def test_average_tokens(schedule, average):
    assert layer_tokens(SEVEN, schedule, 576) / 32 == average


# Of the paper's table: layers, and the ratio for an average of 192, 128 and 64 tokens.
FOR_TOKENS = {(8, 16, 24): (0.253, None, None), (2, 8, 16): (0.560, 0.420, 0.192), (2, 4, 6, 8): (0.696, 0.587, 0.369)}


@pytest.mark.parametrize(("layers", "ratios"), FOR_TOKENS.items())
@pytest.mark.parametrize(("column", "budget"), [(0, 192), (1, 128), (2, 64)])
def test_ratios_for_a_number_of_tokens(layers, ratios, column, budget):
    expected = ratios[column]
    if expected is None:
        with pytest.raises(UserError, match=r"dropping all image tokens there still costs 144; drop earlier or raise"):
            schedule_for_budget(SEVEN, average_tokens=budget, layers=layers)
        return
    schedule = schedule_for_budget(SEVEN, average_tokens=budget, layers=layers)
    assert schedule.layers == layers
    assert schedule.ratios[0] == pytest.approx(expected, abs=0.003)  # the table counts fractions of tokens
    assert budget - 1 < layer_tokens(SEVEN, schedule, 576) / 32 <= budget


@pytest.mark.parametrize(
    ("budget", "layers"), [(270, (8, 16, 24)), (192, (8, 16, 24)), (128, (2, 8, 16)), (64, (2, 4, 6, 8))]
)
def test_layers_are_as_late_as_a_gentle_drop_allows(budget, layers):
    assert schedule_for_budget(SEVEN, average_tokens=budget).layers == layers


def test_without_a_model_it_is_for_the_smallest_llava():
    assert schedule_for_budget(average_tokens=64) == schedule_for_budget(SEVEN, average_tokens=64)


def test_layers_follow_the_depth():
    assert schedule_for_budget(THIRTEEN, average_tokens=300).layers == (10, 20, 30)
    shallow = dataclasses.replace(SEVEN, num_layers=4)
    assert schedule_for_budget(shallow, average_tokens=160).layers == (1, 2, 3)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("qwen2.5-vl-7b", [(7, 14, 21), (2, 7, 14)]),
        ("qwen3-vl-8b", [(9, 18, 27), (2, 9, 18)]),
        ("qwen2.5-vl-72b", [(20, 40, 60), (5, 20, 40)]),
        ("gemma-3-12b", [(11, 23, 35), (5, 11, 23)]),  # global layers of Gemma 3, whose others have windows
        ("gemma-3-27b", [(17, 29, 47), (5, 17, 29)]),
    ],
)
def test_layers_follow_the_family(model, layers):
    text = config_of(model).text
    budgets = 256 / 2, 256 / 4
    assert [schedule_for_budget(text, average_tokens=each, image_tokens=256).layers for each in budgets] == layers


@pytest.mark.parametrize("name", ["macs", "cache_bytes"])
def test_other_budgets_give_the_schedule_of_that_cost(name):
    wanted = pyramid(0.5)
    cost = (
        paper_macs(SEVEN, wanted, 576) if name == "macs" else layer_tokens(SEVEN, wanted, 576) * token_bytes(SEVEN, 2)
    )
    assert schedule_for_budget(SEVEN, **{name: cost}).ratios[0] == pytest.approx(0.5, abs=0.0011)


def test_a_budget_that_holds_everything_drops_nothing():
    assert schedule_for_budget(SEVEN, average_tokens=576) == DropSchedule.none()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give exactly one budget, of average tokens, MACs or cache bytes: got 0"),
        ({"average_tokens": 64, "macs": 1e12}, "give exactly one budget, .*: got 2"),
        (
            {"average_tokens": 30},
            r"a budget of 30 average tokens cannot be met with drops after layers \[2, 4, 6, 8\]: dropping all "
            r"image tokens there still costs 36; drop earlier or raise the budget",
        ),
        ({"macs": 1e9}, r"a budget of 1,000,000,000 MACs cannot be met"),
        ({"average_tokens": 64, "layers": [40]}, "drop after layer 40 in a decoder of 32 layers"),
        ({"average_tokens": float("nan")}, "a budget of nan average tokens cannot be met"),
    ],
)
def test_budgets_that_cannot_be_had(budget, message):
    with pytest.raises(UserError, match=message):
        schedule_for_budget(SEVEN, **budget)


@pytest.mark.parametrize("tokens", [192, 128, 64])
def test_presets_average_what_they_say(tokens):
    average = layer_tokens(SEVEN, PRESETS[f"tokens-{tokens}"], 576) / 32
    assert average == pytest.approx(tokens, abs=0.6)
