"""An estimate of the time that a compiled program takes on a device, by part of the model.

It is read from the text of the executable, which holds the compiler's estimate of each operation's cycles. Nothing has
run. Use it to compare two programs and to find what should not be there. What it assumes:

* Operations run one after another, each in the compiler's cycles at the chip's clock.
* An attention kernel, of which the compiler says nothing, takes as long as its products at the matrix unit's peak,
  with heads of 128 numbers at least, or its bytes at the memory's rate, whichever is longer. Its exponentials are not
  counted, which a tower's kernel may spend as long on.
* A collective takes as long as its bytes do on one ring of links in both directions, and nothing runs beside it.
  Those that the compiler has split into permutes, or starts within a fusion, run beside the other operations of the
  same loop body: what counts is how much longer all of them together take than these.
* Prefetches from memory run beside other work and take no time of their own.
* Where the compiler has no cycles to tell, the matrix unit or the memory at its peak, whichever takes longer.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from pdrop_jax.analysis.chips import CHIPS, Chip
from pdrop_jax.planner.hlo_text import Computation, Instruction, Module, Shape
from pdrop_jax.planner.traffic import hbm_bytes, products

SCOPES = ("tower", "drop", "attention", "norm", "head", "embed", "optimizer")  # the model's ``jax.named_scope``s
PARTS = (*SCOPES, "decoder products", "copies", "collectives", "other")  # in the order in which they are shown
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# They take no time, or it is counted where they start.
FREE = re.compile(
    r"parameter|get-tuple-element|tuple|bitcast|constant|after-all|partition-id|opt-barrier|iota|while|call|conditional"
    r"|.*-done"
)
UNKNOWN = 2**62  # from so many cycles on the compiler has none to tell
PREFETCHES = ("copy-start", "slice-start", "dynamic-slice-start")
SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")


@dataclasses.dataclass(frozen=True)
class Time:
    """Estimated milliseconds on a device.

    Attributes:
      matrix: products at the matrix unit's peak.
      memory: bytes to and from HBM at its rate, prefetches included.
      cycles: the compiler's cycles at the chip's clock; for attention kernels see the top of this module.
      links: collectives.
    """

    matrix: float = 0.0
    memory: float = 0.0
    cycles: float = 0.0
    links: float = 0.0

    def __add__(self, other: "Time") -> "Time":
        return Time(*(getattr(self, x.name) + getattr(other, x.name) for x in dataclasses.fields(self)))

    @property
    def total(self) -> float:
        return self.cycles + self.links


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated time of a program by part of the model; a decode program takes one step."""

    parts: dict[str, Time]

    @property
    def time(self) -> Time:
        return sum(self.parts.values(), Time())


def estimate(module: Module, chip: str) -> Estimate:
    """The estimate for a program compiled for devices of type ``chip``, such as "v5e"."""
    rates = CHIPS[chip]
    parts: dict[str, Time] = collections.defaultdict(Time)
    waiting: dict[int, float] = collections.defaultdict(float)  # of a computation: links less what runs beside them
    for x, computation, times in module.executed():
        if not FREE.fullmatch(x.opcode):
            time = _time(module, computation, x, rates)
            parts[_part(module, x, time)] += Time(*(times * value for value in dataclasses.astuple(time)))
            waiting[id(computation)] += times * (_beside(module, x, rates) - time.cycles)
    if longer := sum(max(0.0, left) for left in waiting.values()):
        parts["collectives"] += Time(links=longer)
    return Estimate({part: parts[part] for part in PARTS if part in parts})


