"""What a request's images lost at each stage: the ``pdrop`` object of a response."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pdrop_jax.analysis.patches import View, views_of
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.requests import Completion
from pdrop_jax.inputs.frames import Standby
from pdrop_jax.inputs.images import Video, open_image


def details(budget: str, model: Model, engine: Engine, media: Sequence[Any], answer: Completion) -> dict[str, Any]:
    """See docs/guides/serve.md for the form."""
    schedule, processor = model.config.schedule, model.processor
    uncut = Video | Standby
    pictures = [crop for each in media for crop in ([each] if isinstance(each, uncut) else processor.with_crops(each))]
    tokens = [processor.tokens(picture, alone=len(pictures) == 1) for picture in pictures]
    ranked = sum(len(image) - image.standby for image in tokens)
    counts = [ranked, *(sum(map(len, images)) for images in answer.kept)]
    layers = schedule.layer_ranges(model.config.text.num_layers)
    images = []
    for number, (picture, image) in enumerate(zip(pictures, tokens, strict=True)):
        views = []
        if not isinstance(picture, uncut):
            kept = [np.arange(len(image)), *(np.array(at[number], int) for at in answer.kept)]
            scores = [at[number] for at in answer.scores]
            views = [_view(view, kept, scores) for view in views_of(open_image(picture), image, processor)]
        images.append({"tokens": len(image), "views": views})
    first = answer.first_token_seconds or answer.queue_seconds
    return {
        "budget": budget,
        "schedule": schedule.to_json(),
        "stages": [
            {"layers": list(edges), "tokens": length, "image_tokens": count}
            for edges, length, count in zip(layers, answer.stage_lengths, counts, strict=True)
        ],
        "images": images,
        "queue_ms": 1000 * answer.queue_seconds,
        "prefill_ms": 1000 * (first - answer.queue_seconds),
        "decode_ms": 1000 * (answer.seconds - first),
        "cached_tokens": answer.cached,
        "cache_bytes": engine.memory // engine.slots,
    }


def _view(view: View, kept: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> dict[str, Any]:
    heats = [view.hottest(each).reshape(-1) for each in scores]
    return {
        "picture": _data_url(view.picture),
        "rows": view.grid[0],
        "columns": view.grid[1],
        "kept": [np.flatnonzero(view.covered(tokens)[0]).tolist() for tokens in kept],
        "scores": [[None if np.isnan(x) else round(float(x), 8) for x in heat] for heat in heats],
    }


def _data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
