"""transformers' torch LLaVA (sdpa, dense, random weights), timed like ours."""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.device.limits import spread
from benchmarks.device.rows import DENSE, TORCH, Row
from benchmarks.device.shapes import (
    GROUPS,
    STEPS,
    Shape,
    configure,
    inference_layers,
    reason,
    shape_of,
    targets,
    training_batch,
)
from benchmarks.inference import make_batch, make_torch
from pdrop_jax.analysis.cost import cost_of, decode_macs, prefill_macs, training_macs


def torch_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Prefill, decode and a training step of the dense model, on the device that jax was measured on."""
    import torch

    if options.platform != "cpu" and not torch.cuda.is_available():
        yield {"part": "torch", "skipped": f"torch sees no {options.platform}"}
        return
    device = "cpu" if options.platform == "cpu" else "cuda"
    shape = shape_of(options)
    layers = inference_layers(shape, options.memory)
    model = _make(shape, layers, "bfloat16", device)
    for rows in options.batches:
        common = {"part": "torch", "model": TORCH, "batch": rows, "layers": layers}
        try:
            yield from ({**common, **row} for row in _time_inference(shape, layers, model, rows, device, options))
        except RuntimeError as error:
            yield from ({**common, "program": name, "error": reason(error)} for name in ("prefill", "decode"))
        _free()
    del model
    _free()
    layers = options.train_layers or shape.config.text.num_layers
    for rows in options.batches:
        common = {"part": "torch", "program": "train step", "model": TORCH, "batch": rows, "layers": layers}
        try:
            yield {**common, **_time_training(shape, layers, rows, device, options.repeats)}
        except RuntimeError as error:
            yield {**common, "error": reason(error)}
        _free()


def _make(shape: Shape, layers: int, dtype: str, device: str) -> Any:
    import torch

    with torch.device(device):
        return make_torch(configure(shape, DENSE, layers), dtype)


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _seconds(device: str, function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    import torch

    began = time.perf_counter()
    result = function(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def _inputs(batch: Any, model: Any, device: str) -> dict[str, Any]:
    import torch

    ids = np.where(np.asarray(batch.image_id) > 0, model.config.image_token_index, batch.token_ids)
    pixels = np.ascontiguousarray(np.asarray(batch.crops)[:, 0].transpose(0, 3, 1, 2))
    return {
        "input_ids": torch.as_tensor(ids, device=device, dtype=torch.long),
        "pixel_values": torch.as_tensor(pixels, device=device).to(model.dtype),
    }


def _time_inference(
    shape: Shape, layers: int, model: Any, rows: int, device: str, options: argparse.Namespace
) -> list[Row]:
    import torch

    config = configure(shape, DENSE, layers)
    inputs = _inputs(make_batch(config, shape.bucket, rows), model, device)

    def prefill() -> tuple[Any, Any]:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    def decode(token: Any, past: Any) -> None:
        for _ in range(shape.new_tokens - 1):
            out = model(input_ids=token, past_key_values=past, use_cache=True)
            token, past = out.logits[:, -1:].argmax(-1), out.past_key_values

    prefills, tokens = [], []
    with torch.inference_mode():
        for _ in range(options.repeats + 1):
            seconds, (token, past) = _seconds(device, prefill)
            prefills.append(seconds)
            seconds, _ = _seconds(device, decode, token, past)
            tokens.append(seconds / (shape.new_tokens - 1))
            del token, past
    sizes = {name: x.nbytes for name, x in model.named_parameters() if "embed_tokens" not in name}
    cached = rows * cost_of(config, shape.bucket).cache_bytes
    decoder = sum(size for name, size in sizes.items() if "vision_tower" not in name and "projector" not in name)
    return [
        {
            "program": "prefill",
            "seconds": spread(prefills[1:]),
            "flops": 2 * rows * prefill_macs(config, shape.bucket).total,
            "bytes": sum(sizes.values()) + cached,
        },
        {
            "program": "decode",
            "seconds": spread(tokens[1:]),
            "flops": 2 * rows * decode_macs(config, shape.bucket),
            "bytes": decoder + cached,
        },
    ]


def _time_training(shape: Shape, layers: int, rows: int, device: str, repeats: int) -> Row:
    """As ours: float32 weights and moments, bfloat16 products, activations recomputed, the vision tower frozen."""
    import torch

    model = _make(shape, layers, "float32", device).train()
    model.model.vision_tower.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0, fused=device == "cuda")
    batch = training_batch(shape, rows)
    inputs = _inputs(batch, model, device)
    inputs["labels"] = torch.as_tensor(np.asarray(batch.labels), device=device, dtype=torch.long)

    def run() -> None:
        for _ in range(STEPS):
            with torch.autocast(device, torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    times = [_seconds(device, run)[0] / STEPS for _ in range(repeats + 1)]
    config = configure(shape, DENSE, layers)
    return {
        "seconds": spread(times[1:]),
        "flops": 2 * rows * training_macs(config, shape.bucket, targets(shape.bucket), GROUPS),
        "bytes": 2 * 3 * sum(x.nbytes for x in trained),  # weights and two moments, read and written
    }
