"""The text of a compiled program (HLO), parsed as far as the planner needs it."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}

_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|(?:called|branch)_computations|(?:true|false)_computation)=(%[\w.-]+|\{[^}]*\})"
)
_NAMES = {"parameter", "tuple", "get-tuple-element", "bitcast"}  # of what is there already


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array; ``in_hbm`` is False for one that the compiler keeps in the chip's own memory (VMEM)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * BYTES.get(self.dtype, 4)


_COUNTERS = ((Shape("s32", ()),), (Shape("u32", ()),))  # limits of loops over layers and over pieces of a collective


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      shapes: of the result; several for a tuple.
      operands: names of instructions of the same computation.
      arguments: text between the parentheses, for example the value of a constant.
      attributes: text behind the parentheses.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [name for group in _CALLS.findall(self.attributes) for name in re.findall(r"%([\w.-]+)", group)]

    def attribute(self, pattern: str) -> str:
        """The first group of ``pattern`` in the attributes, empty if it is not there."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def root(self) -> Instruction:
        return next((x for x in self if x.is_root), list(self)[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program; the computation that runs is ``""``."""

    computations: dict[str, Computation]

    def executed(self, into_fusions: bool = False) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, its computation, how often it runs), with the bodies of loops as often as they run.

        A loop whose number of steps is not in the text, such as a decode loop, counts as one step. Of a conditional's
        branches the one with the largest results counts, such as that of a decode step that reads full caches.

        Args:
          into_fusions: also the instructions that fusions and reductions call.
        """

        def visit(name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
            computation = self.computations[name]
            for x in computation:
                yield x, computation, times
                if into_fusions or x.opcode in ("while", "call", "conditional"):
                    for callee in [max(x.called, key=self._written)] if x.opcode == "conditional" else x.called:
                        yield from visit(callee, times * self._trips(x))

        yield from visit("", 1)

    def _written(self, name: str) -> int:
        """Bytes of all results in a computation."""
        return sum(x.bytes for x in self.computations[name] if x.opcode not in _NAMES)

    def _trips(self, loop: Instruction) -> int:
        """Trip count of a loop over layers, microbatches or pieces of a collective; 1 for anything else."""
        condition = loop.attribute(r"condition=%([\w.-]+)")
        if loop.opcode != "while" or not condition:
            return 1
        names = [condition, *(callee for x in self.computations[condition] for callee in x.called)]
        limits = [limit for name in names for x in self.computations[name] if (limit := _scalar(x)) is not None]
        if len(limits) != 1:
            return 1
        # The compiler unrolls loops over pieces of a collective: their counter goes up by 2.
        counters = [x.attribute(r"index=(\d+)") for x in self.computations[condition] if x.shapes in _COUNTERS]
        index = next((int(number) for number in counters if number), 0)
        body = self.computations[loop.attribute(r"body=%([\w.-]+)")].instructions
        last = next((x for x in body.values() if x.is_root), None)
        counter = body.get(last.operands[index]) if last and index < len(last.operands) else None
        added = [_scalar(body[name]) for name in counter.operands if name in body] if counter else []
        return -(-limits[0] // next((step for step in added if step), 1))


def _scalar(x: Instruction) -> int | None:
    """The value of an integer constant, None for anything else."""
    return int(x.arguments) if x.opcode == "constant" and x.shapes in _COUNTERS and x.arguments.isdigit() else None


def parse(text: str) -> Module:
    computations: dict[str, dict[str, Instruction]] = {"": {}}
    current = computations[""]
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(", line):
            current = computations.setdefault("" if head[1] else head[2], {})
        elif found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            root, name, result, opcode, rest = found.groups()
            end = _closing(rest)
            current[name] = Instruction(
                name=name,
                opcode=opcode,
                shapes=shapes_of(result),
                operands=tuple(re.findall(r"%([\w.-]+)", rest[:end])),
                arguments=rest[:end],
                attributes=rest[end + 1 :],
                is_root=bool(root),
            )
    return Module({name: Computation(instructions) for name, instructions in computations.items()})


def shapes_of(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), not re.search(r"S\([1-9]", layout))
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _closing(text: str) -> int:
    """Index of the parenthesis that closes what was opened before ``text``."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)
