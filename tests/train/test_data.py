"""Data sets: what is left out and why, what an epoch is made of, and that batches come again exactly."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import pickle
import shutil
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pdrop_jax.batch import IGNORE
from pdrop_jax.config import LlavaConfig, TextConfig, Tiling, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.result import kept_tokens
from pdrop_jax.inputs import Processor, assemble
from pdrop_jax.inputs.chat_template import token_ids
from pdrop_jax.inputs.images import open_image, to_crop
from pdrop_jax.model.loss import compute_loss
from pdrop_jax.model.params import abstract_params
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.data.batches import MEGA, Sizes, batches_of, shapes_of
from pdrop_jax.train.data.pipeline import open_dataset, pipeline
from pdrop_jax.train.data.ragged import Ragged, RaggedBuilder
from pdrop_jax.train.recipe import DataRecipe

TOKENIZER = pathlib.Path(__file__).parents[2] / "examples/tiny_tokenizer"
CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=28, patch_size=14),
    text=TextConfig(vocab_size=320, num_layers=4, max_length=256),
    schedule=DropSchedule.none(),
)
B = 4
TINY = dataclasses.replace(  # one that runs
    CONFIG,
    vision=VisionConfig(28, 7, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),
    text=TextConfig(320, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_length=256),
    schedule=DropSchedule((1,), (0.5,)),
)


def record(number, image=True, turns=1, words=1):
    """A record whose first answer names it."""
    conversation = []
    for turn in range(turns):
        question = "<image>\nWhat?" if image and not turn else "What?"
        conversation.append({"from": "human", "value": question})
        conversation.append({"from": "gpt", "value": " ".join([f"n{number}", *["word"] * words])})
    return {"id": number, "conversations": conversation} | ({"image": f"{number % 5}.png"} if image else {})


def write(folder, records, lines=False, **settings):
    """A data set below ``folder`` whose pictures 0.png to 4.png are of one colour each."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(5):
        Image.new("RGB", (30, 20), (40 * number, 0, 0)).save(folder / f"images/{number}.png")
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    (folder / "data.json").write_text(text)
    asked = {"template": "mistral_instruct", "max_length": 200, "text_buckets": (32, 64, 128), **settings}
    return DataRecipe(conversations=str(folder / "data.json"), images=str(folder / "images"), **asked)


def opened(folder, records, **settings):
    return open_dataset(write(folder, records, **settings), CONFIG, TOKENIZER)


def mixed(count=30):
    return [record(n, image=n % 3 > 0, turns=1 + n % 4, words=n % 7) for n in range(count)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("data"), mixed())


@pytest.fixture(scope="module")
def grouped(dataset):
    return dataclasses.replace(dataset, data=dataclasses.replace(dataset.data, group_by_length=True))


def of_pictures(counts):
    """Sizes of so many pictures of each row, of one crop and four tokens each."""
    return Ragged(np.tile([1, 4], counts.sum()), 2 * np.cumsum([0, *counts]))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_tiles_are_planned_by_the_heads_of_the_files(tmp_path):
    config = dataclasses.replace(CONFIG, tiling=Tiling.next(28))
    data = write(tmp_path, mixed())
    Image.new("RGB", (60, 60)).save(tmp_path / "images/1.png")
    (tmp_path / "images/2.png").write_text("no picture")
    dataset = open_dataset(data, config, TOKENIZER)
    assert dataset.invalid == {"corrupt image": sum(n % 3 > 0 and n % 5 == 2 for n in range(30))}
    numbers = [n for n in range(30) if n % 3 == 0 or n % 5 != 2]
    expected = {True: (5, 4 + 20), False: (3, 4 + 2 * 5)}  # the whole; lines of two tiles and a newline
    for row, n in enumerate(numbers):
        size = dataset.sizes.images[row].tolist()
        assert size == (list(expected[n % 5 == 1]) if n % 3 else [])
        images = dataset.row(row)[0].images
        assert [n for x in images for n in (len(x.crops), len(x))] == size
    for step in itertools.islice(iter(pipeline(dataset, B, 0, 5)), 5):
        assert step.batch.crops.shape[1] == step.batch.bucket.crops in (0, 3, 5)


