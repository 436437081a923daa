"""Memory, collectives and estimated time of a program that libtpu compiles on this machine's CPU for a TPU topology.

All figures are the compiler's: bytes per device, and collectives, where those in a loop body are multiplied by the trip
count. MACs come from ``analysis.cost`` instead, because the compiler counts a loop body only once.
"""

import dataclasses
import math
import re
import time
from typing import Any

from pdrop_jax.analysis.chips import CHIPS
from pdrop_jax.planner.estimate import COLLECTIVES, Estimate, estimate
from pdrop_jax.planner.hlo_text import Module, parse


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
      estimate: of the time that it takes, see ``planner.estimate``; None if the program does not fit.
      text: the compiled program.
    """

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    total_bytes: int
    capacity_bytes: int
    excess_bytes: int
    collectives: dict[str, tuple[int, int]]
    compile_seconds: float
    estimate: Estimate | None = None
    text: str = dataclasses.field(default="", repr=False)

    @property
    def fits(self) -> bool:
        return not self.excess_bytes

    @property
    def moved_bytes(self) -> int:
        return sum(size for _, size in self.collectives.values())


def compile_report(lower: Any, topology: str) -> Report:
    """Compiles the program that ``lower()`` lowers for the devices of ``topology``, such as "v5e:4x8"."""
    chip = topology.partition(":")[0]
    capacity = int(CHIPS[chip].memory * 2**30)
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
    memory, text = compiled.memory_analysis(), compiled.as_text()
    module = parse(text)
    return Report(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        total_bytes=memory.peak_memory_in_bytes,
        capacity_bytes=capacity,
        excess_bytes=0,
        collectives=collectives(module),
        compile_seconds=seconds,
        estimate=estimate(module, chip),
        text=text,
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


def collectives(module: Module) -> dict[str, tuple[int, int]]:
    """Collectives of a compiled program: kind -> (executions, bytes of all results on one device)."""
    found: dict[str, tuple[str, int, int]] = {}
    for x, _, times in module.executed(into_fusions=True):
        # An asynchronous collective is counted at its "-done" instruction, whose type is that of the result alone.
        kind = x.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            # The compiler may split a collective into pieces that overlap with other work; the pieces share its
            # channel id, so the channel is counted once.
            key = x.attribute(r"channel_id=(\d+)") or x.name
            found[key] = max(found.get(key, (kind, 0, 0)), (kind, times, times * x.bytes))
    return {
        kind: (sum(t for k, t, _ in found.values() if k == kind), sum(n for k, _, n in found.values() if k == kind))
        for kind in COLLECTIVES
    }
