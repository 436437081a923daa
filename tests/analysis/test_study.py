"""``pdrop study`` on the first layers of the demo model: that settings do what they say, and its page in a browser."""

import dataclasses
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from pdrop_jax.analysis.asking import Asked, ask, depths, donors
from pdrop_jax.analysis.settings import DENSE, StudyOptions, possible_scores
from pdrop_jax.analysis.study import SAMPLED, run_study
from pdrop_jax.analysis.study_report import report
from pdrop_jax.errors import UserError
from pdrop_jax.eval.batching import plan_batches
from pdrop_jax.eval.questions import read_questions
from pdrop_jax.generation.pretrained import load, reschedule
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import DropSchedule

GRIDS = pathlib.Path(__file__).parents[2] / "examples" / "grids"
ASKED = read_questions(GRIDS / "questions.jsonl", GRIDS)
QUESTIONS = ASKED[:3] + ASKED[5:8]  # about two pictures
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def model(short_demo):
    return load(short_demo)


@pytest.fixture(scope="module")
def study(model):
    options = StudyOptions(layers=[1], ratios=[0.0, 1.0], scores=["pyramiddrop"], edit_sizes=[25, 60, 200], draws=2)
    return run_study(model, QUESTIONS, options, batch_size=3)


def asked(model, questions, rows, max_new_tokens=1, given=None):
    groups = list(enumerate(plan_batches(model.processor, questions, rows, max_new_tokens)))
    found = {}
    for numbers, answers in ask(model, questions, groups, rows, Sampling(max_new_tokens), given):
        found |= dict(zip(numbers, answers, strict=True))
    return [found[n] for n in range(len(questions))]


def row(study, name):
    (found,) = [row for row in study.rows if row.setting.name == name]
    return found


def test_every_group_is_there(study):
    names = {group: [row.setting.name for row in study.group(group)] for group in ("one drop", "scores", "controls")}
    assert names == {
        "one drop": ["layer 1, ratio 0", "layer 1, ratio 1"],
        "scores": ["pyramiddrop"],
        "controls": ["another question's tokens", "picture downsampled", "no image"],
    }
    noise = ["nothing", "float32", "other words", "reworded by 25 %", "reworded by 200 %", SAMPLED]  # none is of 60 %
    assert [row.setting.name for row in study.group("noise")] == noise
    assert (study.questions, study.pictures, study.image_tokens) == (len(QUESTIONS), 2, 144)


def test_keeping_everything_changes_nothing_and_no_image_changes_most(study):
    kept, gone = row(study, "layer 1, ratio 1"), row(study, "no image")
    assert kept.flipped.value == 0
    assert kept.kl.value < row(study, "float32").kl.value
    assert gone.flipped.value >= 0.5
    assert gone.kl.value > 1
    assert gone.average_tokens == gone.macs == 0
    assert gone.beyond == {"flipped": ["nothing", "float32"], "kl": ["nothing", "float32", "other words"]}
    assert row(study, "nothing").beyond == {"flipped": [], "kl": []}
    assert row(study, "layer 1, ratio 0").average_tokens == 144 / 3


def test_a_downsampled_picture_has_about_as_many_tokens_as_a_layer_sees(study):
    assert row(study, "pyramiddrop").average_tokens == 84
    assert row(study, "picture downsampled").average_tokens == 81  # 9 x 9
    assert row(study, "picture downsampled").macs > row(study, "no image").macs == 0
    assert 0 < row(study, "picture downsampled").jsd.value < np.log(2)


def test_a_drop_is_as_large_as_a_rewording(study):
    """Sizes are those of the rewordings that were found; the demo model's tokenizer has few tokens a question."""
    small, large = row(study, "reworded by 25 %"), row(study, "reworded by 200 %")
    assert [round(x.rewording.value) for x in (small, large)] == [100, 200]
    assert row(study, "layer 1, ratio 1").rewording.value == 0
    gone = row(study, "no image")
    assert (gone.flipped.value > large.flipped.value) == (gone.rewording.value == np.inf)
    assert row(study, SAMPLED).kl.value == 0 <= row(study, SAMPLED).flipped.value <= 1


def test_every_effect_is_tested_against_every_rewording(study):
    tests = row(study, "no image").tests
    assert list(tests) == ["other words", "reworded by 25 %", "reworded by 200 %"]
    metrics = ["JSD", "KL", "flip rate", "mutual information", "phi", "log-probability of the answer"]
    assert [[test.metric for test in found] for found in tests.values()] == [metrics] * 3
    flips = tests["other words"][2]
    words = row(study, "other words")
    assert flips.difference == pytest.approx(row(study, "no image").flipped.value - words.flipped.value)
    assert flips.corrected == min(1, 6 * flips.p)
    assert words.tests == {}


def test_right_answers_are_those_of_the_file(model, study):
    answers = asked(reschedule(model, DENSE), QUESTIONS, 5, 16)
    right = [answer.text == question.fields["answer"] for answer, question in zip(answers, QUESTIONS, strict=True)]
    assert study.right.value == pytest.approx(np.mean(right))
    assert 0 < sum(right) <= len(QUESTIONS)


