"""A question file that is answered with the current parameters during training, and scored.

::

    RUN/evaluation/500.jsonl    answers after 500 steps, in LLaVA's format
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pdrop_jax.config import LlavaConfig
from pdrop_jax.eval.batching import answer_all, plan_batches
from pdrop_jax.eval.questions import Question, read_questions
from pdrop_jax.eval.scoring import score
from pdrop_jax.generation.pretrained import Model, arrange
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.io import write_file
from pdrop_jax.model.placement import place
from pdrop_jax.paths import as_path
from pdrop_jax.sharding import make_mesh
from pdrop_jax.train.model import for_inference
from pdrop_jax.train.recipe import EvaluationRecipe, Recipe
from pdrop_jax.train.step import TrainState, join

FOLDER = "evaluation"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Questions of a benchmark."""

    recipe: EvaluationRecipe
    questions: list[Question]
    processor: Processor
    folder: pathlib.Path

    def run(self, config: LlavaConfig, state: TrainState, mesh: Mesh, dtype: Any) -> Mapping[str, float]:
        """The scores of the answers with the parameters of ``state``; empty in processes other than the first.

        Several processes share the questions; each holds a whole copy of the parameters meanwhile.
        """
        params = for_inference(join(state.trained, state.frozen), dtype=dtype)
        me, processes = jax.process_index(), jax.process_count()
        if processes > 1:
            mesh = make_mesh(devices=jax.local_devices())
            params = place(config, multihost_utils.process_allgather(params, tiled=True), mesh)
        with jax.set_mesh(mesh):
            model = Model(config, arrange(config, params, mesh), self.processor, mesh)
            own = self._answers(model, self.questions[me::processes])
        texts = gather(own)
        if me:
            return {}
        answers = [""] * len(self.questions)
        for process, own in enumerate(texts):
            answers[process::processes] = own
        return self.score(answers, self.folder / f"{int(state.step)}.jsonl")

    def _answers(self, model: Model, questions: Sequence[Question]) -> list[str]:
        answers = [""] * len(questions)
        sampling = Sampling(max_new_tokens=self.recipe.max_new_tokens)
        if questions:
            for numbers, generation in answer_all(
                model, questions, batch_size=self.recipe.batch_size, sampling=sampling
            ):
                for number, text in zip(numbers, generation.texts, strict=True):
                    answers[number] = text
        return answers

    def score(self, answers: Sequence[str], path: pathlib.Path) -> Mapping[str, float]:
        """Writes answers to ``path`` and returns their scores by name.

        Raises:
          UserError: the annotations do not fit the questions.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"question_id": question.id, "prompt": question.text, "text": text}, ensure_ascii=False) + "\n"
            for question, text in zip(self.questions, answers, strict=True)
        ]
        write_file(path, "".join(lines), overwrite=True)
        wanted, benchmark, annotations = self.recipe, self.recipe.benchmark, self.recipe.annotations
        assert benchmark is not None  # the recipe has checked both
        assert annotations is not None
        report = score(benchmark, path, annotations, questions=wanted.questions, split=wanted.split)
        return {f"{benchmark}_{name}": value for name, value in report.values.items()}


def open_evaluation(recipe: Recipe, config: LlavaConfig) -> Evaluation | None:
    """Opens the questions of ``recipe.evaluation``; None if there are none.

    Raises:
      UserError: the questions or the annotations are invalid, or do not belong together; or a question does not fit the
        model.
    """
    wanted = recipe.evaluation
    if wanted.questions is None:
        return None
    questions = read_questions(wanted.questions, wanted.images or recipe.data.images or "", recipe.data.outside_images)
    processor = Processor.load(as_path(recipe.model.start), config)
    plan_batches(processor, questions, wanted.batch_size, wanted.max_new_tokens)
    evaluation = Evaluation(wanted, questions, processor, as_path(recipe.run.folder) / FOLDER)
    with tempfile.TemporaryDirectory() as scratch:  # finds out before the first step whether the annotations fit
        evaluation.score([""] * len(questions), pathlib.Path(scratch) / "answers.jsonl")
    return evaluation


def gather(texts: Sequence[str]) -> list[list[str]]:
    """The texts of each process, in all processes."""
    if jax.process_count() == 1:
        return [list(texts)]
    content = json.dumps(list(texts)).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(content))).tolist()
    padded = np.frombuffer(content.ljust(max(sizes)), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
