"""Mixtures: what an epoch has of each source, in the same order whoever asks, and what of a mixture is refused."""

import dataclasses
import itertools
import json

import formats
import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_run import CONFIG, TOKENIZER

from pdrop_jax.errors import UserError
from pdrop_jax.train.data.mixture import rows_of_epoch, rows_per_source
from pdrop_jax.train.data.pipeline import open_dataset, pipeline
from pdrop_jax.train.recipe import DataRecipe, Recipe, SourceRecipe, differences, load_recipe

B = 4
MIXTURE = st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 20)), min_size=1, max_size=4)


@given(MIXTURE, st.integers(0, 5), st.integers(1, 6))
def test_an_epoch_has_each_source_by_its_weight_and_its_rows_equally_often(mixture, seed, epochs):
    counts, weights = zip(*mixture, strict=True)
    total = sum(counts)
    shares = np.array(weights) / sum(weights)
    assume((shares * total >= 1).all())
    rows = rows_per_source(counts, weights)
    assert rows.sum() == total
    assert (np.abs(rows - shares * total) < 1).all()
    first = np.cumsum([0, *counts])
    read = np.zeros(total, int)
    for epoch in range(epochs):
        found = rows_of_epoch(counts, weights, seed, epoch)
        np.testing.assert_array_equal(np.histogram(found, bins=[*first[:-1], total])[0], rows)
        read += np.bincount(found, minlength=total)
    for start, stop in itertools.pairwise(first):
        assert np.ptp(read[start:stop]) <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of 12, 6 and 20 rows: JSON, Parquet and tar."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("json", 12), ("parquet_lists", 6), ("tar", 20)):
        formats.write(folder, name, formats.records(count))
    return folder


def mixture(folder, weights=(None, None, None), **settings):
    places = [("json/data.json", "images"), ("parquet_lists", None), ("tar", None)]
    sources = tuple(
        SourceRecipe(str(folder / path), images and str(folder / images), weight)
        for (path, images), weight in zip(places, weights, strict=True)
    )
    data = DataRecipe(sources=sources, max_length=128, text_buckets=(48, 64), **settings)
    return open_dataset(data, CONFIG, TOKENIZER)


@pytest.fixture(scope="module", params=[False, True], ids=["", "by length"])
def weighted(request, folder):
    return mixture(folder, (1.0, 2.0, 0.5), group_by_length=request.param)


def rows_in(dataset, seed, epoch):
    return np.concatenate([planned.rows for planned in dataset.plan_epoch(2, seed, epoch)])


def test_without_weights_an_epoch_has_each_row_once(folder):
    dataset = mixture(folder)
    assert dataset.counts == (12, 6, 20)
    assert sorted(rows_in(dataset, 0, 0)) == list(range(38))
    for row, (source, record) in {11: (0, 12), 12: (1, 1), 17: (1, 6), 18: (2, 1), 37: (2, 20)}.items():
        assert dataset.records[row] == record
        assert dataset.sources[source].path.endswith(("data.json", "parquet_lists", "tar")[source])


def test_with_weights_an_epoch_has_as_many_rows_by_their_shares(weighted):
    for epoch in range(3):
        rows = rows_in(weighted, 0, epoch)
        assert len(rows) == 38
        assert np.histogram(rows, bins=[0, 12, 18, 38])[0].tolist() == [11, 22, 5]
    assert rows_in(weighted, 0, 0).tolist() != rows_in(weighted, 0, 1).tolist() != rows_in(weighted, 1, 1).tolist()


def test_a_mixture_resumes_at_any_step_and_is_shared_by_any_number_of_processes(weighted):
    whole = list(pipeline(weighted, B, 5, 20))  # nine an epoch
    assert not any(step.invalid for step in whole)
    for first in (1, 9, 13):
        for one, other in zip(whole[first:], pipeline(weighted, B, 5, 20, first=first), strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
    for processes in (2, 4):
        shares = [
            list(pipeline(weighted, B, 5, 20, process_index=p, process_count=processes)) for p in range(processes)
        ]
        for step, *parts in zip(whole, *shares, strict=True):
            together = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(part.batch for part in parts))
            jax.tree.map(np.testing.assert_array_equal, step.batch, together)


def test_grouping_by_length_keeps_rows_with_and_without_pictures_apart(folder):
    dataset = mixture(folder, (1.0, 2.0, 0.5), group_by_length=True)
    mixed = [np.unique(dataset.sizes.pictures[p.rows] > 0).size > 1 for p in dataset.plan_epoch(B, 0, 0)]
    assert sum(mixed) <= 1