def test_another_questions_tokens_are_its_tokens(model):
    """The score "given" keeps exactly what the other question of the picture kept."""
    own = asked(model, QUESTIONS[:3], 3)
    changed = reschedule(model, dataclasses.replace(model.config.schedule, score="given"))
    donor = donors([answer.image_tokens for answer in own], ["one picture"] * 3)
    borrowed = asked(changed, QUESTIONS[:3], 4, given={n: depths(own[donor[n]]) for n in range(3)})
    assert [answer.kept for answer in borrowed] == [own[n].kept for n in (1, 2, 0)]
    assert own[0].kept != own[1].kept


def test_a_question_borrows_from_its_own_picture_if_it_can():
    assert donors([[3], [3], [3], [5]], ["a", "b", "a", "c"]) == [2, 2, 0, 3]
    assert [x.tolist() for x in depths(Asked("", np.zeros(1), [[[0, 1]], [[1]]], [5]))] == [[1, 2, 0, 0, 0]]


def test_scores_that_can_rank(model):
    assert "cls" in possible_scores(model, model.config.schedule)
    at_0 = possible_scores(model, DropSchedule((0,), (0.5,)))
    assert not {"v2drop", "fastv", "none", "given"} & set(at_0)
    assert "pyramiddrop" in at_0


def test_as_json(study):
    data = json.loads(json.dumps(study.as_json()))
    assert "Infinity" not in json.dumps(data)
    assert "NaN" not in json.dumps(data)
    assert data["schedule"] == {"layers": [1, 2], "ratios": [0.5, 0.25], "positions": "dense"}
    first = data["rows"][0]
    assert first["setting"]["schedule"]["layers"] == [1]
    assert first["flipped"]["value"] == pytest.approx(np.mean(first["effect"]["flipped"]))
    assert len(first["effect"]["kl"]) == len(first["effect"]["right"]) == len(QUESTIONS)


def test_a_quantized_model_is_its_own_reference(study, short_demo):
    """Its drops and noises are compared with what it answers itself, of which float32 changes all but the kernels."""
    of = load(short_demo, quantize="w8a8", quantize_cache="int8")
    options = StudyOptions(layers=[1], ratios=[1.0], scores=["pyramiddrop"], edit_sizes=[])
    found = run_study(of, QUESTIONS, options, batch_size=3)
    assert (study.dtype, found.dtype) == ("bfloat16", "bfloat16, w8a8, int8 cache")
    assert not row(found, "layer 1, ratio 1").effect.flipped.any()
    ours, theirs = (row(each, "pyramiddrop").effect.kl for each in (found, study))
    assert np.all(np.isfinite(ours))
    assert not np.allclose(ours, theirs, rtol=1e-3)
    assert row(found, "float32").effect.kl.mean() > 0


def test_without_answers_and_other_words(model):
    bare = [dataclasses.replace(question, fields={}) for question in QUESTIONS[:2]]
    found = run_study(model, bare, StudyOptions(layers=[], scores=[]), batch_size=2, max_new_tokens=1)
    assert found.right is None
    assert [row.setting.name for row in found.group("noise")] == ["nothing", "float32"]
    assert all(not row.tests and row.rewording is None for row in found.rows)


class Page(html.parser.HTMLParser):
    """What a page would fetch, and its cells."""

    def __init__(self, text):
        super().__init__()
        self.fetched = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_the_page_needs_no_network(model, study):
    page = report(study, model, [dataclasses.replace(QUESTIONS[0], text="What is in row 1, column 1? <b>")])
    fetched = Page(page).fetched
    assert sum(each.startswith("data:image/png;base64,") for each in fetched) == 2
    assert all(each.startswith(("data:", "#")) for each in fetched)
    assert not re.findall(r"url\((?!#)", page)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_the_page_in_a_browser(model, study, tmp_path):
    """Both pictures and the chart are drawn, nothing is asked of a network, nothing goes wrong."""
    look = """<script>
    const images = [...document.images].map(i => i.naturalWidth > 300 && i.clientWidth > 300);
    const chart = document.querySelector("svg").getBoundingClientRect();
    const fetched = performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length;
    document.title = JSON.stringify({images, chart: chart.width > 500 && chart.height > 150, fetched,
        rows: document.querySelectorAll("table tr").length, wide: document.documentElement.scrollWidth > innerWidth});
    </script>"""
    path = tmp_path / "page.html"
    path.write_text(report(study, model, QUESTIONS[:1]).replace("</body>", look + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, *offline, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])
    rows = len(study.rows) + 2 * 4  # a head and the dense row in each of four tables
    rows += 3 * (1 + 4)  # a head, a score and three controls in each table of tests
    assert found == {"images": [True, True], "chart": True, "fetched": 0, "rows": rows, "wide": False}


def test_a_bad_schedule_is_found_before_any_answer(model):
    with pytest.raises(UserError, match="none before layer 0"):
        run_study(model, QUESTIONS, StudyOptions(DropSchedule((0,), (0.5,)), scores=["v2drop"]))