@pytest.mark.parametrize("lines", [False, True])
def test_rows_are_what_was_written(tmp_path, lines):
    dataset = opened(tmp_path, mixed(), lines=lines)
    processor = Processor.load(TOKENIZER, CONFIG)
    assert len(dataset) == 30
    assert not dataset.invalid
    assert dataset.sizes.pictures.tolist() == [int(n % 3 > 0) for n in range(30)]
    assert dataset.sizes.queries.tolist() == [1 + n % 4 for n in range(30)]
    row, reason = dataset.row(4)
    assert reason is None
    text = "[INST] <image>\nWhat? [/INST] n4 word word word word </s>"
    np.testing.assert_array_equal(row.ids, token_ids(processor.tokenizer, text))
    learned = processor.tokenizer.decode([i for i in row.labels if i != IGNORE])
    assert learned.strip() == "n4 word word word word </s>"
    picture = open_image(tmp_path / "images/4.png")
    np.testing.assert_array_equal(row.images[0].crops, [to_crop(picture, processor.image_processor, "square")])
    assert not dataset.row(3)[0].images


BROKEN = {
    "malformed JSON": "no object",
    "no image file": record(0) | {"image": "absent.png"},
    "image outside of data.images": record(0) | {"image": "../images/../../0.png"},
    "<image> tag without image": {"conversations": record(0)["conversations"]},
    "image without <image> tag": record(0, image=False) | {"image": "0.png"},
    "no target": {"conversations": record(0, image=False)["conversations"][:1]},
    "too long": record(0, words=300),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_rows_are_counted_by_reason(tmp_path, reason):
    records = [record(0), BROKEN[reason], record(1), BROKEN[reason]]
    dataset = opened(tmp_path, records, too_long="skip")
    assert dataset.invalid == {reason: 2}
    assert dataset.records.tolist() == [1, 3]
    message = rf"2 of 4 rows are invalid \(2 {reason}\), the first is row 2: fix them, or set data.invalid"
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, records, too_long="skip", invalid="fail")
    assert "\n" not in str(error.value)


def test_a_line_that_is_no_json(tmp_path):
    data = write(tmp_path, [record(0), record(1)], lines=True)
    pathlib.Path(data.conversations).write_text(json.dumps(record(0)) + "\n{broken\n" + json.dumps(record(1)))
    assert open_dataset(data, CONFIG, TOKENIZER).invalid == {"malformed JSON": 1}


def test_long_rows_are_cut(tmp_path):
    records = [record(0, words=300), record(1, image=False, words=300), record(2, turns=40)]
    dataset = opened(tmp_path, records)
    assert dataset.sizes.text.tolist() == [196, 200, 196]
    assert dataset.row(0)[0].labels[-1] != IGNORE
    assert {bucket.text for bucket, _ in dataset.shapes(1, 0)} == {200}  # max_length is the last bucket
    cut_before = "x" * 250
    with pytest.raises(UserError, match=r"all 1 are invalid \(1 no target\)"):
        opened(tmp_path, [{"conversations": [{"from": "human", "value": cut_before}, {"from": "gpt", "value": "a"}]}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": "/absent.json"}, "^/absent.json cannot be read: there is no such file"),
        ({"images": "/absent"}, "^data.images is /absent, which is not a folder"),
        ({"template": "alpaca"}, "template 'alpaca' is not known"),
        (
            {"template": "chatml_direct"},
            r"ends an answer with <\|im_end\|>, which is not a single token of the tokenizer, ",
        ),
        ({"max_length": 257}, "data.max_length is 257, but the model has 256 positions: lower it"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, change, message):
    data = dataclasses.replace(write(tmp_path, [record(0)]), **change)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(data, CONFIG, TOKENIZER)
    assert "\n" not in str(error.value)


OWN = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ('</s>' if m['role'] == 'assistant' else ' ') }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def with_own_template(tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder)
    (folder / "chat_template.jinja").write_text(OWN)
    return folder


@pytest.mark.parametrize("template", ["own", None])
def test_the_checkpoints_own_template_is_learned(tmp_path, template, with_own_template):
    """Ids that inference asks with, answers and their ends as targets, and what of it runs into a batch."""
    own = dataclasses.replace(CONFIG, template="own")
    data = write(tmp_path, [record(3, turns=2)], template=template)
    dataset = open_dataset(data, own, with_own_template)
    processor = Processor.load(with_own_template, own)
    turns = [("<image>\nWhat?", "n3 word"), ("What?", "n3 word")]
    ids = dataset.ids[0]
    for n in (1, 2):
        prompt = processor.row([*turns[: n - 1], (turns[n - 1][0], None)], [Image.new("RGB", (9, 9))]).ids
        assert ids[: len(prompt)].tolist() == prompt
        assert len(prompt) == dataset.spans[0].reshape(-1, 2)[n - 1][0]
    row, _ = dataset.row(0)
    assert processor.tokenizer.decode(row.labels[row.labels != IGNORE]) == "n3 word</s> n3 word</s>"


def test_an_own_template_that_cannot_be_learned(tmp_path, with_own_template):
    (with_own_template / "chat_template.jinja").write_text(OWN.replace("</s>", "."))
    with pytest.raises(UserError, match="ends its answers with no special token, so their end could not be learned"):
        open_dataset(write(tmp_path, [record(0)], template="own"), CONFIG, with_own_template)


def test_tokenizer_of_another_model(tmp_path):
    small = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=100))
    with pytest.raises(UserError, match=r"produces token ids up to \d+, but the vocabulary of the model is 0..99"):
        open_dataset(write(tmp_path, [record(0)]), small, TOKENIZER)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "contains no conversations"),
        ([1, record(0) | {"image": "x"}, 2], r"all 3 are invalid \(2 malformed JSON, 1 no image file\)"),
    ],
)
def test_nothing_to_learn_from(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path, records)


