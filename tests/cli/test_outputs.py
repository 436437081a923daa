"""Files that commands write: none replaces what it should not, and that is found before the model is loaded."""

import json
import os
import pathlib
import shutil

import pytest
from mutations import make_special
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
GRIDS = ROOT / "examples" / "grids"
DEMO = ROOT / "pdrop_jax" / "demo"

# Option that names an output -> the rest of the command, whose model cannot be loaded, and an ending that it takes.
GENERATE = ("generate", "--model", "model", "--prompt", "Who?", "--image", "images/0.png")
STUDY = ("study", "--model", "model", "--questions", "q.jsonl", "--images", "images")
EVAL = ("eval", "--model", "model", "--questions", "q.jsonl", "--images", "images")
OUTPUTS = {
    "generate --picture": (*GENERATE, "--picture"),
    "generate --heatmap": (*GENERATE, "--heatmap"),
    "study --out": (*STUDY, "--out"),
    "study --plot": (*STUDY, "--plot"),
    "study --html": (*STUDY, "--html"),
    "cost --plot": ("cost", "--model", "model", "--plot"),
    "eval --out": (*EVAL, "--out"),
}
ENDINGS = {"study --out": ".json", "study --html": ".html", "eval --out": ".jsonl"}
FOLDERS = {
    "convert": ("convert", "model"),
    "convert --llm": ("convert", "--llm", "model", "--vision", "model"),
    "export": ("export", "model", "--format", "hf"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """The current folder: a model that is none, a question about a picture, and what is no file."""
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "images", "folder"):
        os.mkdir(folder)
    pathlib.Path("model/params.png").touch()
    shutil.copy(GRIDS / "0.png", "images")
    lines = [json.dumps({"question_id": n, "text": "Who?", "image": "0.png"}) for n in range(2)]
    pathlib.Path("q.jsonl").write_text("\n".join(lines))


def content():
    return {str(path): path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


def make(kind, path):
    if kind in ("FIFO", "socket", "device", "folder"):
        make_special(kind, path, device="/dev/null")
    elif kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_an_output_that_is_no_file(output, kind, fails):
    path = pathlib.Path(f"special{ENDINGS.get(output, '.png')}")
    make(kind, path)
    before = content()
    for more in ((), ("--overwrite",)):
        assert f": {path} is a {kind}" in fails(*OUTPUTS[output], path, *more)
    assert content() == before
    assert path.exists()


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_is_read_by_the_same_command(output, fails):
    read = ["model/params.png", *(["images/0.png"] if "cost" not in output else [])]
    read += ["q.jsonl"] if output.startswith(("study", "eval")) else []
    for number, name in enumerate(read):
        path = pathlib.Path(f"{number}{ENDINGS.get(output, '.png')}")
        path.symlink_to(name)
        before = content()
        for more in (("--overwrite",),) if name.startswith("model") else ((), ("--overwrite",)):
            assert f": {path} is read by this command" in fails(*OUTPUTS[output], path, *more)
        assert content() == before
        assert path.is_symlink()


@pytest.mark.parametrize(
    "output", sorted(OUTPUTS.keys() - {"eval --out", "study --out"})
)  # these know their own answers
def test_an_output_that_is_there(output, fails):
    path = pathlib.Path(f"older{ENDINGS.get(output, '.png')}")
    make("file", path)
    words = f"{path} exists: choose another name, or replace the file with --overwrite"
    assert words in fails(*OUTPUTS[output], path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_may_be_goes_on_to_the_model(output, fails):
    name = f"new{ENDINGS.get(output, '.png')}"
    assert "model is not a checkpoint" in fails(*OUTPUTS[output], name)
    if output != "eval --out":
        assert f"there is no folder {pathlib.Path('nowhere')}" in fails(*OUTPUTS[output], f"nowhere/{name}")
        pathlib.Path(name).write_text("older")
        assert "model is not a checkpoint" in fails(*OUTPUTS[output], name, "--overwrite")
        assert pathlib.Path(name).read_text() == "older"


def test_two_outputs_of_one_name(fails):
    assert "used for two outputs" in fails(*OUTPUTS["generate --picture"], "a.png", "--heatmap", "./a.png")
    assert "used for two outputs" in fails(*OUTPUTS["study --out"], "a.png", "--plot", "a.png")


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_is_there_or_cannot_be(command, fails):
    make("FIFO", pathlib.Path("fifo"))
    make("nowhere", pathlib.Path("dangling"))
    pathlib.Path("file").touch()
    for path in ("folder", "fifo", "file", "dangling", "/dev/null"):
        assert f"{path} exists: remove it or choose another folder" in fails(*_with(FOLDERS[command], path))
    assert "file is not a folder" in fails(*_with(FOLDERS[command], "file/new"))


def _with(command, out):
    """OUT comes last, or with --llm it is the only folder."""
    return (command[0], out, *command[1:]) if "--llm" in command else (*command[:2], out, *command[2:])


def test_the_same_command_again_needs_to_be_told(pdrop, fails):
    drawn = ("generate", "--image", GRIDS / "0.png", "--prompt", "What is in row 1, column 1?", "--max-new-tokens", 1)
    outputs = ("--picture", "kept.png", "--heatmap", "link.png")
    pathlib.Path("link.png").symlink_to("folder/heat.png")
    assert pdrop(*drawn, *outputs).code == 0
    assert Image.open("folder/heat.png").size[0] > 0
    assert pathlib.Path("link.png").is_symlink()
    assert "kept.png exists" in fails(*drawn, *outputs)
    os.utime("kept.png", (1, 1))
    assert pdrop(*drawn, *outputs, "--overwrite").code == 0
    assert os.stat("kept.png").st_mtime > 1
    assert not list(pathlib.Path().rglob(".pdrop*"))


def test_an_answer_that_would_steer_the_terminal_is_shown(pdrop, monkeypatch):
    def decode(_, ids):
        return "a\x1b[2J\x9b\u202eb\nc"

    monkeypatch.setattr("pdrop_jax.inputs.processor.Processor.decode", decode)
    asked = ("generate", "--image", GRIDS / "0.png", "--prompt", "What is in row 1, column 1?", "--max-new-tokens", 1)
    assert pdrop(*asked).stdout == "a\\u001b[2J\\u009b\\u202eb\nc\n"
    assert json.loads(pdrop(*asked, "--json").stdout)["text"] == "a\x1b[2J\x9b\u202eb\nc"
