"""Replays reference vectors recorded from the official PyTorch code and reports the differences.

Works with any folder in the format of tests/golden/README.md, on whatever accelerator jax finds.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.result import kept_tokens
from pdrop_jax.inputs.anyres import ImageTokens, tiled, whole
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import image_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.model.drop import DropRecord
from pdrop_jax.model.params import Params
from pdrop_jax.model.placement import place
from pdrop_jax.model.vlm import decode_step, forward, prefill
from pdrop_jax.parity.inputs import image_preprocess, preprocess_masks, prompts
from pdrop_jax.parity.report import Comparison, Figures, error
from pdrop_jax.parity.training import ToTorch, compare_training
from pdrop_jax.schedule import DropSchedule

Arrays = Mapping[str, np.ndarray]
QUERIES = 4  # at least the number of answers in any recorded conversation


class Reference(NamedTuple):
    """Access to PyTorch checkpoints, provided by the caller, and how their model is computed.

    Attributes:
      load: (checkpoint folder, schedule) -> config and parameters; their dtype is the compute dtype. ``TOLERANCE`` is
        for float32.
      to_torch: (config, parameters or gradients) -> arrays by their names in the official code.
      implementation: attention implementation, see ``model.attention``.
    """

    load: Callable[[pathlib.Path, DropSchedule], tuple[LlavaConfig, Params]]
    to_torch: ToTorch
    implementation: Implementation = "auto"


_forward = jax.jit(forward, static_argnames=("config", "implementation", "keep_hidden"))
_prefill = jax.jit(prefill, static_argnames=("config", "new_slots", "implementation"))
_decode_step = jax.jit(decode_step, static_argnames=("config",), donate_argnames=("state",))


def check(
    folder: pathlib.Path, reference: Reference, cases: Sequence[str] = (), mesh: Mesh | None = None
) -> list[Comparison]:
    """Replays the cases of ``folder``.

    Args:
      reference: reads the PyTorch checkpoints of the folder.
      cases: names of cases (default: all that can be replayed).
      mesh: mesh over which parameters and rows are sharded; None is one device.

    Raises:
      UserError: the folder has no case, or no case of a given name.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.json")) if kind_of(path) in KINDS}
    if not known:
        raise UserError(f"{folder} holds no reference vectors that can be replayed: expected NAME.json with NAME.npz")
    if missing := [case for case in cases if case not in known]:
        raise UserError(f"{folder} has no case {', '.join(missing)}: it has {', '.join(known)}")

    def load(folder: pathlib.Path, schedule: DropSchedule) -> tuple[LlavaConfig, Params]:
        config, params = reference.load(folder, schedule)
        return config, place(config, params, mesh) if mesh else params

    placed, rows = reference._replace(load=load), []
    where = jax.set_mesh(mesh) if mesh else contextlib.nullcontext()
    # The vectors are float32; the default precision of a TPU is bfloat16.
    with where, jax.default_matmul_precision("highest"):
        for case in cases or known:
            info = json.loads(known[case].read_text())
            arrays = folder / f"{case}.npz"
            rows.append(KINDS[info["kind"]](folder, info, dict(np.load(arrays)) if arrays.exists() else {}, placed))
    return rows


def kind_of(path: pathlib.Path) -> str | None:
    info = json.loads(path.read_text())
    return info.get("kind") if isinstance(info, dict) else None


def _prefill_case(folder: pathlib.Path, info: Any, arrays: Arrays, reference: Reference) -> Comparison:
    config, params = reference.load(folder / info["model_dir"], _schedule(info))
    batch = reference_batch(config, arrays)
    found = [_compare_forward(config, params, batch, arrays, reference.implementation)]
    if "vanilla_logits" in arrays:
        dense = reference.load(folder / info["model_dir"], DropSchedule.none())
        logits = {"logits": arrays["vanilla_logits"]}
        found.append(_compare_forward(*dense, batch, logits, reference.implementation))
    return Comparison.worst(info["case"], found)


def _decode_case(folder: pathlib.Path, info: Any, arrays: Arrays, reference: Reference) -> Comparison:
    config, params = reference.load(folder / info["model_dir"], _schedule(info))
    batch = reference_batch(config, arrays)
    return Comparison.worst(info["case"], [_compare_decode(config, params, batch, arrays, reference.implementation)])


def _schedules_case(folder: pathlib.Path, info: Any, arrays: Arrays, reference: Reference) -> Comparison:
    found = []
    for schedule in info["schedules"]:
        drops = DropSchedule(tuple(schedule["layer_list"]), tuple(schedule["ratios"]))
        config, params = reference.load(folder / info["model_dir"], drops)
        batch, own = reference_batch(config, arrays), _with_prefix(arrays, f"sched{schedule['index']}_")
        for compare in (_compare_forward, _compare_decode):
            found.append(compare(config, params, batch, own, reference.implementation))
    return Comparison.worst(info["case"], found)


def _vanilla_case(folder: pathlib.Path, info: Any, arrays: Arrays, reference: Reference) -> Comparison:
    config, params = reference.load(folder / info["model_dir"], DropSchedule.none())
    found = []
    for name, source in (("single", "prefill_single"), ("decode", "decode_greedy"), ("ragged", "prefill_batch_ragged")):
        batch = reference_batch(config, dict(np.load(folder / f"{source}.npz")))
        own = _with_prefix(arrays, f"{name}_")
        found.append(_compare_forward(config, params, batch, own, reference.implementation))
        if "tokens" in own:
            found.append(_compare_decode(config, params, batch, own, reference.implementation))
    return Comparison.worst(info["case"], found)


