"""``pdrop generate``: answer questions about pictures."""

import json
import pathlib
import sys
from typing import Annotated, Any, Literal

import tyro

from pdrop_jax.cli.options import Layers, Mesh, Ratios, SamplingOptions, mesh_sizes, progress
from pdrop_jax.errors import UserError, printable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import check_outputs
from pdrop_jax.schedule import parse_schedule


def run(
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT …]")],
    model: pathlib.Path | None = None,
    image: Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="FILE [FILE …]")] = (),
    video: Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="FRAME [FRAME …]")] = (),
    layers: Layers = None,
    ratios: Ratios = None,
    score: str | None = None,
    sampling: SamplingOptions = Sampling(),
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8"] | None = None,
    attention: Literal["auto", "xla", "blocked", "cudnn", "splash"] = "auto",
    mesh: Mesh = (),
    no_verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    picture: pathlib.Path | None = None,
    heatmap: pathlib.Path | None = None,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Answer one question, or several as one batch.

    Args:
      prompt: one question, or a batch of them.
      model: a checkpoint; without it the small demo model that comes with the package.
      image: all pictures of the question; with several questions one picture for all or one for each.
      video: frames of a video, in order, which are one image to the model; after the pictures of each question.
      layers: drop image tokens after these many layers; without it the checkpoint's own schedule. "none" drops nothing.
      ratios: share of the image tokens kept at each drop.
      score: what image tokens are chosen by, a name in pdrop_jax.model.scores; without it pyramiddrop.
      dtype: of the computation, without it the checkpoint's own.
      quantize: store the weights of the decoder's linear layers in this type; activations keep theirs.
      attention: implementation.
      mesh: devices along the axes data, fsdp and tensor, which share the work; without it one device.
      no_verify: load the weights without comparing them with their checksums.
      picture: file to draw the kept patches into, stage by stage; for one question.
      heatmap: file to draw the scores into that each drop went by; for one question.
      overwrite: replace the files of --picture and --heatmap if they are there.
      json_output: print one JSON object instead of text.
    """
    if picture or heatmap:
        _check_pictures(picture, heatmap, prompt, image, [*image, *video, *([model] if model else [])], overwrite)
    images = _images_of(prompt, image)

    from pdrop_jax.generation.engine import check_implementation, generate
    from pdrop_jax.generation.pretrained import DEMO, load
    from pdrop_jax.inputs.images import Video
    from pdrop_jax.sharding import make_mesh

    check_implementation(attention)
    if video:
        images = [[*entry, Video(video)] for entry in images]
    with progress("loading"):
        devices = make_mesh(mesh_sizes(mesh)) if mesh else None
        loaded = load(model or DEMO, parse_schedule(layers, ratios, score), dtype, devices, quantize, not no_verify)
    live = sys.stdout.isatty() and not json_output and len(prompt) == 1
    with progress("compiling and answering"):
        answer = generate(
            loaded,
            prompt,
            images,
            sampling,
            implementation=attention,
            stream=_print_piece if live else None,
        )
    if picture or heatmap:
        from pdrop_jax.analysis.figures import answer_picture, save_picture, score_picture

        if picture:
            save_picture(answer_picture(image, answer.kept[0], loaded.processor), picture, overwrite)
        if heatmap:
            save_picture(score_picture(image, answer.scores[0], loaded.processor), heatmap, overwrite)
    if json_output:
        print(printable(json.dumps(_as_json(answer, loaded.config), ensure_ascii=False)))
        return
    if live:
        print()
    else:
        print(*(printable(text, keep="\n\t") for text in answer.texts), sep="\n")
    if picture:
        counts = [sum(answer.image_tokens[0]), *(sum(map(len, images)) for images in answer.kept[0])]
        print(f"{printable(picture)}: image tokens of each stage, {' -> '.join(map(str, counts))}")


def _check_pictures(
    picture: pathlib.Path | None,
    heatmap: pathlib.Path | None,
    prompts: tuple[str, ...],
    images: tuple[pathlib.Path, ...],
    inputs: list[pathlib.Path],
    overwrite: bool,
) -> None:
    option = "--picture" if picture else "--heatmap"
    if len(prompts) != 1:
        raise UserError(f"{option} shows what one question keeps, but there are {len(prompts)}: ask one at a time")
    if not images:
        raise UserError(f"{option} shows what is kept of a picture, but there is none: give one, --image FILE")
    from pdrop_jax.analysis.figures import PICTURES

    check_outputs([(picture, PICTURES), (heatmap, PICTURES)], overwrite=overwrite, inputs=inputs)


def _images_of(prompts: tuple[str, ...], images: tuple[pathlib.Path, ...]) -> list[Any]:
    if len(prompts) == 1:
        return [list(images)]
    if len(images) in (0, 1):
        return [list(images)] * len(prompts)
    if len(images) != len(prompts):
        raise UserError(
            f"{len(prompts)} prompts but {len(images)} pictures: give none, one for all, or one for each prompt"
        )
    return [[path] for path in images]


def _print_piece(row: int, text: str) -> None:
    print(printable(text, keep="\n\t"), end="", flush=True)


def _as_json(answer: Any, config: Any) -> dict[str, Any]:
    """One object for the call. With one prompt it holds the answer itself, with several a list ``rows`` of them."""
    fields = zip(answer.texts, answer.token_ids, answer.stage_lengths, answer.kept, strict=True)
    names = ("text", "token_ids", "stage_lengths", "kept")
    rows = [dict(zip(names, row, strict=True)) for row in fields]
    return {
        **(rows[0] if len(rows) == 1 else {"rows": rows}),
        "schedule": config.schedule.to_json(),
        "compile_seconds": answer.compile_seconds,
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": answer.decode_seconds,
        "cache_bytes": answer.cache_bytes,
    }
