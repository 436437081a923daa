"""Multi-process training: how processes find each other, and how a failing process ends the run."""

import contextlib
import glob
import importlib.util
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax

from pdrop_jax.errors import UserError, error_text
from pdrop_jax.train.roll_call import roll_call

TPU_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
START_SECONDS = 300  # time limit for all processes to connect
PORT, PORTS = 61_000, 4_000  # port range for SLURM jobs, above the ephemeral ports of Linux
DIED = "has another process died? Run the same command again to resume from the last checkpoint"


@contextlib.contextmanager
def together(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Context in which jax sees the devices of all processes. Enter it before any other code accesses devices.

    Under SLURM and on Cloud TPUs, processes are discovered automatically. Elsewhere all three arguments are required.

    If an exception is raised in one of several processes, that process exits immediately. A normal exit would wait for
    the other processes, which in turn wait for this one.

    Raises:
      UserError: only some of the arguments are given, or a process does not connect; see ``roll_call``.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --num-processes and --process-id must be given together: give all three or none"
        )
    if not any(given) and not one_of_many(os.environ):
        yield
        return
    if not any(given):
        coordinator, num_processes, process_id = under_slurm(os.environ) or (None, None, None)
    me, where = (f", process {process_id} of {num_processes}", f" at {coordinator}") if coordinator else ("", "")
    # If the process numbers are not known before jax starts, a missing process is the one that did not print this.
    print(
        f"pdrop train{me}, on {socket.gethostname()}: waiting up to {START_SECONDS} s for all processes{where}",
        file=sys.stderr,
        flush=True,
    )
    if coordinator is not None and num_processes is not None and process_id is not None:
        roll_call(coordinator, num_processes, process_id, START_SECONDS)
    jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=START_SECONDS)
    try:
        yield
    except (UserError, OSError) as error:
        _leave(error_text(error), 2)
    except jax.errors.JaxRuntimeError as error:
        _leave(f"{str(error).splitlines()[0]}: {DIED}", 1)
    except Exception:
        _leave(f"{traceback.format_exc()}\n{DIED}", 1)
    jax.distributed.shutdown()


def _leave(why: str, code: int) -> NoReturn:
    print(f"pdrop train, process {jax.process_index()}: {why}", file=sys.stderr, flush=True)
    os._exit(code)


def under_slurm(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and process id from SLURM's variables; None if not started by srun.

    The coordinator runs on the first host of the job step. Its port is derived from the job id, because several jobs
    may share a host.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
    if not all(name in environment for name in names):
        return None
    hosts, job, count, number = (environment[name] for name in names)
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)  # "node1", "node1,other", "node[007-012,020],other"
    return f"{first[1]}{first[2] or ''}:{PORT + int(job) % PORTS}" if first else "", int(count), int(number)


def one_of_many(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or a Cloud TPU has started, or may have started, other processes of this job."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment:
        return True
    chips = any(glob.glob(pattern) for pattern in TPU_CHIPS)
    return chips and importlib.util.find_spec("libtpu") is not None