def test_the_fingerprint_is_that_of_the_rows(tmp_path):
    one = opened(tmp_path, mixed())
    assert opened(tmp_path, mixed(), lines=True).fingerprint == one.fingerprint
    assert opened(tmp_path, mixed()[::-1]).fingerprint != one.fingerprint
    assert opened(tmp_path, mixed(), max_length=40).fingerprint != one.fingerprint


# --- plans


def test_plans_are_repeatable_and_differ_by_seed_and_epoch(dataset, grouped):
    for data in (dataset, grouped):
        orders = {}
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
            plan = data.plan_epoch(B, seed, epoch)
            for one, again in zip(plan, data.plan_epoch(B, seed, epoch), strict=True):
                np.testing.assert_array_equal(one.rows, again.rows)
                assert one[1:] == again[1:]
            orders[seed, epoch] = tuple(np.concatenate([planned.rows for planned in plan]))
        assert len(set(orders.values())) == 3


@given(
    text=st.lists(st.integers(1, 300), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    group=st.booleans(),
    seed=st.integers(0, 9),
)
def test_an_epoch_has_each_row_at_most_once_in_a_bucket_that_holds_it(text, batch_size, group, seed):
    text = np.array(text)
    sizes = Sizes(text, 1 + text % 5, of_pictures(text % 4))
    batches = batches_of(np.random.default_rng(seed), sizes, batch_size, group)
    assert batches.shape == (len(text) // batch_size, batch_size)
    assert len(np.unique(batches)) == batches.size
    slots = (50, 120, 300)
    config = LlavaConfig(VisionConfig(image_size=28))  # 4 tokens a picture
    shapes = shapes_of(batches, sizes, slots, config)
    for rows, (bucket, queries) in zip(batches, shapes, strict=True):
        smaller = [n for n in slots if n < bucket.text]
        assert max([0, *smaller]) < sizes.text[rows].max() <= bucket.text
        most = sizes.pictures[rows].max()
        assert bucket.images == (4,) * (4 if most == 3 else most)
        assert bucket.crops == len(bucket.images)
        assert queries in (1, 2, 4, 8)
        assert queries / 2 < sizes.queries[rows].max() <= queries
    if group:
        with_and_without = (sizes.pictures[batches].min(1) == 0) & (sizes.pictures[batches].max(1) > 0)
        assert with_and_without.sum() <= 1


def test_grouping_puts_like_lengths_together():
    rng = np.random.default_rng(0)
    text = rng.integers(1, 2000, 3000)
    sizes = Sizes(text, np.ones_like(text), of_pictures(np.ones_like(text)))
    spread = {g: np.ptp(text[batches_of(rng, sizes, 10, g)], axis=1).mean() for g in (False, True)}
    assert spread[True] < spread[False] / 20
    firsts = text[batches_of(rng, sizes, 10, True)[:, 0]]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.2  # shuffled again, not from short to long
    assert len(firsts) > 2 * MEGA


def test_grouping_puts_rows_of_as_many_pictures_together():
    rng = np.random.default_rng(0)
    pictures = rng.choice([1, 1, 1, 2, 3, 4], 4000)
    sizes = Sizes(rng.integers(1, 2000, 4000), np.ones_like(pictures), of_pictures(pictures))
    batches = batches_of(rng, sizes, 10, True)
    places = [bucket.images for bucket, _ in shapes_of(batches, sizes, (2000,), CONFIG)]
    slots = sum(map(len, places)) * 10
    assert slots < 1.1 * np.where(pictures > 2, 4, pictures)[batches].sum()
    assert np.ptp(sizes.text[batches], axis=1).mean() < 2000 / 8


def test_shapes_are_few(dataset):
    shapes = dataset.shapes(B, 0, epochs=5)
    assert shapes == {(p.bucket, p.queries) for epoch in range(5) for p in dataset.plan_epoch(B, 0, epoch)}
    assert {bucket.text for bucket, _ in shapes} <= {32, 64, 128, 200}
    assert {bucket.images for bucket, _ in shapes} <= {(), (4,)}
    assert {queries for _, queries in shapes} <= {1, 2, 4}


# --- batches


def several(number):
    """A record of one to three pictures, the last of them in the second turn, or of none."""
    count = number % 4
    tags = (
        ["<image> " * (count - 1) + "What?", "<image>\nAnd?"]
        if count > 1
        else ["<image>\nWhat?" * count or "Hm?", "And?"]
    )
    texts = [text for tag in tags for text in (tag, f"n{number}" + " word" * (number % 7))]
    messages = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"image": [f"{(number + n) % 5}.png" for n in range(count)], "conversations": messages}


def test_rows_of_several_pictures(tmp_path):
    dataset = opened(tmp_path, [several(n) for n in range(20)])
    assert not dataset.invalid
    assert dataset.sizes.pictures.tolist() == [n % 4 for n in range(20)]
    processor = Processor.load(TOKENIZER, CONFIG)
    pixels = [to_crop(open_image(tmp_path / f"images/{n}.png"), processor.image_processor, "square") for n in range(5)]
    planned = dataset.plan_epoch(B, 0, 0)
    for step, (rows, bucket, queries) in zip(pipeline(dataset, B, 0, 5), planned, strict=True):
        assert step.batch.bucket == bucket
        assert queries == 2
        for b, row in enumerate(rows.tolist()):
            count = row % 4
            images = step.batch.image_id[b]
            assert np.bincount(images)[1:].tolist() == [4] * count
            for m in range(count):
                np.testing.assert_array_equal(step.batch.crops[b, m], pixels[(row + m) % 5])
                used = step.batch.feature_index[b, images == m + 1, 0]
                np.testing.assert_array_equal(used, np.arange(4) + 4 * m)
            before = step.batch.query_rows[b]
            labels = step.batch.labels[b]
            assert ((labels[before] == IGNORE) & (labels[before + 1] != IGNORE)).all()


def test_a_row_weighs_in_a_mixed_batch_what_it_weighs_alone(tmp_path):
    """Rows of one and of three pictures: loss, gradient and kept tokens, with drops, each in its own bucket or not."""
    dataset = open_dataset(write(tmp_path, [several(1), several(3)]), TINY, TOKENIZER)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), abstract_params(TINY))
    run = jax.jit(jax.value_and_grad(functools.partial(compute_loss, TINY), has_aux=True))

    def loss_kept_gradient(planned):
        rows = [dataset.row(row)[0] for row in planned.rows]
        batch = assemble(rows, TINY, planned.bucket, planned.queries)
        (loss, drops), gradient = run(params, batch)
        return loss, dict(zip(planned.rows.tolist(), kept_tokens(batch, drops), strict=True)), gradient

    (together,), alone = dataset.plan_epoch(2, 0, 0), dataset.plan_epoch(1, 0, 0)
    assert {len(planned.bucket.images) for planned in alone} == {1, len(together.bucket.images)} == {1, 4}
    loss, kept, gradient = loss_kept_gradient(together)
    losses, kepts, gradients = zip(*map(loss_kept_gradient, alone), strict=True)
    assert float(loss) == pytest.approx(float(sum(losses)), rel=1e-6)
    assert kept == kepts[0] | kepts[1]
    assert [[len(image) for image in boundary] for boundary in kept[1]] == [[8] * 3]
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
    jax.tree.map(
        lambda x, *parts: np.testing.assert_allclose(x, sum(parts), atol=1e-6 * largest, rtol=1e-5),
        gradient,
        *gradients,
    )


