"""TPU topologies as libtpu describes them, without the hardware."""

import dataclasses
import importlib.util
import os
from typing import Any

from pdrop_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a device, from Google's documentation and "How to Scale Your Model" (Austin et al., 2025).

    Attributes:
      memory: HBM in GiB, as stated in the compiler's out-of-memory message.
      flops: dense bfloat16 FLOP/s.
      int8_ops: dense int8 operations a second.
      hbm: bytes/s of the high-bandwidth memory.
      ici: bytes/s of one ring of links, both directions together.
      clock: cycles a second, ``flops`` divided by what the matrix units do in a cycle.
    """

    memory: float
    flops: float
    int8_ops: float
    hbm: float
    ici: float
    clock: float


CHIPS = {
    "v4": Chip(31.75, 275e12, 275e12, 1.23e12, 9e10, 1.05e9),
    "v5e": Chip(15.75, 197e12, 394e12, 8.19e11, 9e10, 1.5e9),
    "v5p": Chip(95.74, 459e12, 918e12, 2.765e12, 1.8e11, 1.75e9),
    "v6e": Chip(31.25, 918e12, 1836e12, 1.64e12, 1.8e11, 1.75e9),
    # A device is half of a chip.
    "tpu7x": Chip(94.75, 1153e12, 1153e12, 3.69e12, 1.8e11, 2.2e9),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu queries the cloud metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # or libtpu warns that the type is not set
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as "v5e:4x8".

    Call it before jax is imported, because it sets environment variables that libtpu reads.

    Raises:
      UserError: libtpu is not installed, or the topology does not exist.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning needs the TPU compiler, which is not installed: pip install 'pdrop-jax[plan]'")
    kind, colon, _ = topology.partition(":")
    if kind not in CHIPS or not colon:
        raise UserError(
            f"topology {topology!r} is not of the form v5e:4x8: give a TPU type ({', '.join(CHIPS)}) and its chip grid"
        )
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu raises several types
        raise UserError(
            f"the TPU compiler does not know topology {topology!r}: {str(error).splitlines()[0][:200]}"
        ) from None
