"""The model that lmms-eval asks, without lmms-eval: its two base modules are stood in for."""

import importlib
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_start

from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import DropSchedule, parse_schedule


class Base:
    def __init__(self):
        self.rank = 0
        self.cached = []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *call: self.cached.append(call))


@pytest.fixture(scope="module")
def lmms():
    standing_in = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": object},
        "lmms_eval.api.model": {"lmms": Base},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in standing_in.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("pdrop_jax.eval.lmms")
    sys.modules.pop("pdrop_jax.eval.lmms")


def test_requests_are_answered_in_their_order(lmms, tmp_path, monkeypatch):
    monkeypatch.setattr(lmms, "WINDOW", 1)  # a batch at a time
    model = lmms.PdropJax(str(write_start(tmp_path / "model")), layers="1/2", ratios="0.5/0.25", batch_size="2")
    assert model.model.config.schedule == DropSchedule((1, 2), (0.5, 0.25), "dense")
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (30, 30, 3), np.uint8)) for n in range(5)]
    model.task_dict = {"task": {"test": [[picture] for picture in pictures]}}
    short, long = {"max_new_tokens": 3, "until": ["\n"], "temperature": 0, "top_p": None}, {"max_new_tokens": 6}
    requests = [
        types.SimpleNamespace(args=(f"What is {n}?", long if n == 2 else short, lambda doc: doc, n, "task", "test"))
        for n in range(5)
    ]
    texts = model.generate_until(requests)
    for n, text in enumerate(texts):
        tokens = 6 if n == 2 else 3
        expected = generate(model.model, [f"What is {n}?"] * 2, [pictures[n]] * 2, Sampling(tokens))
        assert text == expected.texts[0]
    assert len(set(texts)) > 2
    assert sorted(call[1][0] for call in model.cached) == [f"What is {n}?" for n in range(5)]


@pytest.mark.parametrize(
    ("layers", "ratios", "schedule"),
    [
        (None, None, None),
        ("none", None, DropSchedule.none()),
        (8, 0.5, DropSchedule((8,), (0.5,))),  # as lmms-eval reads layers=8,ratios=0.5
        ("8/16", "0.5/0.25", DropSchedule((8, 16), (0.5, 0.25))),
    ],
)
def test_schedules_in_model_args(lmms, layers, ratios, schedule):
    assert parse_schedule(lmms.words(layers), lmms.words(ratios)) == schedule


@pytest.mark.parametrize(("layers", "ratios"), [("8/x", "0.5/0.2"), ("8", None), (None, 0.5), ("8/16", 0.5)])
def test_odd_schedules_in_model_args(lmms, layers, ratios):
    with pytest.raises(UserError):
        parse_schedule(lmms.words(layers), lmms.words(ratios))


def test_what_a_task_asks_for(lmms):
    assert lmms.sampling_of({}) == Sampling(128)
    assert lmms.sampling_of({"temperature": 0.7, "do_sample": False, "top_p": 0.9}) == Sampling(128)
    drawn = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9}
    assert lmms.sampling_of(drawn | {"top_k": None, "num_beams": 1}) == Sampling(**drawn)


def test_other_kinds_of_requests_are_refused(lmms):
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(UserError, match="choose tasks that generate_until"):
            getattr(lmms.PdropJax, name)(None, [])
