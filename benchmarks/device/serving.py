"""Continuous batching: requests for answers of different lengths, from an ``Engine`` and in fixed batches."""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.device.limits import spread
from benchmarks.device.ours import draw
from benchmarks.device.rows import DENSE, DROPS, Row
from benchmarks.device.shapes import Shape, configure, inference_layers, reason, shape_of
from benchmarks.device.source_tree import ROOT
from pdrop_jax.config import LlavaConfig
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import Model, arrange
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.images import load_image_processor
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.inputs.tokenizer import load_tokenizer

REQUESTS = 4  # for each slot
LONGEST = {"7b": 128, "tiny": 8}  # new tokens; lengths are drawn evenly from an eighth of it on
QUESTION = "What is on the table?"


def serving(options: argparse.Namespace) -> Iterator[Row]:
    """Requests a second, dense, with drops, and with drops in as much cache memory as the dense slots take."""
    if options.shape not in LONGEST:
        yield {"part": "serving", "skipped": f"there is no tokenizer for {options.shape}: choose --shape 7b"}
        return
    shape = shape_of(options)
    layers, memory = inference_layers(shape, options.memory), None
    for model in (DENSE, DROPS):
        loaded = make_model(configure(shape, model, layers))
        for more in (False, True) if model == DROPS else (False,):
            common = {"part": "serving", "model": model, "layers": layers}
            try:
                row = _time(loaded, shape, options, memory if more else None)
                memory = memory or row["cache_bytes"]  # of the dense slots
                yield common | row
            except RuntimeError as error:
                yield common | {"error": reason(error)}
                break  # there is no memory to compare with
        del loaded


def make_model(config: LlavaConfig) -> Model:
    """Random weights with the tokenizer of the recorded vectors, whose vocabulary the model gets."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "tokenizer.model").symlink_to(ROOT / "tests/golden/tokenizer/tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(place)
        text = dataclasses.replace(config.text, vocab_size=len(tokenizer))
        config = dataclasses.replace(config, text=text, eos_token_ids=())  # no answer ends before its length
        processor = Processor(config, tokenizer, load_image_processor(place, config))
    return Model(config, arrange(config, draw(config, "bfloat16")), processor)


def _time(model: Model, shape: Shape, options: argparse.Namespace, memory: int | None) -> Row:
    longest, buckets = LONGEST[options.shape], [dataclasses.replace(shape.bucket, text=64)]
    sizes = {"memory": memory} if memory else {"slots": options.slots}
    rng = np.random.default_rng(0)
    side = model.config.vision.crop_shape[0]
    began = time.perf_counter()
    with Engine(model, **sizes, max_new_tokens=longest, buckets=buckets, prefill_rows=8) as engine:
        engine.warm_up()
        compiled = time.perf_counter() - began
        count = REQUESTS * options.slots
        pictures = list(rng.integers(0, 255, (count, side, side, 3), np.uint8))
        lengths = rng.integers(longest // 8, longest + 1, count).tolist()
        times, waits = [], list[float]()
        for _ in range(options.repeats):
            began = time.perf_counter()
            handles = [
                engine.submit(QUESTION, picture, Sampling(length))
                for picture, length in zip(pictures, lengths, strict=True)
            ]
            answers = [handle.result() for handle in handles]
            times.append(time.perf_counter() - began)
            waits += [answer.first_token_seconds or 0 for answer in answers]
            assert [len(answer.token_ids) for answer in answers] == lengths
        found = {"slots": engine.slots, "cache_bytes": engine.memory}
    fixed = []
    for n in range(options.repeats + (memory is None)):  # the first run compiles
        began = time.perf_counter()
        for at in range(0, count, options.slots) if memory is None else ():
            part = slice(at, at + options.slots)
            generate(model, [QUESTION] * options.slots, pictures[part], Sampling(max(lengths[part])))
        if n:
            fixed.append(time.perf_counter() - began)
    jax.clear_caches()
    return {
        **found,
        "requests": count,
        "new_tokens": sum(lengths),
        "serving_seconds": spread(times),
        "first_token_seconds": spread(waits),
        "compile_seconds": compiled,
        **({"fixed_seconds": spread(fixed)} if memory is None else {}),
    }
