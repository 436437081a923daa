"""Memory and collectives of a program that libtpu compiles on this machine's CPU for a TPU topology.

All figures are the compiler's: bytes per device, and collectives, where those in a loop body are multiplied by the trip
count. MACs come from ``analysis.cost`` instead, because the compiler counts a loop body only once.
"""

import dataclasses
import math
import re
import time
from typing import Any

from pdrop_jax.planner.topology import MEMORY

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# An asynchronous collective is counted at its "-done" instruction, whose type is that of the result alone.
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-done)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLS = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=(%[\w.-]+|\{[^}]*\})")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclasses.dataclass(frozen=True)
class Report:
    """The compiler's report on a program, per device.

    Attributes:
      argument_bytes: parameters, optimizer state, batch and KV caches.
      temporary_bytes: scratch memory while the program runs.
      output_bytes: outputs that do not alias an argument.
      total_bytes: peak memory, with buffers freed after their last use.
      capacity_bytes: memory of one device.
      excess_bytes: memory missing on a device, 0 if the program fits. If it does not fit, nothing was compiled and the
        other figures, except ``capacity_bytes`` and ``compile_seconds``, are 0.
      collectives: kind -> (number of executions, bytes of all results).
      compile_seconds: time to lower and compile.
    """

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    total_bytes: int
    capacity_bytes: int
    excess_bytes: int
    collectives: dict[str, tuple[int, int]]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return not self.excess_bytes

    @property
    def moved_bytes(self) -> int:
        return sum(size for _, size in self.collectives.values())


def compile_report(lower: Any, topology: str) -> Report:
    """Compiles the program that ``lower()`` lowers for the devices of ``topology``, such as "v5e:4x8"."""
    capacity = int(MEMORY[topology.partition(":")[0]] * 2**30)
    began = time.perf_counter()
    try:
        compiled = lower().compile()
    except Exception as error:
        excess = _excess(str(error))
        if not excess:
            raise
        return Report(
            argument_bytes=0,
            temporary_bytes=0,
            output_bytes=0,
            total_bytes=0,
            capacity_bytes=capacity,
            excess_bytes=excess,
            collectives={},
            compile_seconds=time.perf_counter() - began,
        )
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return Report(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        total_bytes=memory.peak_memory_in_bytes,
        capacity_bytes=capacity,
        excess_bytes=0,
        collectives=collectives(compiled.as_text()),
        compile_seconds=seconds,
    )


def _excess(message: str) -> int:
    """Bytes that are missing according to the compiler's out-of-memory message; 0 for any other message.

    There are two forms: "Used 17.2G of 15.75G hbm. Exceeded hbm capacity by 1.45G." and, on some chips only, "the total
    memory required for HLO temporaries (256.00G) exceeds available HBM (94.75G)".
    """

    def size(number: str, unit: str) -> float:
        return float(number) * 2 ** (10 * " KMGT".index(unit or " "))

    if found := re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMGT]?)", message):
        return math.ceil(size(*found.groups()))
    if found := re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message):
        return math.ceil(size(*found.groups()[:2]) - size(*found.groups()[2:]))
    return 0


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Collectives in the text of a compiled program: kind -> (executions, bytes of all results on one device)."""
    computations, name = {"": list[str]()}, ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(", line):
            name = "" if head[1] else head[2]
            computations[name] = []
        computations[name].append(line)
    found: dict[str, tuple[str, int, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in computations[name]:
            if match := COLLECTIVE.search(line):
                result, kind = match.groups()
                size = sum(_bytes(dtype, dims) for dtype, dims in SHAPE.findall(result))
                # The compiler may split a collective into pieces that overlap with other work; the pieces share its
                # channel id, so the channel is counted once.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                found[key] = max(found.get(key, (kind, 0, 0)), (kind, times, times * size))
            trips = times * _trip_count(computations, line)
            for called in CALLS.findall(line):
                for callee in re.findall(r"%([\w.-]+)", called):
                    visit(callee, trips)

    visit("", 1)
    return {
        kind: (sum(t for k, t, _ in found.values() if k == kind), sum(n for k, _, n in found.values() if k == kind))
        for kind in COLLECTIVES
    }


def _bytes(dtype: str, dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(dtype, 4)


def _trip_count(computations: dict[str, list[str]], line: str) -> int:
    """Trip count of a loop over layers or microbatches, read from its condition; 1 for any other instruction."""
    condition = re.search(r" while\(.*condition=%([\w.-]+)", line)
    limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition[1]])) if condition else []
    return int(limits[0]) if len(limits) == 1 else 1
