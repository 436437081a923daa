"""``pdrop cost``: its table, JSON and plot."""

import json

import pytest
from PIL import Image


@pytest.fixture
def cost(pdrop):
    """What ``pdrop cost`` prints."""

    def run(*arguments):
        result = pdrop("cost", *arguments)
        assert result.code == 0, result
        return result.stdout

    return run


def test_the_command_prints_both_sides(cost):
    out = cost("--model", "llava-1.5-7b")
    assert "| image tokens | 576 | 576 -> 288 -> 144 -> 72 |" in out
    assert "| MACs by the paper's formula | 3.817 T | 1.777 T (46.6%) |" in out
    assert "--layers 8 16 24 --ratios 0.5 0.25 0.125" in out


def test_the_command_finds_a_schedule_and_its_flags_say_the_same(cost):
    out = cost("--model", "llava-1.5-13b", "--average-tokens", "128")
    flags = out.splitlines()[-1].split()
    assert cost("--model", "llava-1.5-13b", *flags) == out


def test_the_command_as_json(cost):
    found = json.loads(cost("--model", "llava-next-7b", "--image-tokens", "2880", "--json"))
    dense, dropped = found["costs"]
    assert dense["paper_macs"] == pytest.approx(20.825e12, rel=1e-4)
    assert dropped["paper_macs"] == pytest.approx(9.4646e12, rel=1e-4)
    assert dropped["prefill"]["total"] == sum(v for k, v in dropped["prefill"].items() if k != "total")
    assert dense["text_macs"] < dropped["prefill"]["decoder"] < dense["prefill"]["decoder"]


def test_a_score_that_asks_every_word_ranks_at_a_higher_price(cost):
    plain, every = (
        json.loads(cost("--score", name, "--json"))["costs"][1]["prefill"]["ranking"]
        for name in ("pyramiddrop", "all_text")
    )
    assert plain < every
    found = json.loads(cost("--layers", "tokens-64", "--score", "norm", "--json"))["costs"][1]
    assert found["prefill"]["ranking"] == 0


def test_a_plot_of_the_costs(tmp_path, cost):
    cost("--plot", str(tmp_path / "cost.png"))
    assert Image.open(tmp_path / "cost.png").size == (1350, 525)
    assert [path.name for path in tmp_path.iterdir()] == ["cost.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "nowhere is not a checkpoint: it has no config.json"),
        (("--average-tokens", "64", "--ratios", "0.5"), "a budget determines the ratios: leave out --ratios"),
        (("--average-tokens", "64", "--layers", "8", "16"), "a budget of 64 average tokens cannot be met"),
        (("--average-tokens", "64", "--macs", "1e12"), "give exactly one budget"),
        (("--image-tokens", "0"), "--image-tokens and --text-tokens must be at least 1, got 0 and 64"),
        (("--score", "pyramid"), "unknown score 'pyramid': did you mean 'pyramiddrop'?"),
        (("--plot", "cost.txt"), "cost.txt: the name ends in '.txt', expected .png, .svg, .pdf"),
    ],
)
def test_bad_input(arguments, message, fails):
    assert message in fails("cost", *arguments)
