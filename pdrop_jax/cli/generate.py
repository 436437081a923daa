"""``pdrop generate``: answer questions about pictures."""

import json
import pathlib
import sys
from typing import Annotated, Any

import tyro

from pdrop_jax.cli.options import (
    Attention,
    Dtype,
    File,
    Flag,
    Json,
    Layers,
    Mesh,
    Model,
    NoVerify,
    Quantize,
    Ratios,
    SamplingOptions,
    Score,
    device_mesh,
    progress,
    unset,
)
from pdrop_jax.errors import UserError, printable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import check_outputs
from pdrop_jax.schedule import parse_schedule


def run(
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT …]")],
    model: Model = None,
    image: Annotated[tuple[pathlib.Path, ...], unset("FILE [FILE …]")] = (),
    video: Annotated[tuple[pathlib.Path, ...], unset("FRAME [FRAME …]")] = (),
    layers: Layers = None,
    ratios: Ratios = None,
    score: Score = None,
    sampling: SamplingOptions = Sampling(),
    dtype: Dtype = None,
    quantize: Quantize = None,
    attention: Attention = "auto",
    mesh: Mesh = (),
    no_verify: NoVerify = False,
    picture: File = None,
    heatmap: File = None,
    overwrite: Flag = False,
    json_output: Json = False,
) -> None:
    """Answer one question about images, or several questions as one batch.

    Args:
      prompt: Question, or a batch of questions.
      image: Images of the question. With several questions: one image for all of them, or one for each.
      video: Frames of a video, in order. They count as one image and come after the images of each question.
      picture: Write a figure of the image patches kept at each stage (one question only).
      heatmap: Write a figure of the token scores behind each drop (one question only).
      overwrite: Overwrite existing --picture and --heatmap files.
    """
    if picture or heatmap:
        _check_pictures(picture, heatmap, prompt, image, [*image, *video, *([model] if model else [])], overwrite)
    images = _images_of(prompt, image)

    from pdrop_jax.generation.engine import check_implementation, generate
    from pdrop_jax.generation.pretrained import DEMO, load
    from pdrop_jax.inputs.images import Video

    check_implementation(attention)
    if video:
        images = [[*entry, Video(video)] for entry in images]
    with progress("loading"):
        devices = device_mesh(mesh)
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
