"""Matrix products and memory traffic of one instruction of a compiled program."""

import functools
import math
import re

from pdrop_jax.planner.hlo_text import Computation, Instruction, Module, Shape, shapes_of

LANES = 128  # of a register, and a side of the matrix unit, or half of one
INT8 = ("s8", "u8", "s4", "u4")


def products(module: Module, computation: Computation, x: Instruction) -> tuple[float, float]:
    """Multiply-accumulates of ``x`` and what it calls, (bfloat16 or float32, int8)."""
    if x.opcode == "convolution":
        left, right = (computation.instructions[name].shapes[0] for name in x.operands[:2])
        return _by_dtype(left, _convolution(left, right, x.shapes[0], x.attributes))
    if x.opcode == "dot":
        left = computation.instructions[x.operands[0]].shapes[0]
        contracted = x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        size = math.prod(left.dims[int(n)] for n in contracted.split(",") if n)
        return _by_dtype(left, math.prod(x.shapes[0].dims) * size)
    if x.opcode == "custom-call":
        return _attention_kernel(x), 0.0
    if x.opcode not in ("fusion", "async-start"):
        return 0.0, 0.0
    inner = [module.computations[name] for name in x.called if name in module.computations]
    counts = [products(module, called, y) for called in inner for y in called]
    return sum(plain for plain, _ in counts), sum(int8 for _, int8 in counts)


def _by_dtype(left: Shape, macs: float) -> tuple[float, float]:
    return (0.0, macs) if left.dtype in INT8 else (macs, 0.0)


def _attention_kernel(x: Instruction) -> float:
    """MACs of a splash attention kernel, of whose products the compiler says nothing, for all pairs of slots.

    A head of fewer than 128 numbers, such as a tower's, keeps the matrix unit as long as one of 128.
    """
    number = {"fwd": 2, "dq": 3, "dkv": 4}.get(next(iter(re.findall(r"splash_m[hq]a_(fwd|dq|dkv)", x.name)), ""), 0)
    operands = shapes_of(x.attribute(r"operand_layout_constraints=\{(.*?\})\}"))
    heads = [shape.dims for shape in operands if shape.dtype in ("bf16", "f32") and len(shape.dims) == 4]
    if not number or len(heads) < 2:
        return 0.0
    *rows, width = heads[0]
    return float(number * math.prod(rows) * -(-width // LANES) * LANES * heads[1][2])


@functools.cache
def _convolution(left: Shape, right: Shape, out: Shape, attributes: str) -> float:
    """MACs of a convolution, without those on padding: the compiler writes batched products as dilated convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        return 0.0
    lhs, rhs, result = labels.groups()
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]))
    groups = [int((re.search(rf"{kind}_group_count=(\d+)", attributes) or "01")[1]) for kind in ("feature", "batch")]
    pairs = 1
    for n in range(len(lhs) - 2):

        def of(key: str, default: str, n: int = n) -> str:
            return window[key].split("x")[n] if key in window else default

        size, stride = int(of("size", "1")), int(of("stride", "1"))
        dilation, spread = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
        low, length = int(of("pad", "0_0").split("_")[0]), left.dims[lhs.index(str(n))]
        outs, extent = out.dims[result.index(str(n))], (length - 1) * dilation + 1
        places = (o * stride + k * spread - low for k in range(size) for o in range(outs))
        pairs *= sum(0 <= place < extent and place % dilation == 0 for place in places)
    rows, features = left.dims[lhs.index("b")] // groups[1], left.dims[lhs.index("f")] // groups[0]
    return float(pairs * rows * features * right.dims[rhs.index("o")])


def hbm_bytes(module: Module, computation: Computation, x: Instruction) -> int:
    """Bytes that ``x`` reads from and writes to HBM. Slices and updates in place count for what they touch."""
    operands = [computation.instructions[name] for name in x.operands if name in computation.instructions]
    if x.opcode == "copy-start":  # its result is (destination, source, context)
        return _in_hbm(x.shapes[:2])
    if x.opcode.endswith("slice-start"):
        target = x.shapes[1] if len(x.shapes) > 1 else x.shapes[0]
        return target.bytes * (2 if target.in_hbm else 1)
    if x.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1].shapes)
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_hbm(x.shapes)
    if x.opcode != "fusion":
        return _in_hbm(x.shapes) + sum(_in_hbm(operand.shapes) for operand in operands)
    called = module.computations[x.called[0]]
    total = sum(_read(module, called, n, operand) for n, operand in enumerate(operands))
    return total + _written(called, called.root, x.shapes)


def _in_hbm(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _read(module: Module, called: Computation, number: int, operand: Instruction) -> int:
    """Bytes that a fusion reads of its ``number``-th operand: slices of it, if nothing else uses it."""
    whole = _in_hbm(operand.shapes)
    names = {x.name for x in called if x.opcode == "parameter" and x.arguments == str(number)}
    total = 0
    for x in called:
        if not names.intersection(x.operands):
            continue
        # A fusion that aliases its operand is the same array in other tiles, as int8 weights are given to a product.
        if x.opcode == "bitcast" or (x.opcode == "fusion" and "output_to_operand_aliasing" in x.attributes):
            names.add(x.name)
        elif x.opcode in ("dynamic-slice", "slice", "gather") and x.operands[0] in names:
            total += x.bytes
        elif x.opcode == "fusion":
            inner, used = module.computations[x.called[0]], [n for n, name in enumerate(x.operands) if name in names]
            total += sum(_read(module, inner, n, called.instructions[x.operands[n]]) for n in used)
        elif not (x.opcode == "dynamic-update-slice" and x.operands[0] in names and x.operands[1] not in names):
            return whole
    return min(total, whole)


def _written(called: Computation, root: Instruction, shapes: tuple[Shape, ...]) -> int:
    if root.opcode == "tuple":
        parts = zip(root.operands, shapes, strict=True)
        return sum(_written(called, called.instructions[name], (shape,)) for name, shape in parts)
    while root.opcode == "bitcast" and root.operands[0] in called.instructions:
        root = called.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and all(shape.in_hbm for shape in shapes):
        return called.instructions[root.operands[1]].bytes
    return _in_hbm(shapes)
