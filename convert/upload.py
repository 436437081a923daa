"""Publishing an exported model on the Hugging Face Hub, with a model card."""

import importlib.metadata
import pathlib
import re

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hub_requests import ask
from pdrop_jax.convert.names import ONLY_HERE
from pdrop_jax.convert.provenance import Provenance, read_provenance
from pdrop_jax.errors import UserError
from pdrop_jax.model.compression import is_compressed
from pdrop_jax.schedule import DropSchedule

# Files of an earlier upload that this one does not replace would be read instead of its own.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "params/*", "sizes.json"]
REPLACED += ["checksums.json", "chat_template*"]
LIBRARIES = {"hf": "transformers", "original": "llava", "pdrop": "pdrop-jax"}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.A)


def make_repository(repo: str, private: bool) -> None:
    """Makes the repository unless it exists: before the export, so that it fails before any work if it has to.

    Raises:
      UserError: ``repo`` is not "owner/name", the user may not write there, or it exists and is public although
        ``private`` is asked for.
    """
    from huggingface_hub import HfApi

    if not _REPO.fullmatch(repo):
        raise UserError(f"--push-to-hub takes OWNER/NAME, got {repo!r}")
    ask(repo, lambda: HfApi().create_repo(repo, private=private or None, exist_ok=True), "created")
    if private and not ask(repo, lambda: HfApi().model_info(repo), "created").private:
        raise UserError(f"{repo} exists and is public: leave out --private, or make it private in its settings")


def upload(folder: pathlib.Path, repo: str) -> str:
    """Uploads ``folder`` as a commit to ``repo``. Returns the address of its web page.

    Raises:
      UserError: the upload failed; the line says how to go on.
    """
    from huggingface_hub import HfApi, constants

    def request() -> None:
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload from pdrop-jax", delete_patterns=REPLACED
        )

    try:
        ask(repo, request, "uploaded", bars=True)
    except UserError as error:
        raise UserError(f"{error}. The export is in {folder}: hf upload {repo} {folder}") from None
    return f"{constants.ENDPOINT}/{repo}"


def write_card(folder: pathlib.Path, model: pathlib.Path, repo: str, format: str) -> None:
    """Writes the model card, README.md, into the export ``folder`` of ``model``. UserError if a file is damaged."""
    from huggingface_hub import ModelCardData

    config, source = LlavaConfig.load(model), read_provenance(model)
    others = f"{ONLY_HERE[0].upper()}{ONLY_HERE[1:]}." if is_compressed(config) else OTHERS[format].format(repo=repo)
    schedule = config.schedule
    data = ModelCardData(
        library_name=LIBRARIES[format],
        pipeline_tag="image-text-to-text",
        base_model=source.checkpoint if source and source.commit else None,
        tags=["pdrop-jax", "pyramiddrop"],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo.partition('/')[2]}",
        _origin(model, source),
        _drops(schedule),
        f"With pdrop-jax:\n\n```python\n{_usage(repo, schedule, format)}\n```",
        others,
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


OTHERS = {
    "hf": "transformers runs the model without drops, because its format does not hold the schedule:\n\n```python\n"
    "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
    'model = AutoModelForImageTextToText.from_pretrained("{repo}")\n'
    'processor = AutoProcessor.from_pretrained("{repo}")\n```',
    "original": "The original LLaVA code runs the model without drops, because its format does not hold the schedule.",
    "pdrop": "transformers does not load this format. `pdrop export {repo} OUT --format hf` writes a copy that it "
    "loads and runs without drops.",
}


def _origin(model: pathlib.Path, source: Provenance | None) -> str:
    version = importlib.metadata.version("pdrop-jax")
    text = f"Written by pdrop-jax {version}."
    if source:
        text = f"Converted from {_named(source.checkpoint, source.commit)} by pdrop-jax {source.pdrop_jax}"
        if source.vision_tower:
            text += f", with the vision tower {_named(source.vision_tower, source.vision_commit)}"
        text += f", and written by pdrop-jax {version}."
    trained = checkpoint.training(model)
    return f"{text} Trained for {trained['step']:,} steps." if trained and "step" in trained else text


def _named(name: str, commit: str | None) -> str:
    return f"[{name}](https://huggingface.co/{name}), revision `{commit}`" if commit else f"the folder `{name}`"


def _drops(schedule: DropSchedule) -> str:
    if not schedule.layers:
        return "The model's drop schedule is dense: no image tokens are dropped."
    drops = [f"{ratio:.4g} of them after layer {n}" for n, ratio in zip(schedule.layers, schedule.ratios, strict=True)]
    return (
        "PyramidDrop drops the image tokens that the question attends to least. Of each image's tokens this model "
        f"keeps {', '.join(drops)} (score `{schedule.score}`, positions `{schedule.positions}`)."
    )


def _usage(repo: str, schedule: DropSchedule, format: str) -> str:
    given = "" if format == "pdrop" else f", pdrop_jax.{schedule!r}"  # the other formats do not hold the schedule
    return (
        f'import pdrop_jax\n\nmodel = pdrop_jax.load("{repo}"{given})\n'
        'pdrop_jax.generate(model, ["What is on the table?"], ["kitchen.jpg"]).texts'
    )