def _train_case(folder: pathlib.Path, info: Any, arrays: Arrays, reference: Reference) -> Comparison:
    config, params = reference.load(folder / info["model_dir"], _schedule(info))
    batch = reference_batch(config, arrays)
    found, drops = compare_training(
        config, params, batch, arrays, info, reference.to_torch, folder, reference.implementation
    )
    return Comparison.worst(info["case"], [found | _compare_drops(batch, drops, arrays)])


def _with_prefix(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


KINDS: dict[str, Callable[[pathlib.Path, Any, Arrays, Reference], Comparison]] = {
    "prefill_eval": _prefill_case,
    "prefill_eval_anyres": _prefill_case,
    "decode_eval": _decode_case,
    "prefill_eval_schedules": _schedules_case,
    "vanilla_llava": _vanilla_case,
    "image_preprocess": image_preprocess,
    "prompts": prompts,
    "train": _train_case,
    "train_preprocess": preprocess_masks,
}


def reference_batch(config: LlavaConfig, arrays: Arrays) -> Batch:
    """The batch of a case's ``input_ids`` (B, S) with image placeholders -200, and ``images`` (B, 3, h, w)."""
    mask = arrays.get("attention_mask", np.ones_like(arrays["input_ids"])).astype(bool)
    rows = []
    for b, (ids, valid) in enumerate(zip(arrays["input_ids"], mask, strict=True)):
        has_image = IMAGE_PLACEHOLDER in ids[valid]
        images = [_image_tokens(config, arrays, b)] if has_image else []
        labels = arrays["labels"][b][valid] if "labels" in arrays else None
        rows.append(Row(ids[valid].tolist(), images, labels))
    text = max(sum(i != IMAGE_PLACEHOLDER for i in row.ids) for row in rows)
    bucket = image_bucket(text, [[image.size for image in row.images] for row in rows], config)
    return assemble(rows, config, bucket, QUERIES if "labels" in arrays else 1)


def _image_tokens(config: LlavaConfig, arrays: Arrays, b: int) -> ImageTokens:
    """The image of row ``b``: "images" has one crop for each row, "images_{b}" all crops of row b."""
    if "images" in arrays:
        return whole(arrays["images"][b].transpose(1, 2, 0), config)
    height, width = arrays[f"raw_image_{b}_uint8"].shape[:2]
    return tiled(arrays[f"images_{b}"].transpose(0, 2, 3, 1), (height, width), config)


def _schedule(info: Any) -> DropSchedule:
    return DropSchedule(
        tuple(info["layer_list"]), tuple(info.get("image_token_ratio_list_with_leading_1", [1.0, 0.5, 0.25, 0.125])[1:])
    )


def _compare_forward(
    config: LlavaConfig, params: Params, batch: Batch, arrays: Arrays, implementation: Implementation
) -> Figures:
    """Compares the logits, the final norm, the layers' inputs and the drops that ``arrays`` has."""
    output = _forward(config, params, batch, implementation=implementation, keep_hidden=True)
    last = output.lengths[-1]
    found: Figures = {}
    if "logits" in arrays:
        found["logits"] = _valid_error(output.logits, arrays["logits"], last)
    hidden = []
    if "hs_final_norm" in arrays:
        hidden.append(_valid_error(output.buffer.hidden, arrays["hs_final_norm"], last))
    plan = config.schedule.plan(config.text.num_layers, batch.bucket)
    for stage, layer_inputs, length in zip(plan, output.layer_inputs, output.lengths, strict=True):
        for n in range(stage.num_layers):
            if (name := f"hs_in_layer{stage.start + n}") in arrays:
                hidden.append(_valid_error(layer_inputs[n], arrays[name], length))
    if hidden:
        found["hidden"] = max(hidden)
    return found | _compare_drops(batch, output.drops, arrays)


def _compare_drops(batch: Batch, drops: Sequence[DropRecord], arrays: Arrays) -> Figures:
    """Compares the recorded scores and kept tokens of each row at each drop."""
    drops = jax.device_get(drops)
    kept = kept_tokens(batch, drops)
    recorded = [(b, s) for b in range(len(kept)) for s in range(len(drops)) if f"s{s}_scores_b{b}" in arrays]
    if not recorded:
        return {}
    errors = [error(drops[s].scores[b][drops[s].image_id[b] > 0], arrays[f"s{s}_scores_b{b}"]) for b, s in recorded]
    equal = [kept[b][s] == [arrays[f"s{s}_kept_b{b}"].tolist()] for b, s in recorded]
    return {"scores": max(errors), "kept": all(equal)}


def _compare_decode(
    config: LlavaConfig, params: Params, batch: Batch, arrays: Arrays, implementation: Implementation
) -> Figures:
    """Compares greedy decoding of one row with the KV cache: the logits of each step and the tokens."""
    logits, state, drops = _prefill(config, params, batch, len(arrays["tokens"]), implementation=implementation)
    errors, tokens = [], []
    for step, expected in enumerate(arrays["step_logits"]):
        errors.append(error(logits[0], expected))
        tokens.append(int(jnp.argmax(logits[0])))
        logits, state = _decode_step(config, params, jnp.array(tokens[-1:]), state, jnp.int32(step))
    found = {"logits": max(errors), "tokens": tokens == arrays["tokens"].tolist()}
    return found | _compare_drops(batch, drops, arrays)


def _valid_error(ours: jax.Array, theirs: np.ndarray, length: jax.Array) -> float:
    """Largest absolute difference over the valid slots of each row; the reference has other padding."""
    return max(error(ours[b, :n], theirs[b, :n]) for b, n in enumerate(np.asarray(length)))
