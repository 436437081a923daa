"""``pdrop plan``: ask the TPU compiler, on any machine, whether a job fits a TPU slice and how long it might take."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import tyro

from pdrop_jax.cli.options import (
    CompressVision,
    ConfigModel,
    File,
    Flag,
    Json,
    Layers,
    MergeSize,
    Quantize,
    QuantizeCache,
    Ratios,
    compressed,
    mesh_sizes,
    progress,
    unset,
)
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_output, write_file
from pdrop_jax.schedule import parse_schedule

MOST = 2**24  # rows, microbatches or tokens: larger values would overflow array sizes
TRAINING_ADVICE = "more microbatches (--grad-accum-steps), more devices along fsdp"
INFERENCE_ADVICE = "a smaller batch (--batch), more devices along tensor"


def run(
    topology: Annotated[str, tyro.conf.arg(metavar="NAME")],
    model: ConfigModel = "llava-1.5-7b",
    mode: Literal["train", "prefill", "decode"] = "train",
    mesh: Annotated[tuple[str, ...], unset("AXIS=N [AXIS=N …]")] = (),
    bucket: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TEXT [IMAGE …]")] = (128, 576),
    batch: int = 128,
    grad_accum_steps: int = 1,
    layers: Layers = None,
    ratios: Ratios = None,
    compress_vision: CompressVision = None,
    merge_size: MergeSize = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
    dense: bool = True,
    suggest: Flag = False,
    hlo: File = None,
    overwrite: Flag = False,
    json_output: Json = False,
) -> None:
    """Compile a program for a TPU slice on this machine and print the memory that each device needs and an estimate of
    the time that it takes. No TPU is used.

    Args:
      topology: TPU type and chip grid, e.g. v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x1, tpu7x:2x2x1.
      mode: Program to compile, in bfloat16. Full fine-tuning has float32 master weights and moments.
      mesh: Devices along the mesh axes data, fsdp and tensor (default: all along fsdp).
      bucket: Text tokens per row, followed by the number of tokens of each image.
      batch: Global batch size in rows.
      grad_accum_steps: Microbatches per training step.
      dense: Also compile the program without drops, for comparison.
      suggest: Try several meshes with several numbers of microbatches or, for inference, batch sizes, and print the
        best that fits for each mesh. The shortest estimated time per row comes first.
      hlo: Write the text of the compiled program, the one with drops, to this file.
      overwrite: Replace the --hlo file if it exists.
    """
    if (quantize or quantize_cache) and mode == "train":
        option = "--quantize" if quantize else "--quantize-cache"
        raise UserError(f"{option} applies to inference only: give --mode prefill or --mode decode")
    numbers = {"--bucket": bucket, "--batch": (batch,), "--grad-accum-steps": (grad_accum_steps,)}
    for option, values in numbers.items():
        if not values or not all(1 <= value <= MOST for value in values):
            raise UserError(f"{option} takes integers in 1..{MOST:,}, got {' '.join(map(str, values))}")
    axes, schedule = mesh_sizes(mesh), parse_schedule(layers, ratios)
    if hlo:
        check_output(hlo, overwrite=overwrite, inputs=[model])

    from pdrop_jax.planner.topology import devices_of

    devices = devices_of(topology)

    import jax

    from pdrop_jax.convert.pretrained import config_of
    from pdrop_jax.inputs.buckets import bucket_for
    from pdrop_jax.planner import programs
    from pdrop_jax.schedule import DropSchedule

    # What is compiled for chips that are not there could be kept, but not be read again.
    jax.config.update("jax_enable_compilation_cache", False)
    config = compressed(config_of(model), compress_vision, merge_size).with_cache_dtype(quantize_cache)
    config = config if schedule is None else dataclasses.replace(config, schedule=schedule)
    slots = bucket_for(bucket[0], bucket[1:], config)
    job = programs.Program(
        config=config,
        mode=mode,
        bucket=slots,
        rows=batch,
        grad_accum_steps=grad_accum_steps,
        groups=programs.groups_of(config),
        quantize=quantize,
    )

    def compiled(job: programs.Program, sizes: dict[str, int] | None) -> programs.CompiledProgram:
        where = f" on {_axes(sizes)}" if sizes else ""
        with progress(f"compiling {_name(job)}, batch {_rows(job.rows, job.grad_accum_steps)}{where}"):
            return programs.compile_program(job, sizes, topology, devices)

    if suggest:
        if mesh or hlo:
            raise UserError("--suggest compiles several programs on meshes of its choice: leave out --mesh and --hlo")
        plans = programs.suggest(job, len(devices), compiled)
    else:
        jobs = [job]
        if dense and config.schedule.layers:
            jobs.append(dataclasses.replace(job, config=dataclasses.replace(config, schedule=DropSchedule.none())))
        plans = [compiled(each, axes or None) for each in jobs]
    results = [_result(found, len(devices)) for found in plans]
    if hlo:
        if not results[0]["fits"]:
            raise UserError(f"the program does not fit, so there is no compiled text to write to {hlo}")
        write_file(hlo, plans[0].report.text, overwrite)
    compared = {} if suggest else _compared(results)
    if json_output:
        asked = {
            "model": model,
            "mode": mode,
            "topology": topology,
            "bucket": bucket,
            "quantize": quantize,
            "quantize_cache": quantize_cache,
        }
        print(json.dumps({**asked, **compared, "plans": results}))
        return
    stored = (f", {quantize}" if quantize else "") + (f", {quantize_cache} cache" if quantize_cache else "")
    print(f"{printable(model)}, {mode}, {len(devices)} devices of {topology}, bucket {bucket}{stored}\n")
    print(_table(results) if results else "The job does not fit on any mesh.")
    if compared.get("dense"):
        print(f"\n{_comparison(compared)}")
    if any(x["fits"] for x in results):
        print(f"\n{_parts(results)}")
    if not any(x["fits"] for x in results):
        advice = TRAINING_ADVICE if mode == "train" else INFERENCE_ADVICE
        print(f"\nThe job does not fit: try {advice}, a larger slice" + ("." if suggest else ", or --suggest."))


def _name(job: Any) -> str:
    return "PyramidDrop" if job.config.schedule.layers else "dense"


def _rows(rows: int, parts: int) -> str:
    return f"{rows} in {parts} microbatches" if parts > 1 else f"{rows}"


def _axes(sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _result(found: Any, devices: int) -> dict[str, Any]:
    job, report = found.job, found.report
    return {
        "model": _name(job),
        "mesh": found.mesh,
        "rows": job.rows,
        "grad_accum_steps": job.grad_accum_steps,
        "fits": report.fits,
        "moved_bytes": report.moved_bytes,
        "macs": job.macs / devices,
        **{key: value for key, value in dataclasses.asdict(report).items() if key not in ("text", "estimate")},
        "estimate_ms": round(report.estimate.time.total, 3) if report.fits else None,
        "estimate": _milliseconds(report.estimate) if report.fits else None,
    }


def _milliseconds(estimate: Any) -> dict[str, Any]:
    def rounded(time: Any) -> dict[str, float]:
        return {name: round(value, 3) for name, value in dataclasses.asdict(time).items()}

    return {**rounded(estimate.time), "parts": {part: rounded(time) for part, time in estimate.parts.items()}}


def _compared(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The estimate of the program that was asked for, and if there is one, of the dense program beside it."""
    ours, *others = results
    compared: dict[str, Any] = {"estimate_ms": ours["estimate_ms"]}
    if others:
        (dense,) = others
        compared["dense"] = {"estimate_ms": dense["estimate_ms"]}
        if ours["fits"] and dense["fits"]:
            compared["ratio"] = dense["estimate_ms"] / ours["estimate_ms"]
            compared["mac_ratio"] = dense["macs"] / ours["macs"]
    return compared


