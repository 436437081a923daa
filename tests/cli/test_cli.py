"""The ``pdrop`` command as a user types it: exit codes, what is printed where."""

import base64
import functools
import http.server
import io
import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from command import PDROP
from PIL import Image

from pdrop_jax.convert.importer import convert
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.download import DownloadRules, download
from pdrop_jax.schedule import DropSchedule

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PHOTO = GOLDEN / "img_astronaut_square_small.png"
TOKENIZER = ROOT / "examples" / "tiny_tokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    schedule = DropSchedule((2, 4, 6), (0.5, 0.25, 0.125))
    convert(GOLDEN / "model_mha", folder, tokenizer=TOKENIZER, schedule=schedule)
    return folder


def test_a_real_process_converts_and_answers(tmp_path):
    def real(*args: object) -> subprocess.CompletedProcess:
        command = [*PDROP, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    model = tmp_path / "model"
    schedule = ("--layers", 2, 4, 6, "--ratios", 0.5, 0.25, 0.125)
    converted = real("convert", GOLDEN / "model_mha", model, "--tokenizer", TOKENIZER, *schedule)
    assert "0.5 after 2, 0.25 after 4, 0.125 after 6" in converted.stdout
    answered = real("generate", "--model", model, "--image", PHOTO, "--prompt", "Hi", "--max-new-tokens", 4, "--json")
    assert (converted.stderr, answered.stderr) == ("", "")  # a pipe gets no progress
    assert len(json.loads(answered.stdout)["kept"]) == 3


def test_messages_are_asked_as_prompts_are(pdrop, model, tmp_path):
    """One conversation or a batch of them, the picture inside or beside; and its figure."""
    beside = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who is it?"}]}]
    inside = [{"role": "user", "content": [{"type": "image", "path": str(PHOTO)}, beside[0]["content"][1]]}]
    common = ("generate", "--model", model, "--max-new-tokens", 6, "--json")
    wanted = json.loads(pdrop(*common, "--image", PHOTO, "--prompt", "Who is it?").stdout)["token_ids"]
    file = tmp_path / "messages.json"
    for messages, options in ((beside, ("--image", PHOTO)), (inside, ("--picture", tmp_path / "kept.png"))):
        file.write_text(json.dumps(messages))
        assert json.loads(pdrop(*common, "--messages", file, *options).stdout)["token_ids"] == wanted
    assert Image.open(tmp_path / "kept.png").width
    file.write_text(json.dumps([inside, inside]))
    assert [row["token_ids"] for row in json.loads(pdrop(*common, "--messages", file).stdout)["rows"]] == [wanted] * 2


def test_an_image_at_a_url_is_downloaded_once(pdrop, model, tmp_path, monkeypatch):
    """Though it is read before the model is loaded, answered about, and drawn."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            requests.append(self.path)

    rules = DownloadRules(("127.0.0.1",))
    monkeypatch.setattr("pdrop_jax.inputs.encoded.download", functools.partial(download, rules=rules))
    serve = functools.partial(Handler, directory=GOLDEN)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{PHOTO.name}"
        contents = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Who is it?"}]
        file = tmp_path / "messages.json"
        file.write_text(json.dumps([{"role": "user", "content": contents}]))
        common = ("generate", "--model", model, "--max-new-tokens", 6, "--json")
        found = pdrop(*common, "--messages", file, "--picture", tmp_path / "kept.png")
        server.shutdown()
    assert requests == [f"/{PHOTO.name}"]
    wanted = pdrop(*common, "--image", PHOTO, "--prompt", "Who is it?")
    assert json.loads(found.stdout)["token_ids"] == json.loads(wanted.stdout)["token_ids"]


def test_an_image_on_stdin_or_in_a_data_url(pdrop, fails, model, monkeypatch):
    common = ("generate", "--model", model, "--prompt", "Who is it?", "--max-new-tokens", 6, "--json", "--image")
    wanted = json.loads(pdrop(*common, PHOTO).stdout)["token_ids"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PHOTO.read_bytes())))
    assert json.loads(pdrop(*common, "-").stdout)["token_ids"] == wanted
    url = "data:image/png;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    assert json.loads(pdrop(*common, url).stdout)["token_ids"] == wanted
    assert "the picture: cannot be read as a picture" in fails(*common, "-")  # nothing is left on stdin
    monkeypatch.setattr("pdrop_jax.cli.options.IMAGE_BYTES", 3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1234")))
    assert "stdin has more than 3 bytes" in fails(*common, "-")


def test_messages_that_are_none(fails, model, tmp_path):
    file = tmp_path / "messages.json"
    for content, words in (
        ("{}", "it holds a dict, expected a JSON list"),
        ("[]", "holds an empty list, expected messages"),
        ('[{"role": "user", "content": "a"}, 5]', "message 2 is a int: expected an object"),
        ('[{"role": "bot", "content": "a"}]', "message 1 has role 'bot'"),
    ):
        file.write_text(content)
        assert words in fails("generate", "--model", model, "--messages", file)
    for both in ((), ("--messages", file, "--prompt", "Hi")):
        assert "either questions, --prompt TEXT, or a" in fails("generate", "--model", model, *both)


def test_json_tells_what_was_kept(pdrop, model):
    result = pdrop(
        "generate", "--model", model, "--image", PHOTO, "--prompt", "Who is it?", "--max-new-tokens", 8, "--json"
    )
    assert result.code == 0, result.stderr
    answer = json.loads(result.stdout)
    text = answer["stage_lengths"][0] - 16
    assert answer["stage_lengths"] == [text + kept for kept in (16, 8, 4, 2)]
    assert [len(images[0]) for images in answer["kept"]] == [8, 4, 2]
    assert set(answer["kept"][2][0]) < set(answer["kept"][1][0]) < set(answer["kept"][0][0]) < set(range(16))
    assert 1 <= len(answer["token_ids"]) <= 8
    assert answer["prefill_seconds"] > 0
    assert answer["cache_bytes"] > 0
    assert answer["schedule"] == {"layers": [2, 4, 6], "ratios": [0.5, 0.25, 0.125], "positions": "dense"}


def test_a_batch_answers_as_each_question_alone(pdrop, model):
    questions = ("Who is it?", "What is the colour of the suit that she wears?")
    common = ("generate", "--model", model, "--image", PHOTO, "--max-new-tokens", 6, "--json", "--prompt")
    together = json.loads(pdrop(*common, *questions).stdout)["rows"]
    alone = [json.loads(pdrop(*common, question).stdout) for question in questions]
    assert [row["token_ids"] for row in together] == [answer["token_ids"] for answer in alone]
    assert [row["kept"] for row in together] == [answer["kept"] for answer in alone]


def test_int8_weights(pdrop, model):
    common = ("generate", "--model", model, "--image", PHOTO, "--max-new-tokens", 8, "--json", "--prompt", "Who is it?")
    answer = json.loads(pdrop(*common, "--quantize", "int8").stdout)
    expected = generate(load(model, quantize="int8"), ["Who is it?"], [PHOTO], Sampling(8))
    assert answer["token_ids"] == expected.token_ids[0]
    assert answer["kept"] == expected.kept[0]


def test_another_schedule_than_the_checkpoints_own(pdrop, model):
    result = pdrop(
        "generate", "--model", model, "--image", PHOTO, "--prompt", "Hi", "--layers", 3, "--ratios", 0, "--json"
    )
    answer = json.loads(result.stdout)
    assert answer["kept"] == [[[]]]
    assert answer["stage_lengths"][0] - answer["stage_lengths"][1] == 16


def test_another_score(pdrop, model):
    common = (
        "generate",
        "--model",
        model,
        "--image",
        PHOTO,
        "--prompt",
        "Hi",
        "--json",
        "--layers",
        3,
        "--ratios",
        0.25,
    )
    random, own = (json.loads(pdrop(*common, *more).stdout) for more in (("--score", "random"), ()))
    assert random["schedule"] == {"layers": [3], "ratios": [0.25], "positions": "dense", "score": "random"}
    assert len(random["kept"][0][0]) == len(own["kept"][0][0]) == 4
    assert random["kept"] != own["kept"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--layers", 4, 2, "--ratios", 0.5, 0.25), "ascend"),
        (("--layers", 2, 8, "--ratios", 0.5, 0.25), "decoder of 8 layers"),
        (("--layers", 2, 4, "--ratios", 0.25, 0.5), "must not increase"),
        (("--layers", 2, "--ratios", 1.5), "0..1"),
        (("--layers", 2, 4, "--ratios", 0.5), "one ratio for each layer"),
        (("--layers", 2), "belong together"),
        (("--layers", "two", "--ratios", 0.5), "integers"),
        (("--layers", "tokens-65"), "belong together: pass both, neither, or for layers alone one of none, paper"),
        (("--layers", 2, "--ratios", 0.5, "--score", "fastw"), "unknown score 'fastw': did you mean 'fastv'?"),
        (("--score", "fastv"), "score 'fastv' belongs to a schedule: pass layers too"),
        (("--layers", "tokens-64"), "decoder of 8 layers"),
        (("--max-new-tokens", 0), "max_new_tokens must be at least 1, got 0"),
        (("--top-p", 0), "top_p"),
        (("--attention", "splash"), "needs a TPU"),
        (("--attention", "cudnn"), "on a GPU"),
        (("--image", "nowhere.png"), "no such file"),
        (("--image", PHOTO, "--prompt", "<image> and <image>"), "2 <image> tags but 1 picture"),
        (("--prompt", "<image>\nWho?"), "1 <image> tag but 0 pictures"),
        (("--prompt", "word " * 3000), "positions"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(fails, model, args, words):
    args = args if "--prompt" in args else (*args, "--prompt", "Who is it?")
    assert words in fails("generate", "--model", model, *args)


def test_a_folder_that_is_no_checkpoint(fails, tmp_path):
    assert "is not a checkpoint" in fails("generate", "--model", tmp_path, "--prompt", "Hi")


def test_unreadable_and_odd_pictures(pdrop, fails, model, tmp_path):
    truncated = tmp_path / "half.jpg"
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:300])
    assert "half.jpg" in fails("generate", "--model", model, "--prompt", "Hi", "--image", truncated)
    for number, (mode, size) in enumerate([("L", (1, 1)), ("CMYK", (40, 30)), ("P", (9, 9)), ("RGBA", (20000, 10))]):
        odd = tmp_path / f"{number}.tif"
        Image.new(mode, size).save(odd)
        result = pdrop("generate", "--model", model, "--prompt", "Hi", "--image", odd, "--max-new-tokens", 1)
        assert result.code == 0, result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answers_of(model, questions):
    session = Session(load(model))
    return [session.ask(question, image, Sampling(4)).text for question, image in questions]


def test_chat_answers_line_by_line(pdrop, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Who is it?\n/image {PHOTO}\nAnd <image>?\n\nnot asked\n"))
    result = pdrop("chat", "--model", model, "--image", PHOTO, "--max-new-tokens", 4)
    assert (result.code, result.stderr) == (0, "")
    texts = answers_of(model, [("Who is it?", PHOTO), ("And <image>?", PHOTO)])
    assert result.stdout == "".join(text + "\n" for text in texts)


def test_a_mistake_ends_a_chat_from_a_pipe(pdrop, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image nowhere.png\nWho is it?\n"))
    result = pdrop("chat", "--model", model, "--max-new-tokens", 4)
    assert (result.code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere.png" in result.stderr


def test_a_chat_at_a_terminal_goes_on_after_a_mistake(pdrop, model, monkeypatch):
    lines = ["/image nowhere.png", "word " * 3000, "<image>", f"/image {PHOTO}", "Who is it?"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(lines)))
    result = pdrop("chat", "--model", model, "--max-new-tokens", 4)
    assert result.code == 0
    (text,) = answers_of(model, [("Who is it?", PHOTO)])
    assert result.stdout == "> " * 5 + text + "\n> "
    mistakes = [
        line for line in result.stderr.splitlines() if "nowhere" in line or "positions" in line or "tag" in line
    ]
    assert len(mistakes) == 3


def test_the_commands_of_a_chat(pdrop, model, monkeypatch):
    lines = ["/help", "/hlep", "/image", f"/image {PHOTO}", "/reset", "Who is it?", "/exit", "not asked"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(lines)))
    result = pdrop("chat", "--model", model, "--max-new-tokens", 4)
    assert result.code == 0
    (text,) = answers_of(model, [("Who is it?", None)])  # the image was reset
    about = (
        "/image FILE adds an image to the next question, /reset starts a new conversation, /help prints this, "
        "/exit ends the chat"
    )
    assert result.stdout == f"> {about}\n" + "> " * 5 + text + "\n> "
    assert result.stderr.splitlines()[:2] == [f"unknown command {line!r}: {about}" for line in ("/hlep", "/image")]


def test_unknown_commands_list_the_known_ones(pdrop):
    result = pdrop("trian")
    assert result.code == 2
    assert "generate" in result.stderr


def test_help_needs_neither_jax_nor_transformers():
    """Of any command: it answers at once."""
    code = """
import sys
from pdrop_jax.cli import COMMANDS, main
codes = set()
for command in ("", *COMMANDS):
    sys.argv = ["pdrop", *([command] if command else []), "--help"]
    try:
        main()
    except SystemExit as end:
        codes.add(end.code)
print(codes, "jax" in sys.modules, "transformers" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("{0} False False"), result.stdout[-200:]


def test_check_passes_on_the_recorded_vectors_and_fails_on_changed_ones(pdrop, tmp_path):
    result = pdrop("check", GOLDEN, "--case", "prompts", "image_preprocess")
    assert result.code == 0, result.stdout
    recorded = (GOLDEN / "prompts.json").read_text()
    (tmp_path / "prompts.json").write_text(recorded.replace("curious user", "curious reader"))
    result = pdrop("check", tmp_path)
    assert result.code == 1
    assert "FAIL" in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("none",), "none is neither a preset nor a file: the presets are llava-1.5-finetune"),
        (("none.toml",), "none.toml cannot be read: there is no such file"),
        (("llava-1.5-finetune",), "the recipe llava-1.5-finetune has no model.start"),
        (("llava-1.5-pretrain", "--set", "run.step=3"), "unknown key run.step: did you mean run.steps?"),
        (("llava-1.5-pretrain", "--set", "steps=3"), "--set 'steps=3' is not of the form section.key=value"),
        (
            ("llava-1.5-pretrain", "--num-processes", 2),
            "--coordinator, --num-processes and --process-id must be given together",
        ),
    ],
)
def test_training_that_cannot_begin(fails, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails("train", *args)
    assert line.startswith("pdrop train: ")
    assert words in line
    assert not list(tmp_path.iterdir())
