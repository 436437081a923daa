"""pdrop-jax as an lmms-eval model, for all of its benchmarks, batched by bucket as in ``pdrop eval``.

::

    pip install 'pdrop-jax[lmms-eval]'
    python -m lmms_eval --model pdrop_jax --model_args pretrained=MODEL,layers=8/16/24,ratios=0.5/0.25/0.125 --tasks mme

Tried with lmms-eval 0.7.3, torch 2.13.0 and transformers 5.24.0. Only lmms-eval imports this module. It needs
torch, which computes nothing here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from pdrop_jax.config import CacheDtype, Quantization
from pdrop_jax.convert.pretrained import DEMO, load
from pdrop_jax.errors import UserError
from pdrop_jax.eval.batching import answer_all
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import parse_schedule

WINDOW = 32  # batches whose images are in memory at a time, since tasks hand them over decoded


class PdropJax(lmms):
    """The lmms-eval model. Its arguments are those of ``--model_args``; lists are written with slashes.

    As in lmms-eval's own LLaVA model, a task's ``until`` does not truncate answers.

    Args:
      pretrained: checkpoint folder or Hub id; None is the demo model.
      layers: "8/16/24", "none" to drop nothing, or a name in ``schedule.PRESETS``; None is the checkpoint's schedule.
      ratios: "0.5/0.25/0.125".
      score: a name in ``model.scores``.
      dtype: "float32" or "bfloat16"; None is the checkpoint's dtype.
      quantize, quantize_cache: see ``pdrop_jax.load``.
      batch_size: ``--batch_size``.
      max_batch_size, device: passed by lmms-eval to every model; unused.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        layers: str | int | None = None,
        ratios: str | float | None = None,
        score: str | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        quantize: Quantization | None = None,
        quantize_cache: CacheDtype | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        schedule = parse_schedule(words(layers), words(ratios), score)
        self.model = load(pretrained or DEMO, schedule, dtype, quantize=quantize, quantize_cache=quantize_cache)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answer to each request, in order."""
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answering", unit=" questions", disable=self.rank != 0) as bar:
            for sampling, numbers in self._windows(requests):
                questions = [self._question(requests[n]) for n in numbers]
                for asked, generation in answer_all(
                    self.model, questions, batch_size=self.batch_size, sampling=sampling
                ):
                    for at, text in zip(asked, generation.texts, strict=True):
                        context, kwargs = requests[numbers[at]].args[:2]
                        self.cache_hook.add_partial("generate_until", (context, kwargs), text)
                        texts[numbers[at]] = text
                    bar.update(len(asked))
        return texts

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises UserError: multi-round tasks are not supported."""
        raise UserError("pdrop_jax does not support multi-round tasks: choose tasks that generate_until")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raises UserError: given answers cannot be ranked."""
        raise UserError("pdrop_jax does not support ranking of given answers: choose tasks that generate_until")

    def _windows(self, requests: Sequence[Instance]) -> Iterator[tuple[Sampling, list[int]]]:
        """Positions of requests that are answered together, with the sampling that they ask for."""
        alike: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(sampling_of(request.args[1]), []).append(number)
        size = self.batch_size * WINDOW
        for sampling, numbers in alike.items():
            yield from ((sampling, numbers[at : at + size]) for at in range(0, len(numbers), size))

    def _question(self, request: Instance) -> Question:
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        visuals = visuals if isinstance(visuals, list | tuple) else [visuals]
        return Question(doc_id, context, tuple(x for x in visuals if x is not None), where=f"task {task}")


def sampling_of(kwargs: Mapping[str, Any]) -> Sampling:
    """A task's ``generation_kwargs``. What it leaves out is greedy decoding of up to 128 tokens.

    Raises:
      UserError: a value is out of range.
    """
    given: dict[str, Any] = {"max_new_tokens": int(kwargs.get("max_new_tokens") or 128)}
    if kwargs.get("temperature") and kwargs.get("do_sample", True):
        given |= {name: kwargs[name] for name in ("temperature", "top_k", "top_p") if kwargs.get(name)}
    return Sampling(**given)


def words(value: str | int | float | None) -> list[str] | None:
    """Splits "8/16" into ["8", "16"]; lmms-eval parses a single number as a number."""
    return None if value is None else str(value).split("/")