def test_a_row_is_cut_between_its_pictures_and_one_that_is_lost_is_grey(tmp_path):
    record = several(3)
    record["conversations"][1]["value"] = "word " * 30
    data = write(tmp_path, [record] * 2, max_length=200)
    whole, cut = (
        open_dataset(data, CONFIG, TOKENIZER),
        open_dataset(dataclasses.replace(data, max_length=60), CONFIG, TOKENIZER),
    )
    assert (whole.sizes.pictures[0], cut.sizes.pictures[0]) == (3, 2)
    assert whole.fingerprint != cut.fingerprint
    assert len(cut.row(0)[0].images) == 2
    (tmp_path / "images/4.png").unlink()
    row, reason = cut.row(0)
    assert reason == "corrupt image"
    assert [image.crops.any() for image in row.images] == [True, False]
    assert (np.asarray(row.labels) == IGNORE).all()


def test_batches_are_the_planned_rows(dataset):
    steps = list(pipeline(dataset, B, seed=3, steps=10))  # 7 an epoch
    planned = dataset.plan_epoch(B, 3, 0) + dataset.plan_epoch(B, 3, 1)[:3]
    assert len(steps) == len(planned)
    for step, (rows, bucket, queries) in zip(steps, planned, strict=True):
        assert not step.invalid
        assert step.batch.bucket == bucket
        assert step.batch.query_rows.shape == (B, queries)
        assert step.batch.crops.shape == (B, len(bucket.images), 28, 28, 3)
        for b, row in enumerate(rows):
            n = step.batch.length[b]
            assert n == dataset.sizes.text[row] + 4 * dataset.sizes.pictures[row]
            assert (step.batch.query_rows[b] >= 0).sum() == dataset.sizes.queries[row]
            expected = dataset.row(row)[0]
            targets = step.batch.labels[b][step.batch.labels[b] != IGNORE]
            np.testing.assert_array_equal(targets, [i for i in expected.labels if i != IGNORE])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_batch(dataset, grouped, processes):
    for data in (dataset, grouped):
        whole = list(pipeline(data, B, 0, 9))
        parts = [list(pipeline(data, B, 0, 9, process_index=p, process_count=processes)) for p in range(processes)]
        for step, *shares in zip(whole, *parts, strict=True):
            together = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(share.batch for share in shares))
            same(step.batch, together)


