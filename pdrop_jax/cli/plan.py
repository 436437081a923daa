"""``pdrop plan``: whether a job fits a TPU slice, asked of the TPU compiler on this machine."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any, Literal

import tyro

from pdrop_jax.cli.options import Layers, Mesh, Ratios, mesh_sizes, progress, schedule_of
from pdrop_jax.errors import UserError


def run(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    topology: str,
    mode: Literal["train", "prefill", "decode"] = "train",
    mesh: Mesh = (),
    bucket: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TEXT [IMAGE …]")] = (128, 576),
    batch: int = 128,
    accumulate: int = 1,
    layers: Layers = None,
    ratios: Ratios = None,
    dense: bool = True,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compile a program for a TPU slice without one, and print what a device needs.

    Args:
      model: llava-1.5-7b, llava-1.5-13b, or a checkpoint, of which only the config is read.
      topology: chips, as v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x1.
      mode: a full fine-tune's step in bfloat16 with float32 masters and moments, or bfloat16 inference.
      mesh: devices along the axes data, fsdp and tensor; without it all along fsdp.
      bucket: text slots of a row, and tokens of each of its images.
      batch: rows of a step or a call, all devices together.
      accumulate: parts that a training step's rows are cut into.
      layers: drop image tokens after these many layers; without it the model's own schedule. "none" drops nothing.
      ratios: share of the image tokens kept at each drop.
      dense: compile the same without drops, beside it.
      json_output: print one JSON object instead of a table.
    """
    from pdrop_jax.analysis.plan import compile_report, devices_of

    devices = devices_of(topology)

    from pdrop_jax.analysis.cost import decode_macs, prefill_macs, training_macs
    from pdrop_jax.config import LlavaConfig
    from pdrop_jax.schedule import Bucket, DropSchedule
    from pdrop_jax.sharding import make_mesh
    from pdrop_jax.train.program import GROUPS, lowering

    names = {"llava-1.5-7b": LlavaConfig.llava_1_5_7b, "llava-1.5-13b": LlavaConfig.llava_1_5_13b}
    config = names[model]() if model in names else LlavaConfig.load(pathlib.Path(model))
    schedule = schedule_of(layers, ratios)
    config = config if schedule is None else dataclasses.replace(config, schedule=schedule)
    grid = make_mesh(mesh_sizes(mesh) or None, devices)
    cut = grid.shape["data"] * grid.shape["fsdp"] * (accumulate if mode == "train" else 1)
    if batch < 1 or batch % cut:
        raise UserError(f"{batch} rows cannot be cut into {cut} parts: choose a multiple of {cut}")
    shape = Bucket(bucket[0], tuple(bucket[1:]))
    variants = {"PyramidDrop" if config.schedule.layers else "dense": config}
    if dense:
        variants["dense"] = dataclasses.replace(config, schedule=DropSchedule.none())
    results: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        with progress(f"compiling {name}"):
            report = compile_report(lowering(mode, variant, grid, shape, batch, accumulate), topology)
        macs = {
            "train": lambda c: training_macs(c, shape, shape.text / 2, GROUPS),
            "prefill": lambda c: prefill_macs(c, shape).total,
            "decode": lambda c: decode_macs(c, shape),
        }[mode](variant)
        derived = {"fits": report.fits, "total_bytes": report.total_bytes, "macs": batch * macs / len(devices)}
        results[name] = {**dataclasses.asdict(report), **derived}
    if json_output:
        print(json.dumps({"topology": topology, "devices": len(devices), "mesh": dict(grid.shape), **results}))
        return
    print(f"{model}, {mode}, {len(devices)} devices of {topology}, mesh {dict(grid.shape)}, {batch} rows of {bucket}\n")
    print(_table(results))


def _table(results: dict[str, dict[str, Any]]) -> str:
    """A column for each variant; bytes and MACs are of one device."""
    gib = 2**30

    def verdict(x: dict[str, Any]) -> str:
        if not x["fits"]:
            return f"no: {x['excess_bytes'] / gib:.2f} GiB over {x['capacity_bytes'] / gib:.2f}"
        return f"yes: {x['total_bytes'] / gib:.2f} of {x['capacity_bytes'] / gib:.2f} GiB"

    def of(key: str, scale: float, unit: str) -> list[str]:
        return [f"{x[key] / scale:,.2f} {unit}" if x["fits"] or key == "macs" else "" for x in results.values()]

    rows = [
        ["", *results],
        ["---"] * (len(results) + 1),
        ["fits", *map(verdict, results.values())],
        ["arguments", *of("argument_bytes", gib, "GiB")],
        ["temporaries", *of("temporary_bytes", gib, "GiB")],
        ["output", *of("output_bytes", gib, "GiB")],
        ["MACs", *of("macs", 1e12, "T")],
    ]
    kinds = {kind: None for x in results.values() for kind, (count, _) in x["collectives"].items() if count}
    for kind in kinds:
        pairs = [x["collectives"].get(kind, (0, 0)) for x in results.values()]
        rows.append([f"{kind}, loops once", *(f"{count}, {size / gib:.2f} GiB" for count, size in pairs)])
    rows.append(["compiled in", *(f"{x['compile_seconds']:.0f} s" for x in results.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
