"""TPU topologies as libtpu describes them, without the hardware."""

import importlib.util
import os
from typing import Any

from pdrop_jax.analysis.chips import CHIPS
from pdrop_jax.errors import UserError

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