@pytest.mark.parametrize(("first", "workers"), [(1, 0), (5, 0), (12, 0), (5, 2)])
def test_reading_begins_at_any_step(dataset, first, workers):
    rest = list(pipeline(dataset, B, 0, 12))[first:]
    again = list(pipeline(dataset, B, 0, 12, first=first, workers=workers))
    assert len(again) == len(rest)
    for one, other in zip(rest, again, strict=True):
        same(one, other)


def spoil(folder, kind):
    path = folder / "images/2.png"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    elif kind == "gone":
        path.unlink()
    else:
        Image.new("1", (20000, 9000)).save(path)  # Pillow only warns of this one


@pytest.mark.parametrize(("kind", "workers"), [("truncated", 0), ("gone", 0), ("bomb", 0), ("truncated", 1)])
def test_pictures_that_cannot_be_read(tmp_path, kind, workers):
    dataset = opened(tmp_path, [record(n) for n in range(20)])
    spoil(tmp_path, kind)
    steps = list(pipeline(dataset, B, 0, 5, workers=workers))
    assert sum((step.invalid for step in steps), Counter()) == {"corrupt image": 4}
    for step, planned in zip(steps, dataset.plan_epoch(B, 0, 0), strict=True):
        for b, row in enumerate(planned.rows):
            n = step.batch.length[b]
            assert n == dataset.sizes.text[row] + 4
            lost = row % 5 == 2
            assert (step.batch.labels[b] == IGNORE).all() == lost
            assert (not step.batch.crops[b].any()) == lost
            if lost:
                assert step.batch.query_rows[b, 0] == n - 1
    failing = dataclasses.replace(dataset, data=dataclasses.replace(dataset.data, invalid="fail"))
    with pytest.raises(
        UserError, match=r"data.json, row \d+: .*2.png(:| cannot be read:) .*: fix the image, or set data.invalid"
    ):
        list(pipeline(failing, B, 0, 5, workers=workers))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 31}, "has 30 usable rows, but the batch size is 31: lower run.batch_size"),
        ({"batch_size": 6, "process_count": 4}, "6 rows is not divisible by 4: choose a multiple of 4"),
        ({"batch_size": 8, "process_count": 2, "parts": 3}, "not divisible by 6: choose a multiple of 6"),
        ({"batch_size": 0}, "a batch of 0 rows"),
    ],
)
def test_batches_that_cannot_be_made(dataset, settings, message):
    with pytest.raises(UserError, match=message):
        pipeline(dataset, seed=0, steps=3, **settings)


