"""What a program needs on TPUs that are not there: compiled for their topology by libtpu, on this machine's CPU.

The compiler's own figures: bytes of a device, and the collectives, those of a loop's body times its turns. MACs come
from pdrop_jax.planner.topology import MEMORY
from pdrop_jax.planner.topology import MEMORY
from ``analysis.cost``: the compiler counts a loop's body once.
"""

import dataclasses
import math
import re
import time
from typing import Any

from pdrop_jax.planner.topology import MEMORY

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# An asynchronous one is counted where it is done: there its type is that of the result alone.
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-done)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLS = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=(%[\w.-]+|\{[^}]*\})")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a program, of each device.

    Attributes:
      argument_bytes: parameters, optimizer state, batch, caches.
      temporary_bytes: beside them while it runs.
      output_bytes: what is not written over an argument.
      total_bytes: of all that is alive at once, at the worst moment: what is done with makes room.
      capacity_bytes: of the device.
      excess_bytes: by how much it does not fit; 0 if it does. If not, the other figures are 0: there is no program.
      collectives: kind -> (how often it runs, bytes of all its results).
      compile_seconds: of lowering and compiling.
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
    """Compiles what ``lower()`` lowers, for the devices of ``topology``."""
    capacity = int(MEMORY[topology.partition(":")[0]] * 2**30)
    began = time.perf_counter()
    try:
        compiled = lower().compile()
    except Exception as error:
        excess = _excess(str(error))
        if not excess:
            raise
        return Report(0, 0, 0, 0, capacity, excess, {}, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return Report(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.peak_memory_in_bytes,
        capacity,
        0,
        collectives(compiled.as_text()),
        seconds,
    )


def _excess(message: str) -> int:
    """Bytes that the compiler says are missing, in either of its messages; 0 if it says nothing like that.

    "Used 17.2G of 15.75G hbm. Exceeded hbm capacity by 1.45G." and, of a kind of chip of its own, "the total memory
    required for HLO temporaries (256.00G) exceeds available HBM (94.75G)".
    """

    def size(number: str, unit: str) -> float:
        return float(number) * 2 ** (10 * " KMGT".index(unit or " "))

    if found := re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMGT]?)", message):
        return math.ceil(size(*found.groups()))
    if found := re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message):
        return math.ceil(size(*found.groups()[:2]) - size(*found.groups()[2:]))
    return 0


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> (how often it runs, bytes of all its results on one device) in a compiled program's text."""
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
                # The compiler cuts one into pieces that overlap with other work; all of them name its channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                found[key] = max(found.get(key, (kind, 0, 0)), (kind, times, times * size))
            turns = times * _turns(computations, line)
            for called in CALLS.findall(line):
                for callee in re.findall(r"%([\w.-]+)", called):
                    visit(callee, turns)

    visit("", 1)
    return {
        kind: (sum(t for k, t, _ in found.values() if k == kind), sum(n for k, _, n in found.values() if k == kind))
        for kind in COLLECTIVES
    }


def _bytes(dtype: str, dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(dtype, 4)


def _turns(computations: dict[str, list[str]], line: str) -> int:
    """Of a loop over layers or parts: the number that its condition compares with. 1 for any other instruction."""
    condition = re.search(r" while\(.*condition=%([\w.-]+)", line)
    limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition[1]])) if condition else []
    return int(limits[0]) if len(limits) == 1 else 1
