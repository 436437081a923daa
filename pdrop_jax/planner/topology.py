"""TPU slices that are not there, as libtpu describes them."""

import importlib.util
import os
from typing import Any

from pdrop_jax.errors import UserError

# GiB of high-bandwidth memory of a device, as the compiler's own message of an overflow gives them.
MEMORY = {"v4": 31.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the cloud what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # and complain that nobody has told it
    "TPU_WORKER_HOSTNAMES": "localhost",
}


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
