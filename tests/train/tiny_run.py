"""A data set, a model and a recipe so small that a whole run takes seconds."""

import dataclasses
import json
import pathlib
import struct

import jax
from PIL import Image

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.model.params import init_params
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, RunRecipe
from pdrop_jax.train.stopping import StopRequest

BLOCK = 2**15
QUESTIONS = 6
TIMES = ("seconds", "data_seconds", "compute_seconds", "tokens_per_second", "pictures_per_second")
TOKENIZER = pathlib.Path(__file__).parents[2] / "examples/tiny_tokenizer"
CONFIG = LlavaConfig(
    vision=VisionConfig(28, 7, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),
    text=TextConfig(320, 32, 48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_length=256),
    schedule=DropSchedule((1,), (0.5,)),
    template="mistral_instruct",
)


def write_data(folder, rows=24, text_every=3):
    """Conversations about pictures of one colour, one row in ``text_every`` without."""
    (folder / "images").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (30, 20), (50 * number, 0, 90)).save(folder / f"images/{number}.png")
    records = []
    for number in range(rows):
        image = {"image": f"{number % 5}.png"} if number % text_every else {}
        question = "<image>\nWhat?" if image else "What?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"n{number % 7}"}]
        records.append({"id": number, "conversations": turns, **image})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def write_start(folder, config=CONFIG):
    checkpoint.save(folder, config, init_params(config, seed=1), companions=TOKENIZER)
    return folder


def recipe_in(folder, **changes):
    """The recipe of a run in ``folder``/run; ``changes`` as part_key=value."""
    data = DataRecipe(
        str(folder / "data/data.json"), str(folder / "data/images"), max_length=128, text_buckets=(48, 64)
    )
    model = ModelRecipe(str(folder / "start"), dtype="float32")
    run = RunRecipe(str(folder / "run"), batch_size=4, steps=6, save_every=2)
    recipe = Recipe(
        model,
        dataclasses.replace(data, template="mistral_instruct"),
        run,
        OptimizerRecipe(learning_rate=1e-2, warmup=0.0),
    )
    parts = {}
    for name, value in changes.items():
        part, _, key = name.partition("_")
        parts.setdefault(part, {})[key] = value
    changed = {part: dataclasses.replace(getattr(recipe, part), **keys) for part, keys in parts.items()}
    return dataclasses.replace(recipe, **changed)


def write_questions(folder):
    """Questions about the pictures of ``write_data``, and annotations in GQA's form."""
    lines = [{"question_id": n, "text": "What?", "image": f"{n % 5}.png"} for n in range(QUESTIONS)]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {str(n): {"answer": "n1", "types": {"structural": "query"}} for n in range(QUESTIONS)}
    (folder / "gqa.json").write_text(json.dumps(answers))


def evaluation_in(folder):
    """Changes of ``recipe_in`` for a run that answers these questions."""
    return {
        "evaluation_questions": str(folder / "q.jsonl"),
        "evaluation_benchmark": "gqa",
        "evaluation_annotations": str(folder / "gqa.json"),
        "evaluation_batch_size": 4,
        "evaluation_max_new_tokens": 4,
    }


def lines_of(folder):
    """The log in the folder of a run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    """Step and loss of each step in the log of a run's folder."""
    return [(line["step"], line["loss"]) for line in lines_of(folder) if "loss" in line]


def events(folder):
    return [(line["event"], line["step"]) for line in lines_of(folder) if "event" in line]


def scalars(folder):
    """The lines of a log by step, without times and without what every process compiles anew."""
    lines = [line for line in lines_of(folder) if line.get("event") != "compiled"]
    kept = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    return sorted(kept, key=lambda line: (line["step"], line.get("event", "")))


def compiled_in(folder):
    """Programs that the log of a run's folder says were compiled."""
    return [name for name, _ in events(folder)].count("compiled")


def arrays_of(folder):
    return jax.tree.map(jax.numpy.asarray, checkpoint.load(folder / "model")[1])


def stop_after(monkeypatch, steps):
    """Runs stop after that many steps, as if they had got a signal."""
    monkeypatch.setattr(StopRequest, "requested", lambda _, step: step == steps)


def wandb_history(run):
    """W&B's runs in the offline files of a run's folder: id -> (project, logged values)."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        name = None
        for content in _leveldb_records(path.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                name = record.run.run_id
                found.setdefault(name, (record.run.project, []))
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[name][1].append(items)
    return found


def _leveldb_records(data):
    """Records of LevelDB's log format: fragments with checksum, length and kind. None crosses a block's end."""
    at, record = 7, b""  # after W&B's header
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last of several
            yield record
            record = b""
