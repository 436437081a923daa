"""Load: ``pdrop serve``, dense and with drops, against a plain FastAPI around transformers' generate, in one run.

All serve the same float32 weights. Clients ask one question after the other about a picture and read the answer as a
stream; each answer has the same number of tokens, because the head scores the stop tokens 0. The contenders take turns
for each number of clients.

    python -m benchmarks.serving     # the demo model; 1, 4, 16 and 64 clients

A model of 135 million parameters for ``--model`` is made by ``benchmarks.random_tower`` and ``pdrop convert``.
"""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import tyro

from pdrop_jax import checkpoint
from pdrop_jax.config import config_of
from pdrop_jax.convert.exporter import export
from pdrop_jax.generation.engine import stop_ids_of
from pdrop_jax.generation.pretrained import DEMO, load

ROOT = pathlib.Path(__file__).parents[1]
PICTURE = "data:image/png;base64," + base64.b64encode((ROOT / "examples/grid.png").read_bytes()).decode()
QUESTION = "What is in row 3, column 2?"
CHAT = "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class Flags:
    model: pathlib.Path = DEMO
    clients: tuple[int, ...] = (1, 4, 16, 64)
    requests: int = 128  # for each contender and number of clients
    new_tokens: int = 32
    slots: int = 8
    json: bool = False


def messages(*pictures: str) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]


def write_endless(model: pathlib.Path, folder: pathlib.Path) -> None:
    """The same model in float32, whose answers do not stop before ``max_tokens``."""
    config, params = checkpoint.load(model, dtype=np.float32)
    stops = stop_ids_of(load(model))
    if config.text.tie_embeddings:  # it is the head
        params["embed"]["embedding"] = params["embed"]["embedding"].at[stops].set(0)
    else:
        params["head"]["kernel"] = params["head"]["kernel"].at[:, stops].set(0)
    checkpoint.save(folder, config, params, companions=model, single_file=True)


@contextlib.contextmanager
def running(*command: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The URL of a server that prints it last in its first line, and its process, once it is ready."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))}
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = []
        for line in process.stderr or ():
            said.append(line)
            if line.startswith("serving"):
                break
        else:
            raise RuntimeError("".join(said))
        url = line.split()[-1]
        threading.Thread(target=lambda: [sys.stderr.write(text) for text in process.stderr or ()], daemon=True).start()
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.2)
        yield url, process
    finally:
        process.terminate()
        process.wait()


def pdrop(folder: pathlib.Path, flags: Any, *options: str) -> tuple[str, ...]:
    """The command of ``pdrop serve`` for prompts with one picture."""
    sizes = ["--slots", str(flags.slots), "--max-new-tokens", str(flags.new_tokens), "--images", "1", "--port", "0"]
    image_tokens = config_of(str(folder)).image_tokens
    start = "from pdrop_jax.cli import main; main()"
    return ("-c", start, "serve", str(folder), *sizes, "--max-prompt-tokens", str(image_tokens + 64), *options)


def serve_transformers(folder: str) -> None:
    """A plain server: one request after the other through ``generate``, streamed."""
    import fastapi
    import torch
    import uvicorn
    from fastapi.concurrency import iterate_in_threadpool
    from fastapi.responses import StreamingResponse
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration, TextIteratorStreamer

    from pdrop_jax.serve.lifecycle import bind

    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    app, alone = fastapi.FastAPI(), asyncio.Lock()  # threads that wait for a lock would use up the server's

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post(CHAT)
    def chat(body: dict[str, Any]) -> StreamingResponse:
        image, text = body["messages"][0]["content"]
        picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))).convert("RGB")
        shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text["text"]}]}]
        prompt = processor.apply_chat_template(shown, add_generation_prompt=True)

        async def pieces() -> AsyncIterator[str]:
            async with alone:
                inputs = processor(images=picture, text=prompt, return_tensors="pt", add_special_tokens=False)
                streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
                options = {"max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": streamer}
                thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
                thread.start()
                async for piece in iterate_in_threadpool(streamer):
                    yield "data: " + json.dumps({"choices": [{"delta": {"content": piece}}]}) + "\n\n"
                thread.join()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    listening = bind("127.0.0.1", 0)
    print(f"serving on http://127.0.0.1:{listening.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first text of an answer, and to its end."""
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not first and line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                if choice["delta"].get("content"):
                    first = time.perf_counter() - began
    return first, time.perf_counter() - began


async def measure(url: str, body: dict[str, Any], clients: int, requests: int) -> dict[str, float]:
    """Clients that each ask one question after the other, ``requests`` in all."""
    times: list[tuple[float, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        await ask(client, body)

        async def work(count: int) -> None:
            for _ in range(count):
                times.append(await ask(client, body))

        began = time.perf_counter()
        await asyncio.gather(*(work(len(range(n, requests, clients))) for n in range(clients)))
        seconds = time.perf_counter() - began
    firsts = sorted(first for first, _ in times)
    return {
        "requests_per_second": len(times) / seconds,
        "first_token_ms": 1000 * statistics.median(firsts),
        "first_token_ms_95": 1000 * firsts[math.ceil(0.95 * (len(firsts) - 1))],
        "token_ms": 1000 * statistics.median((end - first) / (body["max_tokens"] - 1) for first, end in times),
    }


def main(flags: Flags) -> None:
    body = {"messages": messages(PICTURE), "stream": True, "temperature": 0, "max_tokens": flags.new_tokens}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        folder, exported = pathlib.Path(scratch) / "model", pathlib.Path(scratch) / "exported"
        write_endless(flags.model, folder)
        export(folder, exported, "hf")
        ours, _ = servers.enter_context(running(*pdrop(folder, flags, "--schedule", "own", "dense")))
        theirs, _ = servers.enter_context(running("-m", "benchmarks.serving", "--transformers", str(exported)))
        contenders = {
            "pdrop serve, PyramidDrop": (ours, {"pdrop": "own"}),
            "pdrop serve, dense": (ours, {"pdrop": "dense"}),
            "FastAPI and transformers, dense": (theirs, {}),
        }
        if not flags.json:
            print(f"{os.cpu_count()} cores, {flags.new_tokens} new tokens, {flags.slots} slots")
            print("| clients | server | requests/s | first token ms, median | 95 % | each further token ms |")
            print("|---|---|---|---|---|---|", flush=True)
        for clients in flags.clients:
            for name, (url, extra) in contenders.items():
                found = asyncio.run(measure(url, {**body, **extra}, clients, max(flags.requests, clients)))
                rate, first, late, token = found.values()
                line = f"| {clients} | {name} | {rate:.2f} | {first:.0f} | {late:.0f} | {token:.1f} |"
                print(json.dumps({"clients": clients, "server": name} | found) if flags.json else line, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--transformers"]:
        serve_transformers(sys.argv[2])
    else:
        main(tyro.cli(Flags))