def test_without_grain_nothing_is_read(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    message = r"^training needs grain, which is not installed: pip install 'pdrop-jax\[train\]'$"
    with pytest.raises(UserError, match=message):
        pipeline(dataset, B, 0, 3)


def test_reading_leaves_no_error_filter_behind(dataset):
    before = [action for action, *_ in warnings.filters].count("error")
    list(pipeline(dataset, B, 0, 3))
    assert [action for action, *_ in warnings.filters].count("error") == before


# --- rows in a flat array


@given(st.lists(st.lists(st.integers(-200, 2**31 - 1), max_size=5), max_size=8))
def test_ragged_rows(rows):
    builder = RaggedBuilder(np.int32)
    for row in rows:
        builder.append(np.array(row, np.int32))
    for ragged in (built := builder.build(), pickle.loads(pickle.dumps(built))):
        assert len(ragged) == len(rows)
        assert [ragged[n].tolist() for n in range(len(rows))] == rows
        assert ragged.values.dtype == np.int32


@pytest.mark.skipif(sys.platform != "linux", reason="other systems copy")
def test_pickled_rows_are_mapped_not_copied():
    ragged = Ragged(np.zeros(100_000, np.int32), np.array([0, 100_000]))
    pickled = pickle.dumps(ragged)
    assert len(pickled) < 500
    assert pickle.loads(pickled)[0].base is not None
    assert len(pickle.dumps(ragged)) == len(pickled)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems copy")
def test_threads_that_pickle_at_once_name_the_same_file():
    for _ in range(50):
        rows = Ragged(np.arange(50_000, dtype=np.int32), np.array([0, 50_000]))
        with ThreadPoolExecutor(8) as threads:
            names = {future.result()[1][0] for future in [threads.submit(rows.__reduce__) for _ in range(8)]}
        assert len(names) == 1


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "{folder}/secret.png", "{folder}/imagesaside/1.png", "a/../1.png"]
)
def test_pictures_outside_of_the_folder(tmp_path, name):
    name = name.format(folder=tmp_path)
    for place in (tmp_path, tmp_path / "imagesaside", tmp_path / "images/a"):
        place.mkdir(parents=True, exist_ok=True)
    for path in ("secret.png", "imagesaside/1.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / path)
    records = [record(0), record(1) | {"image": name}]
    assert opened(tmp_path, records).invalid == {"image outside of data.images": 1}
    assert not opened(tmp_path, records, outside_images=True).invalid


@pytest.mark.parametrize("name", ["./1.png", "a/1.png", "link/1.png", "{folder}/images/1.png"])
def test_pictures_inside_of_the_folder(tmp_path, name):
    """A link is the business of whoever made it."""
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("elsewhere", "images/a"):
        Image.new("RGB", (30, 20)).save(tmp_path / place / "1.png")
    (tmp_path / "images/link").symlink_to(tmp_path / "elsewhere")
    assert not opened(tmp_path, [record(0) | {"image": name.format(folder=tmp_path)}]).invalid


def test_a_fifo_of_conversations_is_not_waited_for(tmp_path):
    data = write(tmp_path, [record(0)])
    (tmp_path / "data.json").unlink()
    os.mkfifo(tmp_path / "data.json")
    with pytest.raises(UserError, match="is a FIFO, expected a file"):
        open_dataset(data, CONFIG, TOKENIZER)