def test_a_row_is_read_from_its_own_source(folder):
    """Each row of the mixture is that of the source by itself, with its pictures."""
    together = mixture(folder)
    for number, first in enumerate((0, 12, 18)):
        data = dataclasses.replace(together.data, sources=(together.data.sources[number],))
        alone = open_dataset(data, CONFIG, TOKENIZER)
        for row in range(len(alone)):
            one, other = alone.row(row)[0], together.row(first + row)[0]
            np.testing.assert_array_equal(one.ids, other.ids)
            for image, same in zip(one.images, other.images, strict=True):
                np.testing.assert_array_equal(image.crops, same.crops)


def test_the_fingerprint_is_of_the_sources_too(folder):
    one = mixture(folder)
    assert one.fingerprint == mixture(folder, (1.0, 2.0, 3.0)).fingerprint  # weights are settings of the recipe
    assert dataclasses.replace(one, counts=(11, 7, 20)).fingerprint != one.fingerprint
    alone = dataclasses.replace(one, counts=(38,), sources=one.sources[:1])
    assert alone.fingerprint != one.fingerprint


@pytest.mark.parametrize("invalid", ["skip", "fail"])
def test_an_error_names_the_source_it_is_about(folder, tmp_path, invalid):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(map(json.dumps, [*formats.records(1), {"conversations": []}])))
    sources = (SourceRecipe(str(folder / "tar")), SourceRecipe(str(bad)))
    data = DataRecipe(sources=sources, max_length=128, invalid=invalid)
    if invalid == "skip":
        dataset = open_dataset(data, CONFIG, TOKENIZER)
        assert dataset.invalid == {"malformed conversation": 1}
        with pytest.raises(UserError, match="the mixture of 2 sources has 21 usable rows, but the batch size is 22"):
            pipeline(dataset, 22, 0, 1)
        return
    with pytest.raises(UserError, match=rf"^{bad}: 1 of 2 rows are invalid .*, the first is row 2"):
        open_dataset(data, CONFIG, TOKENIZER)
    bad.write_text("[]")
    with pytest.raises(UserError, match=rf"^{bad} contains no conversations"):
        open_dataset(data, CONFIG, TOKENIZER)


def test_a_weight_too_small_for_a_row(folder):
    with pytest.raises(UserError, match=r"^data.sources.1.weight is 0.001 of 2.001, which is less than one of the 38 "):
        mixture(folder, (1.0, 0.001, 1.0))


# --- recipes

RECIPE = """
[model]
start = "start"
[run]
folder = "out"
[[data.sources]]
conversations = "a.parquet"
weight = 3
[[data.sources]]
conversations = "b.json"
images = "images"
weight = 1.5
"""


def loaded(tmp_path, text, settings=()):
    (tmp_path / "recipe.toml").write_text(text)
    return load_recipe(tmp_path / "recipe.toml", settings)


def test_a_mixture_in_a_recipe(tmp_path):
    recipe = loaded(tmp_path, RECIPE)
    assert isinstance(recipe, Recipe)
    assert recipe.data.all_sources == (SourceRecipe("a.parquet", None, 3.0), SourceRecipe("b.json", "images", 1.5))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight = 3\n", "weight = 0\n", "data.sources.0.weight is 0, it must be greater than 0"),
        ("weight = 1.5", "weight = -1.5", "data.sources.1.weight is -1.5, it must be greater than 0"),
        ("weight = 1.5", "weight = inf", "data.sources.1.weight is Infinity, it must be a finite number"),
        ("weight = 1.5", "", "data.sources.1 has no weight, but others have one: give all a weight, or none"),
        ("weight = 3", "weigth = 3", "unknown key data.sources.0.weigth: did you mean data.sources.0.weight?"),
        ('conversations = "b.json"', "", "has no data.sources.1.conversations"),
        ("[[data.sources]]", '[data]\nimages = "."\n[[data.sources]]', "data.sources replaces data.conversations and"),
    ],
)
def test_a_mixture_that_is_wrong(tmp_path, old, new, message):
    with pytest.raises(UserError) as error:
        loaded(tmp_path, RECIPE.replace(old, new, 1))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_of_a_mixture_may_change_on_resume(tmp_path):
    def recipe(text):
        return json.loads(json.dumps(dataclasses.asdict(loaded(tmp_path, text))))

    before = recipe(RECIPE)
    assert differences(before, recipe(RECIPE.replace("a.parquet", "elsewhere"))) == []
    changed = differences(before, recipe(RECIPE.replace("weight = 3", "weight = 2")))
    assert changed == ["data.sources.0.weight was 3.0 and is now 2.0"]
    single = recipe(RECIPE.partition("[[")[0] + '[data]\nconversations = "c"')
    assert len(differences(before, single)) == 2
    old = json.loads(json.dumps(single))
    del old["data"]["sources"]  # a checkpoint from before there were mixtures
    assert differences(old, single) == []
