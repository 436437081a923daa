"""What a program needs on TPUs that are not there: compiled for their topology by libtpu, on this machine's CPU.

The compiler's own figures: bytes of a device, and the collectives. A loop's body stands in the program once, whatever
the number of its turns, so what it moves is counted once here; MACs come from ``analysis.cost`` instead.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

from pdrop_jax.errors import UserError

# GiB of high-bandwidth memory of a device, as the compiler's own message of an overflow gives them.
MEMORY = {"v4": 31.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the cloud what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # and complain that nobody has told it
    "TPU_WORKER_HOSTNAMES": "localhost",
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a program, of each device.

    Attributes:
      argument_bytes: parameters, optimizer state, batch, caches.
      temporary_bytes: beside them while it runs.
      output_bytes: what is not written over an argument.
      capacity_bytes: of the device.
      excess_bytes: by how much it does not fit; 0 if it does. If not, the other figures are 0: there is no program.
      collectives: kind -> (how often it stands in the program, bytes of its results).
      compile_seconds: of lowering and compiling.
    """

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    capacity_bytes: int
    excess_bytes: int
    collectives: dict[str, tuple[int, int]]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return not self.excess_bytes

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes + self.output_bytes


def devices_of(topology: str) -> list[Any]:
    """The devices of "v5e:4x8". To be called before jax is imported: it sets what libtpu wants to find.

    Raises:
      UserError: libtpu is not installed, or there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning needs the TPU compiler, which is not installed: pip install 'pdrop-jax[plan]'")
    kind, colon, _ = topology.partition(":")
    if kind not in MEMORY or not colon:
        raise UserError(
            f"topology {topology!r} is not of the form v5e:4x8: one of {', '.join(MEMORY)}, its chips behind"
        )
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu's own, of no one type
        raise UserError(f"the compiler knows no topology {topology!r}: {str(error).splitlines()[0][:200]}") from None


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
        return Report(0, 0, 0, capacity, excess, {}, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return Report(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        capacity,
        0,
        collectives(compiled.as_text()),
        seconds,
    )


def _excess(message: str) -> int:
    """Bytes of "Used 17.2G of 15.75G hbm. Exceeded hbm capacity by 1.45G."; 0 if it says nothing like that."""
    found = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMGT]?)", message)
    if not found:
        return 0
    return math.ceil(float(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " ")))


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> (instructions, bytes of their results on one device) in a compiled program's text."""
    found = dict.fromkeys(COLLECTIVES, (0, 0))
    for kind in COLLECTIVES:
        # An asynchronous one is counted where it is done, there its type is that of the result alone.
        for dtype, dims in re.findall(rf"= \(?(\w+)\[([\d,]*)\][^=\n]*? {kind}(?:-done)?\(", text):
            count, size = found[kind]
            elements = math.prod(int(n) for n in dims.split(",") if n)
            found[kind] = count + 1, size + elements * BYTES.get(dtype, 4)
    return found
