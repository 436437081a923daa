"""Answers a question about each picture of a Parquet data set, on all workers of a Ray cluster.

    python -m examples.ray_batch pictures/ answers/ --prompt "What is in the picture?" --workers 8 --gpus 1
    python -m examples.ray_batch gs://bucket/vqa gs://bucket/out --prompt-column question --model ID --tpus 4

The data set is read, answered and written in pieces, so it may be larger than the cluster's memory. A worker that dies
is replaced and its pieces are answered again. The output has the columns of the input, ``answer``, and ``error`` for
pictures that cannot be read. A file _SUCCESS, written last, says that it is complete. Needs ``ray[data]``.
"""

import dataclasses
import sys
from typing import Annotated, Any

import numpy as np
import ray
import tyro

import pdrop_jax
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import open_image
from pdrop_jax.paths import as_path

MARK = "_SUCCESS"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Options of the command.

    Attributes:
      source: folder or file of Parquet.
      out: new folder for the answers.
      prompt: question about every picture, unless there is a column of questions.
      image_column: pictures as encoded bytes, or as Hugging Face datasets store them, {"bytes", "path"}.
      workers: processes with a model each.
      gpus, tpus: accelerators of each worker.
      address: of the cluster; by default the running one, or one on this machine.
    """

    source: Annotated[str, tyro.conf.Positional]
    out: Annotated[str, tyro.conf.Positional]
    prompt: str | None = None
    prompt_column: str | None = None
    image_column: str = "image"
    model: str | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    workers: int = 2
    gpus: float = 0
    tpus: float = 0
    address: str | None = None


class Answerer:
    """A worker: loads the model once and answers batches of rows."""

    def __init__(self, flags: Flags) -> None:
        self._flags = flags
        self._model = pdrop_jax.load(flags.model) if flags.model else pdrop_jax.load()
        self._sampling = pdrop_jax.Sampling(max_new_tokens=flags.max_new_tokens)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        pictures, errors = zip(*map(_opened, rows[self._flags.image_column]), strict=True)
        good = [n for n, error in enumerate(errors) if error is None]
        column = self._flags.prompt_column
        prompts = [self._flags.prompt] * len(errors) if column is None else rows[column].tolist()
        answers = [""] * len(errors)
        if good:
            found = pdrop_jax.generate(
                self._model, [prompts[n] for n in good], [pictures[n] for n in good], self._sampling
            )
            for n, text in zip(good, found.texts, strict=True):
                answers[n] = text
        return {**rows, "answer": np.array(answers, object), "error": np.array([e or "" for e in errors], object)}


def _opened(picture: Any) -> tuple[Any, str | None]:
    """(picture, None), or (None, what is wrong with it)."""
    content = picture.get("bytes") if isinstance(picture, dict) else picture
    if not isinstance(content, bytes):
        return None, "no picture"
    try:
        return open_image(content), None
    except UserError as error:
        return None, str(error)


def main(flags: Flags) -> None:
    if (flags.prompt is None) == (flags.prompt_column is None):
        raise UserError("say either --prompt, one question for all, or --prompt-column")
    out = as_path(flags.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{flags.out} is not empty: choose a new folder")
    ray.init(address=flags.address, log_to_driver=False, ignore_reinit_error=True)
    if (cpus := ray.cluster_resources().get("CPU", 0)) <= flags.workers:  # Ray Data would wait forever
        raise UserError(f"the cluster has {cpus:g} CPUs: {flags.workers} workers need one each, and reading one more")
    dataset = ray.data.read_parquet(flags.source)
    for column in filter(None, (flags.image_column, flags.prompt_column)):
        if column not in dataset.columns():
            raise UserError(f"{flags.source} has no column {column!r}, but {', '.join(dataset.columns())}")
    answered = dataset.map_batches(
        Answerer,
        fn_constructor_args=(flags,),
        batch_size=flags.batch_size,
        compute=ray.data.ActorPoolStrategy(size=flags.workers),
        num_cpus=1,
        num_gpus=flags.gpus or None,
        resources={"TPU": flags.tpus} if flags.tpus else None,
    )
    answered.write_parquet(flags.out)
    (out / MARK).write_text("")
    print(f"{flags.out}: complete", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(tyro.cli(Flags, description=__doc__))
    except UserError as error:
        sys.exit(f"ray_batch: {error}")
