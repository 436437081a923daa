"""``pdrop generate``: answer questions about pictures."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from pdrop_jax.cli.options import (
    Attention,
    Dtype,
    File,
    Flag,
    Images,
    Json,
    Layers,
    Mesh,
    Model,
    NoVerify,
    Quantize,
    QuantizeCache,
    Ratios,
    SamplingOptions,
    Score,
    device_mesh,
    progress,
    read_images,
    unset,
)
from pdrop_jax.errors import UserError, printable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import check_outputs, read_json
from pdrop_jax.paths import as_path
from pdrop_jax.schedule import parse_schedule


def run(
    prompt: Annotated[tuple[str, ...], unset("TEXT [TEXT …]")] = (),
    messages: File = None,
    model: Model = None,
    image: Images = (),
    video: Annotated[tuple[pathlib.Path, ...], unset("FRAME [FRAME …]")] = (),
    layers: Layers = None,
    ratios: Ratios = None,
    score: Score = None,
    sampling: SamplingOptions = Sampling(),
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
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
      messages: JSON file with a conversation in place of --prompt: a list of messages in the form of OpenAI and Hugging
        Face, ending with the question; or a list of such lists, as a batch. Images are URLs or paths.
      image: Images of the question. With several questions: one image for all of them, or one for each. "-" is an image
        on stdin; data:, http:// and https:// URLs are read too.
      video: Frames of a video, in order, two a second. They count as one image and come after the images of each
        question.
      picture: Write a figure of the image patches kept at each stage (one question only).
      heatmap: Write a figure of the token scores behind each drop (one question only).
      overwrite: Overwrite existing --picture and --heatmap files.
    """
    prompts, pictures = _prompts_of(prompt, messages), read_images(image)
    if picture or heatmap:
        files = [found for found in pictures if not isinstance(found, str | bytes)]
        inputs = [*files, *video, *(as_path(name) for name in (model, messages) if name)]
        _check_pictures(picture, heatmap, len(prompts), bool(image or messages), inputs, overwrite)
    images = _images_of(len(prompts), pictures)

    from pdrop_jax.convert.pretrained import DEMO, load
    from pdrop_jax.generation.engine import check_implementation, generate
    from pdrop_jax.inputs.images import Video
    from pdrop_jax.inputs.messages import read_conversation

    check_implementation(attention)
    if video:
        images = [[*entry, Video(video)] for entry in images]
    # Invalid input fails before a model is loaded. URLs are downloaded here, so the results are passed on in place of
    # the arguments.
    prompts, shown = zip(*(read_conversation(*row) for row in zip(prompts, images, strict=True)), strict=True)
    with progress("loading"):
        devices = device_mesh(mesh)
        schedule = parse_schedule(layers, ratios, score)
        loaded = load(model or DEMO, schedule, dtype, devices, quantize, not no_verify, quantize_cache)
    live = sys.stdout.isatty() and not json_output and len(prompts) == 1
    with progress("compiling and answering"):
        answer = generate(
            loaded,
            prompts,
            shown,
            sampling,
            implementation=attention,
            stream=_print_piece if live else None,
        )
    if picture or heatmap:
        from pdrop_jax.analysis.figures import answer_picture, save_picture, score_picture

        drawn = [number for number, image in enumerate(shown[0]) if not isinstance(image, Video)]
        pictures = [shown[0][number] for number in drawn]
        if picture:
            kept = [[images[number] for number in drawn] for images in answer.kept[0]]
            save_picture(answer_picture(pictures, kept, loaded.processor), picture, overwrite)
        if heatmap:
            scores = [[images[number] for number in drawn] for images in answer.scores[0]]
            save_picture(score_picture(pictures, scores, loaded.processor), heatmap, overwrite)
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
    num_prompts: int,
    has_images: bool,
    inputs: list[pathlib.Path],
    overwrite: bool,
) -> None:
    option = "--picture" if picture else "--heatmap"
    if num_prompts != 1:
        raise UserError(f"{option} shows what one question keeps, but there are {num_prompts}: ask one at a time")
    if not has_images:
        raise UserError(f"{option} shows what is kept of a picture, but there is none: give one, --image FILE")
    from pdrop_jax.analysis.figures import PICTURES

    check_outputs([(picture, PICTURES), (heatmap, PICTURES)], overwrite=overwrite, inputs=inputs)


def _prompts_of(prompt: tuple[str, ...], messages: pathlib.Path | None) -> Sequence[Any]:
    """The questions or the conversations."""
    if bool(prompt) == bool(messages):
        raise UserError("give either questions, --prompt TEXT, or a conversation, --messages FILE")
    if messages is None:
        return prompt
    found = read_json(messages, list)
    if not found:
        raise UserError(f"{messages} holds an empty list, expected messages")
    return found if all(isinstance(entry, list) for entry in found) else [found]


def _images_of(num_prompts: int, images: list[Any]) -> list[Any]:
    if num_prompts == 1:
        return [list(images)]
    if len(images) in (0, 1):
        return [list(images)] * num_prompts
    if len(images) != num_prompts:
        raise UserError(
            f"{num_prompts} prompts but {len(images)} pictures: give none, one for all, or one for each prompt"
        )
    return [[image] for image in images]


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
