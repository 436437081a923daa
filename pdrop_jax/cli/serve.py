"""``pdrop serve``: answer over HTTP, in OpenAI's form."""

import importlib.util
import os
import pathlib
import sys
from typing import Annotated

import tyro

from pdrop_jax.cli.options import (
    Attention,
    Dtype,
    Mesh,
    NoVerify,
    Quantize,
    QuantizeCache,
    device_mesh,
    progress,
    unset,
)
from pdrop_jax.errors import UserError

MIB = 2**20


def run(
    model: Annotated[str | None, tyro.conf.Positional, unset("MODEL", "the demo model")] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    schedule: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME …]")] = ("own",),
    slots: int = 8,
    max_new_tokens: int = 256,
    max_prompt_tokens: Annotated[int | None, unset("N", "a large picture and 1024 tokens of text")] = None,
    images: int = 4,
    image_cache: Annotated[int, tyro.conf.arg(metavar="MIB")] = 0,
    prefix_cache: Annotated[int, tyro.conf.arg(metavar="MIB")] = 0,
    image_hosts: Annotated[tuple[str, ...], unset("HOST [HOST …]", "none")] = (),
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
    attention: Attention = "auto",
    mesh: Mesh = (),
    no_verify: NoVerify = False,
) -> int:
    """Answer questions about images over HTTP, in the form of OpenAI's chat completions.

    Needs the extra "serve". SIGTERM lets running answers finish. With the environment variable PDROP_API_KEY, clients
    have to send its value as their API key.

    Args:
      model: A converted or trained model, or a PyTorch checkpoint, which is converted when it is first used: a folder,
        or OWNER/NAME[@REVISION] on the Hugging Face Hub.
      host: Address to listen on; 0.0.0.0 is all of this machine's.
      port: Port to listen on; 0 takes a free one.
      schedule: Drop schedules that requests can choose from, the first by default: own is the model's, dense drops
        nothing, paper and tokens-N (an average of N image tokens over the layers) are budgets, and 8,16:0.5,0.25 are
        layers and ratios. Each has slots of its own; on CPUs and GPUs they share the weights.
      slots: Requests of each schedule that are answered at the same time.
      max_new_tokens: Largest number of tokens of an answer.
      max_prompt_tokens: Largest number of tokens of a prompt, images included.
      images: Largest number of images in a request.
      image_cache: Device memory of each schedule, in MiB, for the embeddings of images, so that an image that was there
        before is not encoded again.
      prefix_cache: Device memory of each schedule, in MiB, for the first stage of prompts up to their last image, so
        that another question about it reaches its first token sooner.
      image_hosts: Hosts that images may be downloaded from: names, *.NAME, addresses, or networks such as 10.0.0.0/8.
        Addresses that are not public have to be listed themselves.
    """
    missing = [name for name in ("fastapi", "uvicorn", "llguidance", "prometheus_client") if not _found(name)]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'pdrop-jax[serve]'")

    from pdrop_jax.convert.pretrained import DEMO, load
    from pdrop_jax.inputs.download import DownloadRules
    from pdrop_jax.serve.budgets import copied_bytes, models_for
    from pdrop_jax.serve.lifecycle import KEY, serve
    from pdrop_jax.serve.service import Service

    rules = DownloadRules(hosts=image_hosts)
    with progress("loading"):
        loaded = load(model or DEMO, None, dtype, device_mesh(mesh), quantize, not no_verify, quantize_cache)
        models = models_for(loaded, schedule)
    if copied := copied_bytes([loaded, *models.values()]):
        print(
            f"note: schedules that cut the layers differently hold {copied:,} bytes of weights twice", file=sys.stderr
        )
    service = Service(
        pathlib.PurePath(model or "demo").name,
        models,
        slots=slots,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        images=images,
        image_cache=image_cache * MIB,
        prefix_cache=prefix_cache * MIB,
        downloads=rules,
        implementation=attention,
    )
    return serve(service, host, port, os.environ.get(KEY) or None)


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
