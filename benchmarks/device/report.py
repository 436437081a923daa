"""The Markdown of the accelerator benchmark, from its rows of figures."""

from typing import Any

from benchmarks.device.rows import DENSE, Row

DIFFERENCES = ("hidden", "scores", "logits", "loss", "gradients")
EXACT = ("kept", "tokens")
NOTES = """\
Figures are medians, with minimum and maximum in parentheses; the first run is not counted. The speed-up is over our
dense model. FLOP/s are twice the MACs of `pdrop_jax.analysis.cost`, which counts attention without the causal mask and
a training step without recomputation. Bytes are what a program has to move at least: prefill and decode read the
weights and write or read the KV cache, a training step reads and writes the trained weights and the optimizer's
moments. Shares are of the limits above.
"""
SERVING_NOTES = """\
All requests are made at once and ask for different numbers of new tokens, drawn evenly from an eighth of the largest
on. The engine begins a request as soon as a slot is free; in fixed batches of as many rows, each waits for its longest.
"""
PARITY_NOTES = """\
Largest absolute differences from the recorded vectors over all cases; gradients are relative to their largest value.
Only float32 is judged by the tolerances of `pdrop check`. In bfloat16 a near tie can keep another image token or decode
another token, and from there on different tokens are compared.
"""


def add_shares(row: Row, limits: Row | None) -> Row:
    """The timed row with its achieved FLOP/s and bytes/s, and their shares of the device's limits."""
    if "seconds" not in row:
        return row
    row = dict(row)
    for name in ("flops", "bytes"):
        rate = row[name] / row["seconds"]["median"]
        row[f"{name}_per_second"] = rate
        if limits:
            row[f"{name}_share"] = rate / limits[f"{name}_per_second"]["median"]
    return row


def markdown(rows: list[Row], command: str) -> str:
    """The document; parts that have not run are absent."""
    limits = next((row for row in rows if row["part"] == "limits" and "device" in row), None)
    timed = [row for row in rows if "program" in row]
    serving = [row for row in rows if row["part"] == "serving" and "skipped" not in row]
    parity = [row for row in rows if "cases" in row]
    skipped = [f"- {row['part']}: {row['skipped']}" for row in rows if "skipped" in row]
    blocks = [f"`{command}`"]
    if limits:
        blocks.append(_device(limits))
    if timed:
        blocks += [_timings(timed), NOTES.strip()]
    if serving:
        blocks += [_serving(serving), SERVING_NOTES.strip()]
    if parity:
        blocks += [_parity(parity), PARITY_NOTES.strip()]
    if skipped:
        blocks.append("Not measured:\n\n" + "\n".join(skipped))
    return "\n\n".join(blocks) + "\n"


def _device(limits: Row) -> str:
    memory = limits["memory_bytes"]
    versions = ", ".join(f"{name} {number}" for name, number in limits["versions"].items() if number)
    return (
        f"{limits['device']}{f', {memory / 2**30:.1f} GiB' if memory else ''}; {versions}.\n\n"
        f"Limits measured in the same run: {_range(limits['flops_per_second'], 1e-12)} TFLOP/s in a bfloat16 matrix "
        f"product of edge {limits['matrix_edge']:,}; {_range(limits['bytes_per_second'], 1e-9)} GB/s read and written "
        f"when copying {limits['copied_bytes'] / 2**20:,.0f} MiB."
    )


def _timings(rows: list[Row]) -> str:
    head = ["program", "model", "batch", "layers", "ms", "speed-up", "TFLOP/s", "share", "GB/s", "share"]
    lines = [[*head, "memory GB", "compile s"]]
    dense = {_same(row): row["seconds"]["median"] for row in rows if row["model"] == DENSE and "seconds" in row}
    for row in sorted(rows, key=lambda row: (PROGRAMS.index(row["program"]), row["batch"])):
        cells = [f"{row['program']}{' (a token)' * (row['program'] == 'decode')}", row["model"], row["batch"]]
        cells.append(row["layers"])
        if "error" in row:
            cells += [row["error"], *[""] * 7]
        else:
            cells.append(_range(row["seconds"], 1e3))
            cells.append(f"{dense[_same(row)] / row['seconds']['median']:.2f}" if _same(row) in dense else "")
            for name, scale in (("flops", 1e-12), ("bytes", 1e-9)):
                cells.append(_number(row[f"{name}_per_second"] * scale))
                cells.append(f"{row[f'{name}_share']:.0%}" if f"{name}_share" in row else "")
            cells.append(f"{row['memory_bytes'] / 1e9:.2f}" if row.get("memory_bytes") else "")
            cells.append(f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "")
        lines.append(cells)
    return _table(lines)


def _same(row: Row) -> tuple[Any, ...]:
    """What two rows have in common whose times may be compared."""
    return row["program"], row["batch"], row["layers"]


PROGRAMS = ("prefill", "decode", "train step")


def _serving(rows: list[Row]) -> str:
    head = ["model", "layers", "slots", "cache GB", "requests", "new tokens/s", "requests/s", "s to the first token"]
    lines = [[*head, "new tokens/s in fixed batches", "compile s"]]
    for row in rows:
        cells = [row["model"], row["layers"]]
        if "error" in row:
            cells += [row["error"], *[""] * 7]
        else:
            cells += [row["slots"], _number(row["cache_bytes"] / 1e9), row["requests"]]
            cells += [_rate(row["new_tokens"], row["serving_seconds"]), _rate(row["requests"], row["serving_seconds"])]
            cells.append(_range(row["first_token_seconds"], 1))
            cells.append(_rate(row["new_tokens"], row["fixed_seconds"]) if "fixed_seconds" in row else "")
            cells.append(f"{row['compile_seconds']:.0f}")
        lines.append(cells)
    return _table(lines)


def _rate(count: int, seconds: Row) -> str:
    """``count`` by seconds, as a range."""
    rates = {"median": count / seconds["median"], "min": count / seconds["max"], "max": count / seconds["min"]}
    return _range(rates, 1)


def _parity(rows: list[Row]) -> str:
    lines = [["attention", "dtype", *DIFFERENCES, *(f"{name}: equal cases" for name in EXACT), "within tolerance"]]
    for row in rows:
        cases, cells = row["cases"], [row["implementation"], row["dtype"]]
        for name in DIFFERENCES:
            found = [case[name] for case in cases.values() if name in case]
            cells.append(f"{max(found):.1e}" if found else "")
        for name in EXACT:
            found = [case[name] for case in cases.values() if name in case]
            cells.append(f"{sum(found)} of {len(found)}" if found else "")
        judged = row["dtype"] == "float32"
        cells.append(f"{sum(case.get('ok', False) for case in cases.values())} of {len(cases)}" if judged else "")
        lines.append(cells)
    errors = [
        f"- {row['implementation']}, {row['dtype']}, {name}: {case['error']}"
        for row in rows
        for name, case in row["cases"].items()
        if "error" in case
    ]
    return _table(lines) + ("\n\nCases that did not run:\n\n" + "\n".join(errors) if errors else "")


def _table(lines: list[list[Any]]) -> str:
    head, *body = ("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def _range(found: Row, scale: float) -> str:
    """``12.3 (12.1..12.9)``."""
    return "{} ({}..{})".format(*(_number(found[name] * scale) for name in ("median", "min", "max")))


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
