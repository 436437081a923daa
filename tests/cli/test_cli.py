"""The ``pdrop`` command as a user types it: real processes, exit codes, what is printed where."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PHOTO = GOLDEN / "img_astronaut_square_small.png"
SCHEDULE = ("--layers", "2", "4", "6", "--ratios", "0.5", "0.25", "0.125")


def pdrop(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from pdrop_jax.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def fails(*args: object) -> str:
    """The one line that a user's mistake prints; exit code 2, nothing on stdout, no traceback."""
    result = pdrop(*args)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    result = pdrop(
        "convert", GOLDEN / "model_mha", folder, "--tokenizer", ROOT / "examples" / "tiny_tokenizer", *SCHEDULE
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_json_tells_what_was_kept(model):
    result = pdrop(
        "generate", "--model", model, "--image", PHOTO, "--prompt", "Who is it?", "--max-new-tokens", 8, "--json"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # a pipe gets no progress
    answer = json.loads(result.stdout)
    text = answer["stage_lengths"][0] - 16
    assert answer["stage_lengths"] == [text + kept for kept in (16, 8, 4, 2)]
    assert [len(images[0]) for images in answer["kept"]] == [8, 4, 2]
    assert set(answer["kept"][2][0]) < set(answer["kept"][1][0]) < set(answer["kept"][0][0]) < set(range(16))
    assert 1 <= len(answer["token_ids"]) <= 8
    assert answer["prefill_seconds"] > 0
    assert answer["cache_bytes"] > 0
    assert answer["schedule"] == {"layers": [2, 4, 6], "ratios": [0.5, 0.25, 0.125], "positions": "dense"}


def test_a_batch_answers_as_each_question_alone(model):
    questions = ("Who is it?", "What is the colour of the suit that she wears?")
    common = ("generate", "--model", model, "--image", PHOTO, "--max-new-tokens", 6, "--json", "--prompt")
    together = json.loads(pdrop(*common, *questions).stdout)["rows"]
    alone = [json.loads(pdrop(*common, question).stdout) for question in questions]
    assert [row["token_ids"] for row in together] == [answer["token_ids"] for answer in alone]
    assert [row["kept"] for row in together] == [answer["kept"] for answer in alone]


def test_another_schedule_than_the_checkpoints_own(model):
    result = pdrop(
        "generate", "--model", model, "--image", PHOTO, "--prompt", "Hi", "--layers", 3, "--ratios", 0, "--json"
    )
    answer = json.loads(result.stdout)
    assert answer["kept"] == [[[]]]
    assert answer["stage_lengths"][0] - answer["stage_lengths"][1] == 16


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--layers", 4, 2, "--ratios", 0.5, 0.25), "ascend"),
        (("--layers", 2, 8, "--ratios", 0.5, 0.25), "decoder of 8 layers"),
        (("--layers", 2, 4, "--ratios", 0.25, 0.5), "must not rise"),
        (("--layers", 2, "--ratios", 1.5), "0..1"),
        (("--layers", 2, 4, "--ratios", 0.5), "one ratio for each layer"),
        (("--layers", 2), "belong together"),
        (("--layers", "two", "--ratios", 0.5), "whole numbers"),
        (("--max-new-tokens", 0), "max_new_tokens >= 1"),
        (("--top-p", 0), "top_p"),
        (("--image", "nowhere.png"), "no such file"),
        (("--image", PHOTO, "--prompt", "<image> and <image>"), "2 <image> tags but 1 picture"),
        (("--prompt", "<image>\nWho?"), "1 <image> tag but 0 pictures"),
        (("--prompt", "word " * 3000), "positions"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(model, args, words):
    args = args if "--prompt" in args else (*args, "--prompt", "Who is it?")
    assert words in fails("generate", "--model", model, *args)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert "no checkpoint" in fails("generate", "--model", tmp_path, "--prompt", "Hi")


def test_a_pytorch_checkpoint_is_to_be_converted_first():
    assert "pdrop convert" in fails("generate", "--model", GOLDEN / "model_mha", "--prompt", "Hi")


def test_unreadable_and_odd_pictures(model, tmp_path):
    truncated = tmp_path / "half.jpg"
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:300])
    assert "half.jpg" in fails("generate", "--model", model, "--prompt", "Hi", "--image", truncated)
    for number, (mode, size) in enumerate([("L", (1, 1)), ("CMYK", (40, 30)), ("P", (9, 9)), ("RGBA", (20000, 10))]):
        odd = tmp_path / f"{number}.tif"
        Image.new(mode, size, 1 if mode in "LP" else None or 0).save(odd)
        result = pdrop("generate", "--model", model, "--prompt", "Hi", "--image", odd, "--max-new-tokens", 1)
        assert result.returncode == 0, result.stderr


def test_unknown_commands_list_the_known_ones():
    result = pdrop("trian")
    assert result.returncode == 2
    assert "generate" in result.stderr


def test_help_needs_neither_jax_nor_transformers():
    code = (
        "import sys; from pdrop_jax.cli import main; sys.argv[1:] = ['--help']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'jax' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("0 False False")


def test_check_passes_on_the_recorded_vectors_and_fails_on_changed_ones(tmp_path):
    result = pdrop("check", GOLDEN, "--case", "prompts", "image_preprocess")
    assert result.returncode == 0, result.stdout
    for name in ("prompts.json",):
        recorded = (GOLDEN / name).read_text()
        (tmp_path / name).write_text(recorded.replace("curious user", "curious reader"))
    result = pdrop("check", tmp_path)
    assert result.returncode == 1
    assert "FAIL" in result.stdout