def _comparison(compared: dict[str, Any]) -> str:
    if "ratio" not in compared:
        return "One of the two programs does not fit, so their times are not compared."
    ratio, macs = compared["ratio"], compared["mac_ratio"]
    return (
        f"By the estimate the drops make it {ratio:.2f} x as fast, at {macs:.2f} x fewer MACs: {ratio / macs:.2f} of "
        "what the MACs promise."
    )


def _parts(results: list[dict[str, Any]]) -> str:
    """A Markdown table of the estimate by part of the model."""
    from pdrop_jax.planner.estimate import PARTS

    def cell(time: dict[str, float] | None) -> str:
        return f"{time['cycles'] + time['links']:.2f}" if time else ""

    fitting = [x for x in results if x["fits"]]
    rows = [["estimated ms", *(f"{x['model']}, {_axes(x['mesh'])}" for x in fitting)], ["---"] * (len(fitting) + 1)]
    for part in PARTS:
        times = [x["estimate"]["parts"].get(part) for x in fitting]
        if any(times):
            rows.append([part, *map(cell, times)])
    for name, what in (("matrix", "products at peak"), ("memory", "HBM traffic at peak"), ("links", "links")):
        rows.append([f"*of all: {what}*", *(f"{x['estimate'][name]:.2f}" for x in fitting)])
    return _markdown(rows)


def _table(results: list[dict[str, Any]]) -> str:
    """A Markdown table with a column for each program; bytes and MACs are per device."""
    gib = 2**30

    def verdict(x: dict[str, Any]) -> str:
        if not x["fits"]:
            return f"no: {x['excess_bytes'] / gib:.2f} GiB over {x['capacity_bytes'] / gib:.2f} GiB"
        return f"yes: {x['total_bytes'] / gib:.2f} of {x['capacity_bytes'] / gib:.2f} GiB"

    def of(key: str) -> list[str]:
        return [f"{x[key] / gib:.2f} GiB" if x["fits"] else "" for x in results]

    rows = [
        ["", *(x["model"] for x in results)],
        ["---"] * (len(results) + 1),
        ["mesh", *(_axes(x["mesh"]) for x in results)],
        ["batch", *(_rows(x["rows"], x["grad_accum_steps"]) for x in results)],
        ["fits", *map(verdict, results)],
        ["arguments", *of("argument_bytes")],
        ["temporaries", *of("temporary_bytes")],
        ["output", *of("output_bytes")],
        ["MACs", *(f"{x['macs'] / 1e12:,.2f} T, {x['macs'] / results[0]['macs']:.2f} x the first" for x in results)],
        ["estimated time", *(f"{x['estimate_ms']:.1f} ms" if x["fits"] else "" for x in results)],
        ["per row", *(f"{x['estimate_ms'] / x['rows']:.2f} ms" if x["fits"] else "" for x in results)],
    ]
    for kind in dict.fromkeys(kind for x in results for kind, (times, _) in x["collectives"].items() if times):
        pairs = [x["collectives"].get(kind, (0, 0)) for x in results]
        rows.append([kind, *(f"{times} x, {size / gib:.2f} GiB" for times, size in pairs)])
    rows.append(["communicated", *of("moved_bytes")])
    rows.append(["compiled in", *(f"{x['compile_seconds']:.0f} s" for x in results)])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
