"""Recipes: what a file may say, and what is said of one that is wrong."""

import json

import pytest

from pdrop_jax.errors import UserError
from pdrop_jax.train.optimizer import learning_rate
from pdrop_jax.train.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, RunRecipe, load_recipe

TEXT = """
[model]
start = "start"
groups = ["projector"]
[data]
conversations = "chat.json"
images = "images"
text_buckets = [64, 96]
[optimizer]
learning_rate = 1
[run]
folder = "out"
"""


def written(folder, text=TEXT, name="recipe.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_what_a_file_leaves_out_has_the_default(tmp_path):
    assert load_recipe(written(tmp_path)) == Recipe(
        ModelRecipe("start", ("projector",)),
        DataRecipe("chat.json", "images", text_buckets=(64, 96)),
        RunRecipe("out"),
        OptimizerRecipe(learning_rate=1.0),
    )


def test_json_says_the_same(tmp_path):
    data = {
        "model": {"start": "start"},
        "data": {"conversations": "c", "images": "i"},
        "run": {"folder": "out", "steps": None},
    }
    path = written(tmp_path, json.dumps(data), "recipe.json")
    assert load_recipe(path) == Recipe(ModelRecipe("start"), DataRecipe("c", "i"), RunRecipe("out"))


def test_settings_win_over_the_file(tmp_path):
    settings = [
        "run.steps=7",
        "data.group_by_length=true",
        "model.start=other",
        "model.layers=[2, 4]",
        "data.template=plain",
    ]
    recipe = load_recipe(written(tmp_path), settings)
    assert (recipe.run.steps, recipe.data.group_by_length, recipe.model.start) == (7, True, "other")
    assert recipe.model.layers == (2, 4)
    assert recipe.data.template == "plain"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat: did you mean optimizer.learning_rate?"),
        ("optimiser.b1=0.9", "unknown key optimiser: did you mean optimizer?"),
        ("run.zzz=1", "unknown key run.zzz: known are folder, batch_size"),
        ("run.steps=1.5", "run.steps is 1.5, it must be a valid integer"),
        ("run.steps=0", "run.steps is 0, it must be greater than or equal to 1"),
        ("run.keep_every=750", "run.keep_every is 750: choose a multiple of run.save_every, 500"),
        ("run.steps=true", "run.steps is true, it must be a valid integer"),
        ("data.invalid=ignore", "data.invalid is 'ignore', it must be 'skip' or 'fail'"),
        ("model.groups=llm", "model.groups is 'llm', it must be a list"),
        ("model.layers=[1, 2.5]", "model.layers.1 is 2.5, it must be a valid integer"),
        ("model.start=\udcff", "--set 'model.start=\\udcff' is not valid UTF-8"),
        ("steps=3", "is not of the form section.key=value"),
        ("run.steps", "is not of the form section.key=value"),
    ],
)
def test_a_setting_that_is_wrong(tmp_path, setting, message):
    with pytest.raises(UserError) as error:
        load_recipe(written(tmp_path), [setting])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]", "recipe.toml has no model.start, data, run"),
        ("[model]\n[data]\nimages = '.'\n[run]", "recipe.toml has no model.start, run.folder"),
        (
            "[model]\nstart = 's'\n[data]\nimages = '.'\n[run]\nfolder = 'f'",
            "recipe.toml: data.conversations is not set",
        ),
        ("model = 3\n[data]\n[run]", "model is 3, it must be an object"),
        ("[model", "is malformed: Expected ']'"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_recipe(written(tmp_path, text))
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none.toml cannot be read: there is no such file"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "groups", "rate", "batch_size", "max_length", "aspect", "group"),
    [
        ("llava-1.5-pretrain", ("projector",), 1e-3, 256, 2048, "square", False),
        ("llava-1.5-finetune", ("projector", "llm"), 2e-5, 128, 2048, "pad", True),
        ("llava-next-pretrain", ("projector",), 1e-3, 256, 4096, "anyres", False),
        ("llava-next-finetune", ("vision", "projector", "llm"), 2e-5, 128, 4096, "anyres", True),
    ],
)
def test_the_official_recipes(name, groups, rate, batch_size, max_length, aspect, group):
    """Table "Recipes in the official scripts"; what they share is in the defaults."""
    paths = ["model.start=s", "data.conversations=c", "data.images=i", "run.folder=f"]
    recipe = load_recipe(name, paths)
    assert (recipe.model.groups, recipe.optimizer.learning_rate, recipe.run.batch_size) == (groups, rate, batch_size)
    assert (recipe.data.max_length, recipe.data.image_aspect, recipe.data.group_by_length) == (
        max_length,
        aspect,
        group,
    )
    assert recipe.optimizer.vision_learning_rate == (2e-6 if "vision" in groups else None)
    assert recipe.data.template == ("plain" if name.endswith("pretrain") else "vicuna_v1")
    assert (recipe.model.layers, recipe.model.ratios) == ((8, 16, 24), (0.5, 0.25, 0.125))
    assert (recipe.model.dtype, recipe.model.remat) == ("bfloat16", "full")
    optimizer, run = recipe.optimizer, recipe.run
    assert (optimizer.warmup, optimizer.weight_decay, run.epochs, run.steps) == (0.03, 0.0, 1, None)
    with pytest.raises(UserError, match=rf"the recipe {name} has no model\.start"):
        load_recipe(name, paths[1:])


@pytest.mark.parametrize(
    ("stage", "groups", "rate", "final"),
    [
        (1, ("compressor", "projector"), 1e-4, 5e-5),
        (2, ("vision", "compressor"), 1e-5, 5e-6),
        (3, ("vision", "compressor", "projector", "llm"), 5e-5, 1e-5),
        (4, ("vision", "compressor", "projector", "llm"), 1e-5, 1e-6),
    ],
)
def test_the_stages_of_llava_uhd_v4(stage, groups, rate, final):
    """Table A7 of arXiv 2605.08985, and section 4.1 for what stage 1 trains."""
    paths = ["model.start=s", "data.conversations=c", "data.images=i", "run.folder=f"]
    recipe = load_recipe(f"llava-uhd-v4-stage{stage}", paths)
    assert (recipe.model.groups, recipe.model.layers, recipe.data.image_aspect) == (groups, None, "slices")
    optimizer = recipe.optimizer
    rates = learning_rate(optimizer.learning_rate, optimizer.warmup, 1000, optimizer.final_share)
    assert [float(rates(step)) for step in (30, 1000)] == pytest.approx([rate, final])
    assert recipe.data.template == ("plain" if stage == 1 else None)


@pytest.mark.parametrize("name", ["llava-2", "llava-1.5-fintune", "llava-1.5"])
def test_a_preset_that_is_not_there(name):
    with pytest.raises(UserError, match=rf"^{name} is neither a preset nor a file: the presets are llava-1\.5"):
        load_recipe(name)
