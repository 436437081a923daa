"""Commands and the workers of training start without torch, though it is installed here."""

import importlib
import json
import pathlib
import subprocess
import sys

from pdrop_jax.generation.pretrained import DEMO
from pdrop_jax.train.data.workers import in_order

PHOTO = pathlib.Path(__file__).parent / "golden/img_astronaut_square_small.png"
COMMAND = """
import importlib.util, sys
sys.argv = ["pdrop", *sys.argv[1:]]
from pdrop_jax.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, importlib.util.find_spec("torch") is not None, file=sys.stderr)
"""


def imported(module: str) -> tuple[bool, bool]:
    importlib.import_module(module)
    return "transformers" in sys.modules, "torch" in sys.modules


def test_a_command_answers_without_importing_torch_which_stays_importable():
    options = ["--model", DEMO, "--image", PHOTO, "--prompt", "Hi", "--max-new-tokens", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "generate", *options], capture_output=True, text=True, check=True
    )
    assert done.stderr == "False True\n"
    assert json.loads(done.stdout)["token_ids"]


def test_workers_import_pictures_without_torch():
    assert list(in_order(imported, ["pdrop_jax.inputs.images"] * 2, workers=2)) == [(True, False)] * 2


def test_converting_may_check_with_the_models_of_transformers():
    code = COMMAND.replace("finally:", "except SystemExit:\n    import transformers.utils").replace(
        '"torch" in sys.modules', "transformers.utils.is_torch_available()"
    )
    done = subprocess.run([sys.executable, "-c", code, "convert", "nowhere", "new"], capture_output=True, text=True)
    assert done.stderr.endswith("True True\n")


def test_a_transformers_that_is_there_already_stays_as_it_is():
    """Such as one that a user's main module imports, which worker processes import again."""
    code = (
        "import transformers\n"
        "from pdrop_jax.without_torch import want_no_torch\n"
        "want_no_torch()\n"
        "import pdrop_jax.inputs, torch"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
