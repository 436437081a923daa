"""Conversations about pictures that are tiles, batches of one shape, and pictures that are too many tiles."""

import dataclasses
import pathlib
import shutil
import sys

import pytest
from checks import check_conversation
from test_tile_models import check_inputs
from tiny_tiles import SIDE, photo, torch_inputs_of

from pdrop_jax.analysis.asking import ask
from pdrop_jax.analysis.figures import answer_picture
from pdrop_jax.analysis.settings import DENSE, Setting
from pdrop_jax.errors import UserError
from pdrop_jax.eval.batching import plan_batches
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import generate, start
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.images import Video, as_tokens, blank, measure
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.schedule import DropSchedule

FAMILIES = ["internvl", "smolvlm"]
PICTURES = [photo(60, 200, 1), photo(50, 50, 2), photo(300, 60, 3)]
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "First "}, {"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "And these?"}]},
]
# Pictures of 5 or 6 tiles (InternVL), and of 1 x 2 or 2 x 1 (SmolVLM, which always has 2 on the longer side).
SIZES = {
    "internvl": [(70, 700), (60, 300), (200, 300), (310, 60)],
    "smolvlm": [(70, 400), (30, 150), (300, 60), (400, 70)],
}
TURNS = [("What?", PICTURES[:1]), ("And here?", PICTURES[2:])]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_conversation_is_answered_as_if_asked_at_once(kind, tiles):
    check_conversation(load(tiles[kind][1], schedule=DropSchedule((1,), (0.5,))), "rerank", TURNS)


@pytest.mark.parametrize("kind", FAMILIES)
def test_messages_are_those_of_transformers(kind, tiles):
    """Pictures within the text and several of them, each with its own number of tiles."""
    batch = load(tiles[kind][1]).processor([MESSAGES], [PICTURES])
    inputs, crops = torch_inputs_of(kind, MESSAGES, PICTURES)
    check_inputs(kind, batch, 0, inputs)
    assert batch.image_id.max() == 3
    assert crops == {"internvl": [4, 1, 6], "smolvlm": [3, 5, 3]}[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_pictures_of_as_many_tiles_compile_nothing_new(kind, tiles):
    """5 and 6 tiles share the largest shape of the processor, 7 crops; a column has the shape of a row."""
    model = load(tiles[kind][1], schedule=DropSchedule((1,), (0.5,)))
    counts = set()
    for n, size in enumerate(SIZES[kind]):
        answer = generate(model, ["What is this?"], [photo(*size, n)], Sampling(max_new_tokens=2))
        counts.add(answer.image_tokens[0][0])
        if not n:
            compiled = start._cache_size()
    assert start._cache_size() == compiled
    assert len(counts) == (2 if kind == "internvl" else 1)
    processor = model.processor.image_processor
    for size in SIZES[kind]:
        found = measure(photo(*size), processor, model.config, alone=True)
        assert found == as_tokens(photo(*size), processor, model.config).size


@pytest.mark.parametrize(
    ("kind", "crops", "bound"), [("internvl", 7, "max_patches, now 6"), ("smolvlm", 3, "size.longest_edge, now 120")]
)
def test_a_picture_of_more_tiles_than_the_model_has_positions(kind, crops, bound, tiles):
    processor = load(tiles[kind][1]).processor
    text = dataclasses.replace(processor.config.text, max_length=11)
    small = dataclasses.replace(processor, config=dataclasses.replace(processor.config, text=text))
    with pytest.raises(
        UserError, match=rf"becomes {4 * crops} tokens in {crops} crops.* 11 positions: lower .*{bound}"
    ):
        small(["?"], [photo(70, 700)])
    with pytest.raises(UserError, match=bound):
        measure(photo(70, 700), small.image_processor, small.config, alone=True)


def test_videos_of_smolvlm_need_num2words(tiles, monkeypatch):
    processor = load(tiles["smolvlm"][1]).processor
    monkeypatch.setitem(sys.modules, "num2words", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"need num2words, .* pip install 'pdrop-jax\[smolvlm\]'"):
        processor(["?"], [Video(PICTURES[:1])])


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_downsampled_picture_has_fewer_tiles(kind, tiles, tmp_path):
    """As many as come nearest, with the text around them: 1 x 3 and 1 x 2 and the whole, of 4 tokens each."""
    folder = tmp_path / "own"
    shutil.copytree(tiles[kind][1], folder)
    if kind == "smolvlm":
        (folder / "preprocessor_config.json").unlink()  # up to four tiles a side, not two
    model, picture = load(folder), tmp_path / "picture.png"
    photo(60, 200).save(picture)
    questions = [Question(1, "What is this?", [picture])]
    found = {}
    for wanted in (17, 11):
        given = []

        def tokens_of(n, wanted=wanted, given=given):
            given.append(n)
            return min(n, wanted)

        setting = Setting("controls", "picture downsampled", DENSE, tokens_of=tokens_of)
        groups = list(enumerate(plan_batches(model.processor, questions, 1, 1, tokens_of)))
        ((_, (answer,)),) = ask(model, questions, groups, 1, Sampling(1), None, setting)
        (found[wanted],) = answer.image_tokens
        assert len(set(given)) == 1
    assert model.processor.all_tokens([picture])[0].size.tokens == {"internvl": 16, "smolvlm": 36}[kind]
    assert found == {17: 16, 11: 12}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_without_an_image_processor_has_the_familys(kind, tiles, tmp_path):
    for path in pathlib.Path(tiles[kind][1]).iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = load(tiles[kind][1]).config
    (image,) = Processor.load(tmp_path, config).all_tokens(PICTURES[:1])
    assert len(image.crops) == {"internvl": 4, "smolvlm": 9}[kind]  # SmolVLM's has up to 4 tiles a side
    assert blank(config).size.crops == 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_figures_show_the_whole_and_its_tiles(kind, tiles):
    model = load(tiles[kind][1], schedule=DropSchedule((1,), (0.5,)))
    picture = photo(*SIZES[kind][0])
    kept = generate(model, ["What is this?"], [picture], Sampling(max_new_tokens=2)).kept[0]
    drawn = answer_picture([picture], kept, model.processor)
    # The whole, and its tiles in their grid: 1 x 6 (InternVL) or 1 x 2 (SmolVLM).
    assert drawn.width > 2 * (6 if kind == "internvl" else 2) * SIDE
    assert drawn.height > 2 * SIDE