def _time(module: Module, computation: Computation, x: Instruction, chip: Chip) -> Time:
    plain, int8 = products(module, computation, x)
    matrix = 2e3 * (plain / chip.flops + int8 / chip.int8_ops)
    memory = 1e3 * hbm_bytes(module, computation, x) / chip.hbm
    count = int(x.attribute(r'"estimated_cycles":"(\d+)"') or 0)
    cycles = 1e3 * count / chip.clock if count < UNKNOWN else max(matrix, memory)
    if x.opcode == "custom-call":
        kernel = x.attribute(r'custom_call_target="(\w+)"') == "tpu_custom_call"
        return Time(matrix, memory, max(matrix, memory)) if kernel else Time()
    if x.opcode in PREFETCHES:
        return Time(memory=memory)
    if x.opcode == "fusion" and x.attribute(r"kind=(\w+)") == "kCustom":
        # A TPU's reduce-scatter is a fusion of an all-reduce and a slice.
        sums = [y for name in x.called for y in module.computations[name] if y.opcode == "all-reduce"]
        return Time(cycles=cycles, memory=memory, links=sum(_links(y.bytes, _devices(y), chip) for y in sums))
    if x.opcode.removesuffix("-start") in COLLECTIVES:
        permute = x.opcode.startswith("collective-permute")
        return Time(memory=memory, links=0.0 if permute else _collective(x, chip))
    return Time(matrix, memory, cycles)


def _beside(module: Module, x: Instruction, chip: Chip) -> float:
    """Milliseconds of the collectives that ``x`` starts and that run beside other operations."""
    if x.opcode.startswith("collective-permute"):
        return 1e3 * sum(shape.bytes for shape in _results(x)) / chip.ici
    return sum(_collective(y, chip) for y in _started(module, x)) if x.opcode == "fusion" else 0.0


def _started(module: Module, fusion: Instruction) -> Iterator[Instruction]:
    """Collectives that a fusion starts; this and later fusions carry them on."""
    for inner in (module.computations[name] for name in fusion.called):
        for y in inner:
            if y.opcode == "fusion":
                yield from _started(module, y)
            elif y.attribute(r'custom_call_target="(\w+)"') == "AsyncCollectiveStart":
                yield from (inner.instructions[name] for name in y.operands)


def _collective(x: Instruction, chip: Chip) -> float:
    """Milliseconds of a collective other than a permute."""
    kind, devices = x.opcode.removesuffix("-start"), _devices(x)
    size = sum(shape.bytes for shape in _results(x)) * (devices if kind == "reduce-scatter" else 1)
    # A gather or a scatter sends its array once around the ring, a reduction does both.
    return {"all-reduce": 2.0, "all-to-all": 0.5}.get(kind, 1.0) * _links(size, devices, chip)


def _results(x: Instruction) -> tuple[Shape, ...]:
    """Shapes of a collective's results, which an instruction that starts it has behind those of the operands.

    Such an instruction also returns semaphores, which are no results.
    """
    shapes = tuple(shape for shape in x.shapes if shape.dims or shape.dtype != "u32")
    return shapes[len(shapes) // 2 :] if x.opcode.endswith("-start") and len(shapes) > 1 else shapes


def _links(size: int, devices: int, chip: Chip) -> float:
    """Milliseconds in which all but a device's own share of ``size`` bytes go once around a ring of ``devices``."""
    return 1e3 * size * (devices - 1) / devices / chip.ici


def _devices(x: Instruction) -> int:
    """Devices among which a collective runs, from its ``replica_groups`` in one of three notations."""
    if sizes := x.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(sizes)
    if group := x.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return len(group.split(","))
    mesh = dict(re.findall(r"'(\w+)'=(\d+)", x.attribute(r"replica_groups=mesh\[(.*?)\]")))
    axes = re.findall(r"'(\w+)'", x.attribute(r"replica_groups=mesh\[.*?\] \{(.*?)\}"))
    return math.prod(int(mesh[axis]) for axis in axes)


def _part(module: Module, x: Instruction, time: Time) -> str:
    if x.opcode.removesuffix("-start") in COLLECTIVES or time.links:
        return "collectives"
    if x.opcode == "copy" or x.opcode in PREFETCHES:
        return "copies"
    scope = _scope([x.attributes]) or _scope(y.attributes for name in x.called for y in module.computations[name])
    if x.opcode == "custom-call" and time.matrix and not scope:  # a kernel within ``shard_map``
        return "attention"
    if time.matrix and scope in ("", "norm"):  # a norm is often fused with the product behind it
        return "decoder products"
    return scope or "other"


def _scope(attributes: Iterable[str]) -> str:
    """The scope that most of some instructions name, empty if none names one."""
    names = (re.search(r'op_name="([^"]*)"', text) for text in attributes)
    found = collections.Counter(scope[1] for name in names if name and (scope := SCOPE.search(name[1])))
    return found.most_common(1)[0][0] if found else ""
