"""The demo task: photos, grids, questions, tokenizer, the untrained model and its evaluation."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from examples.demo import evaluate as evaluation
from examples.demo.dataset import write_dataset
from examples.demo.evaluate import LATER, Accuracy, draw_cases, table
from examples.demo.grids import KINDS, PATTERNS, SHIFT, SIDE, TURNS, Told, augment, converse, draw_grid, first_question
from examples.demo.model import SCHEDULE, demo_config, demo_params, position_table, write_start
from examples.demo.photos import GARMENTS, PIXELS, photos
from examples.demo.report import RunCost, cost_of, rows_of
from examples.demo.tokenizer import TEMPLATE, learn_tokenizer, write_tokenizer
from pdrop_jax.errors import UserError
from pdrop_jax.generation.pretrained import DEMO, load
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.messages import read_conversation
from pdrop_jax.inputs.prompts import LlavaTemplate
from pdrop_jax.inputs.tokenizer import load_tokenizer
from pdrop_jax.model.params import abstract_params, count, path_name
from pdrop_jax.schedule import DropSchedule

NAMES = [garment.name for garment in GARMENTS]
LABELS = np.array([[0, 1, 2, 3], [4, 4, 5, 5], [6, 7, 8, 9], [9, 9, 9, 9]])


def conversations(count, turns=TURNS):
    for number in range(count):
        rng = np.random.default_rng(number)
        labels = rng.integers(len(GARMENTS), size=list(PATTERNS)[number % len(PATTERNS)])
        labels = np.broadcast_to(labels, (SIDE, SIDE))
        yield labels, converse(labels, rng, turns)


def true_answer(labels, question):
    """The answer, found from the words of the question alone."""
    by = {words: label for label, g in enumerate(GARMENTS) for words in (g.noun, g.nouns)}
    if found := re.fullmatch(r"What is in row (\d), column (\d)\?", question):
        return NAMES[labels[int(found[1]) - 1, int(found[2]) - 1]]
    if found := re.fullmatch(r"What is in (row|column) (\d)\?", question):
        line = (labels if found[1] == "row" else labels.T)[int(found[2]) - 1]
        return ", ".join(NAMES[label] for label in line)
    if found := re.fullmatch(r"How many (.+) are there\?", question):
        return str((labels == by[found[1]]).sum())
    if found := re.fullmatch(r"Is there an? (.+) in row (\d)\?", question):
        return "yes" if by[found[1]] in labels[int(found[2]) - 1] else "no"
    found = re.fullmatch(r"In which row is the (.+)\?", question)
    (row,) = np.nonzero(labels == by[found[1]])[0]
    return str(row + 1)


def test_the_photos_are_those_of_the_splits():
    train, test = photos("train"), photos("test")
    assert train.shape == (10, 3000, PIXELS, PIXELS)
    assert test.shape == (10, 200, PIXELS, PIXELS)
    assert train.dtype == np.uint8
    # Trousers are narrow, bags are wide: the labels fit.
    lit = [(test[label] > 60).mean() for label in (NAMES.index("trousers"), NAMES.index("bag"))]
    assert lit[0] < lit[1]


def test_a_grid_is_drawn_again_the_same_and_holds_its_photos():
    grid = draw_grid("test", 3, 17)
    again = draw_grid("test", 3, 17)
    assert grid.picture.shape == (SIDE * PIXELS, SIDE * PIXELS)
    assert grid.picture.dtype == np.uint8
    np.testing.assert_array_equal(grid.picture, again.picture)
    assert (draw_grid("test", 3, 18).picture != grid.picture).any()
    assert (draw_grid("test", 4, 17).picture != grid.picture).any()
    for row, column in np.ndindex(SIDE, SIDE):
        cell = grid.picture[row * PIXELS :, column * PIXELS :][:PIXELS, :PIXELS]
        assert (photos("test")[grid.labels[row, column]] == cell).all((1, 2)).any()


def test_lines_of_training_pictures_may_be_alike():
    def pattern(labels):
        return tuple(1 if (labels == labels.take([0], axis)).all() else SIDE for axis in (0, 1))

    found = [pattern(draw_grid("train", 0, number).labels) for number in range(400)]
    assert set(found) == set(PATTERNS)
    for shape, share in PATTERNS.items():
        assert found.count(shape) / 400 == pytest.approx(share, abs=0.08)
    assert {pattern(draw_grid("test", 0, number).labels) for number in range(100)} == {(SIDE, SIDE)}


def test_training_photos_are_moved_and_turned_round_but_not_changed():
    photo = np.zeros((PIXELS, PIXELS), np.uint8)
    photo[8:20, 6] = 200
    photo[8, 6:20] = 100
    cells = augment(np.tile(photo, (SIDE, SIDE, 1, 1)), np.random.default_rng(0)).reshape(-1, PIXELS, PIXELS)
    found = set()
    for cell in cells:
        flipped = cell[12, :14].max() < 200
        upright = cell[:, ::-1] if flipped else cell
        top, left = (int(edge.min()) for edge in np.nonzero(upright))
        np.testing.assert_array_equal(np.roll(upright, (8 - top, 6 - left), (0, 1)), photo)
        found.add((flipped, top - 8, left - 6))
    assert len(found) > 10
    assert {flipped for flipped, _, _ in found} == {False, True}
    assert max(max(abs(y), abs(x)) for _, y, x in found) == SHIFT


def test_answers_are_true():
    asked = dict.fromkeys(KINDS, 0)
    for labels, turns in conversations(200):
        assert len(turns) == TURNS
        for turn in turns:
            assert turn.answer == true_answer(labels, turn.question)
            asked[turn.kind] += 1
    assert min(asked.values()) > 20
    assert asked["place"] > sum(asked.values()) / 2


def test_no_question_is_about_what_was_told():
    for _, turns in conversations(200):
        told = np.zeros((SIDE, SIDE), bool)
        for turn in turns:
            numbers = [int(n) - 1 for n in re.findall(r"\d", turn.question)]
            if turn.kind in ("place", "line"):
                column_only = turn.question.startswith("What is in column")
                place = (slice(None), *numbers) if column_only else tuple(numbers)
                assert not told[place].any()
                told[place] = True
            elif turn.kind == "presence":
                assert not told[numbers[0]].any()


def test_a_garment_is_asked_about_once():
    for _, turns in conversations(200):
        about = [
            label
            for turn in turns
            if turn.kind in ("count", "presence", "where")
            for label, g in enumerate(GARMENTS)
            if re.search(rf"(many {g.nouns} are|(a|an|the) {g.noun}\b)", turn.question)
        ]
        assert len(about) == sum(turn.kind in ("count", "presence", "where") for turn in turns)
        assert len(set(about)) == len(about)


def test_presence_is_as_often_true_as_not():
    rng = np.random.default_rng(0)
    turns = [first_question("presence", rng.integers(10, size=(4, 4)), rng) for _ in range(400)]
    assert 150 < sum(turn.answer == "yes" for turn in turns) < 250


def test_where_is_asked_of_what_is_there_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        turn = first_question("where", LABELS, rng)
        assert turn.answer == true_answer(LABELS, turn.question)
    assert first_question("where", np.zeros((4, 4), int), rng) is None


def test_a_told_place_is_not_asked_again():
    told = Told()
    told.places[:] = True
    assert all(KINDS["place"][0](LABELS, np.random.default_rng(n), told) is None for n in range(20))


def test_the_data_set(tmp_path):
    write_dataset(tmp_path / "three", 3, seed=5)
    write_dataset(tmp_path / "two", 2, seed=5)
    three = json.loads((tmp_path / "three" / "conversations.json").read_text())
    two = json.loads((tmp_path / "two" / "conversations.json").read_text())
    assert three[:2] == two
    assert len({record["id"] for record in three}) == 3
    for number, record in enumerate(three):
        grid = draw_grid("train", 5, number)
        with Image.open(tmp_path / "three" / "images" / record["image"]) as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[..., 1], grid.picture)
        messages = record["conversations"]
        assert [message["from"] for message in messages] == ["human", "gpt"] * TURNS
        assert [message["value"].count("<image>") for message in messages] == [1] + [0] * (2 * TURNS - 1)
        questions = [message["value"].removeprefix("<image>\n") for message in messages[::2]]
        assert [true_answer(grid.labels, question) for question in questions] == [m["value"] for m in messages[1::2]]


def test_bad_data_sets(tmp_path):
    with pytest.raises(UserError, match=r"pictures must be in 1\.\.\d+, got 0"):
        write_dataset(tmp_path / "none", 0)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="exists"):
        write_dataset(tmp_path / "here", 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def test_the_last_token_of_a_question_tells_what_is_asked_for(tokenizer):
    asked = {}
    for _, turns in conversations(2000):
        for turn in turns:
            about = re.findall(
                "|".join([r"\d", *(rf"\b{words}\b" for g in GARMENTS for words in (g.noun, g.nouns))]), turn.question
            )
            asked.setdefault(tokenizer(turn.question)["input_ids"][-1], set()).add((turn.kind, *about))
    assert all(len(questions) == 1 for questions in asked.values())
    assert len(asked) == 16 + 8 + 10 + 40 + 10


def test_every_garment_is_a_token(tokenizer):
    assert all(len(tokenizer(name)["input_ids"]) == 2 for name in NAMES)
    assert len(tokenizer) < 400


def test_the_tokens_of_a_conversation_begin_with_those_of_its_prompt(tokenizer):
    _, turns = next(conversations(1))
    exchanges = [(turn.question, turn.answer) for turn in turns]
    prompts = LlavaTemplate(tokenizer, TEMPLATE)
    whole = prompts.ids(read_conversation(exchanges, [None])[0])
    assert whole[:2] == [tokenizer.bos_token_id, IMAGE_PLACEHOLDER]
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in whole
    for number, (question, answer) in enumerate(exchanges):
        prompt = prompts.ids(read_conversation([*exchanges[:number], (question, None)], [None])[0])
        assert prompt == whole[: len(prompt)]
        rest = whole[len(prompt) :]
        ids = rest[: rest.index(tokenizer.eos_token_id)]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


def test_the_tokenizer_is_learned_again_the_same():
    assert learn_tokenizer().to_str() == learn_tokenizer().to_str()


def test_the_position_table_tells_places_apart():
    table = position_table(12, 128)
    assert table.shape == (145, 128)
    assert not table[0].any()
    places = table[1:]
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 99 * np.eye(144)
    assert apart.min() > 1
    np.testing.assert_array_equal(table[1][:64], table[2][:64])  # the same row
    np.testing.assert_array_equal(table[1][64:], table[13][64:])  # the same column


def test_the_demo_is_a_small_llava_with_three_drops():
    config = demo_config(SCHEDULE, 211)
    assert config.image_tokens >= 144
    assert 8 <= config.text.num_layers <= 12
    assert len(config.schedule.layers) >= 3
    assert 2 * count(abstract_params(config)) < 12e6  # bytes in bfloat16
    params = demo_params(config, seed=1)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    same = jax.tree.map_with_path(
        lambda path, a, b: (path_name(path), bool((a == b).all())), params, demo_params(config, 2)
    )
    moved = [name for name, equal in jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, tuple)) if not equal]
    assert "vision.embed.position" not in moved
    assert float(params["embed"]["embedding"].std()) == pytest.approx(1, abs=0.05)
    assert "embed.embedding" in moved


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "start"
    write_start(folder)
    return load(folder)


def test_the_start_is_a_checkpoint(start):
    assert start.config == demo_config()
    assert start.config.text.vocab_size == len(start.processor.tokenizer)
    assert start.processor.stop_ids == (2,)
    crops = start.processor(["What is in row 1?"], [draw_grid("test", 0, 0).picture]).crops
    assert crops.shape == (1, 1, 168, 168, 3)
    assert abs(crops.mean()) < 0.5
    assert 0.7 < crops.std() < 1.4


def test_cases_are_first_questions_to_test_photos():
    cases = draw_cases(20, seed=1)
    assert {case.kind for case in cases} == {*KINDS, LATER}
    assert sum(case.kind == "place" for case in cases) == 20
    for case in cases:
        *before, (question, answer) = case.turns
        assert answer is None
        assert len(before) == (TURNS - 1 if case.kind == LATER else 0)
        assert all(true for _, true in before)
        assert case.answer
        assert question


def test_evaluating_counts_exact_answers(start, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 8)
    guesses = evaluation.answer(start, draw_cases(1)[:2])
    assert len(guesses) == 2
    monkeypatch.setattr(
        evaluation, "answer", lambda model, cases: [case.answer * (case.kind != "count") for case in cases]
    )
    scores = {score.kind: score for score in evaluation.evaluate(start, 10)}
    assert scores["place"] == Accuracy("place", 10, 10)
    assert scores["count"] == Accuracy("count", 10, 0)
    text = table({"ours": list(scores.values())}, above=[["hours", "2"]])
    assert "| count, 10 asked | 0.0 % (0.0 to 27.8) |" in text
    assert text.startswith("|  | ours |\n| --- | --- |\n| hours | 2 |\n")


def test_the_model_that_is_shipped_answers(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 32)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 12e6
    model = load()
    assert model.config == demo_config()
    scores = {score.kind: score for score in evaluation.evaluate(model, 32)}
    assert scores["place"].share > 0.8  # docs/benchmarks.md has the figure for more than a hundred times as many
    left = evaluation.kept_of_place(model, 32)
    chance = [9 * ratio for ratio in model.config.schedule.ratios]
    assert all(ours > 1.5 * blind for ours, blind in zip(left, chance, strict=True))


def test_what_a_run_cost_is_in_its_log(tmp_path):
    step = {"loss": 1.0, "macs": 4e9}
    lines = [{"event": "compiled", "step": 1}, *({"step": n, "seconds": s, **step} for n, s in enumerate([9, 2, 1], 1))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cost = cost_of(tmp_path)
    assert cost == RunCost(steps=3, seconds=2, hours=12 / 3600, gmacs=4.0)
    assert rows_of([cost, cost])[1] == ["seconds a step", "2.00", "2.00"]
    with pytest.raises(
        UserError, match=r"is not the folder of a run: .*log\.jsonl cannot be read: there is no such file"
    ):
        cost_of(tmp_path / "none")


def test_damaged_lines_of_a_log_cost_nothing(tmp_path, capsys):
    whole = {"step": 1, "loss": 1.0, "macs": 4e9, "seconds": 2}
    damaged = [b"null", b"5", b"{}", b'{"step": 2, "lo\xffss": 1.0}', b"[" * 10_000]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([json.dumps(whole).encode(), *damaged]))
    assert cost_of(tmp_path).steps == 1
    assert capsys.readouterr().err == f"warning: 5 damaged lines of {tmp_path}/log.jsonl are ignored\n"


@pytest.mark.parametrize(("pictures", "seed"), [(0, 0), (-1, 0), (10**9, 0), (1, -1), (1, 2**63)])
def test_numbers_out_of_range(tmp_path, pictures, seed):
    with pytest.raises(UserError, match=r"(pictures|seed) must be in \d+\.\.\d+, got"):
        evaluation.draw_cases(pictures, seed)
    with pytest.raises(UserError, match=r"(pictures|seed) must be in \d+\.\.\d+, got"):
        write_dataset(tmp_path / "data", pictures, seed)
    assert not (tmp_path / "data").exists()


def test_the_interval_is_wilsons():
    low, high = Accuracy("place", 1000, 880).interval
    assert (round(low, 4), round(high, 4)) == (0.8584, 0.8987)
    assert Accuracy("place", 10, 10).interval[1] == pytest.approx(1)


def test_another_schedule():
    dense = demo_config(DropSchedule.none(), 211)
    assert dataclasses.replace(dense, schedule=SCHEDULE) == demo_config(SCHEDULE, 211)
