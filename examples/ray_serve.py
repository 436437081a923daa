"""``pdrop serve`` in several replicas on a Ray cluster, behind Ray Serve's load balancer.

    python -m examples.ray_serve --model llava-hf/llava-1.5-7b-hf --schedule own dense --replicas 4 --gpus 1

A replica gets requests once it has compiled its programs. One that dies is replaced; its running requests end with an
error that clients retry, and the others answer in the meantime. Needs ``pip install 'pdrop-jax[serve]' 'ray[serve]'``.
"""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator

import ray
import tyro
from fastapi import FastAPI
from ray import serve

import pdrop_jax
from pdrop_jax.serve.app import create_app
from pdrop_jax.serve.budgets import models_for
from pdrop_jax.serve.service import Service


@dataclasses.dataclass(frozen=True)
class Flags:
    """Options of the command; ``gpus`` and ``tpus`` are those of a replica."""

    model: str | None = None
    schedule: tuple[str, ...] = ("own",)
    slots: int = 8
    max_new_tokens: int = 256
    max_prompt_tokens: int | None = None
    replicas: int = 2
    gpus: float = 0
    tpus: float = 0
    port: int = 8000
    address: str | None = None


def build(flags: Flags) -> FastAPI:
    """The application of a replica."""
    loaded = pdrop_jax.load(flags.model) if flags.model else pdrop_jax.load()
    service = Service(
        os.path.basename(flags.model or "demo"),
        models_for(loaded, flags.schedule),
        slots=flags.slots,
        max_new_tokens=flags.max_new_tokens,
        max_prompt_tokens=flags.max_prompt_tokens,
    )
    app = create_app(service, os.environ.get("PDROP_API_KEY") or None)
    started = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def once_compiled(app: FastAPI) -> AsyncIterator[None]:
        async with started(app):
            while service.state == "warming up":
                await asyncio.sleep(0.1)
            if service.state == "failed":
                raise RuntimeError("compiling the model's programs failed")
            yield

    app.router.lifespan_context = once_compiled
    return app


def application(flags: Flags) -> serve.Application:
    options = {"num_gpus": flags.gpus} if flags.gpus else {}
    options |= {"resources": {"TPU": flags.tpus}} if flags.tpus else {}
    deployment = serve.deployment(name="pdrop", num_replicas=flags.replicas, ray_actor_options=options)

    @deployment
    @serve.ingress(lambda: build(flags))  # called in each replica
    class Replica:
        pass

    return Replica.bind()


def main(flags: Flags) -> None:
    ray.init(address=flags.address)
    serve.start(http_options={"host": "0.0.0.0", "port": flags.port})
    serve.run(application(flags), name="pdrop", blocking=True)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
