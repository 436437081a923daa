"""Several processes as one run: how they find each other, and how one of them ends all."""

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
START_SECONDS = 300  # for all processes to come
PORT, PORTS = 61_000, 4_000  # of a job under SLURM: behind what Linux gives to connections by itself
DIED = "has another process died? The same command goes on after the last save"


@contextlib.contextmanager
def together(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Within it jax sees the devices of all processes. To be entered before anything else asks for devices.

    Under SLURM and on Cloud TPUs the processes find each other; elsewhere all three arguments say how.

    Raises:
      UserError: some of the three are given and others not, or a process does not come; see ``roll_call``. Of several
        processes, one in which anything is raised ends at once: any other way out waits for the others, which wait for
        this one.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id belong together: give all three or none")
    if not any(given) and not one_of_many(os.environ):
        yield
        return
    if not any(given):
        coordinator, num_processes, process_id = under_slurm(os.environ) or (None, None, None)
    me, where = (f", process {process_id} of {num_processes}", f" at {coordinator}") if coordinator else ("", "")
    # Where nobody tells the numbers before jax starts, the one that is missing is the one without this line.
    print(
        f"pdrop train{me}, on {socket.gethostname()}: waiting for all processes{where}, at most {START_SECONDS} s",
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
    """What SLURM says in place of the three arguments; None if this process was not started by srun.

    The coordinator is on the first host of the step, at a port that follows from the number of the job: several jobs
    may share a host.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
    if not all(name in environment for name in names):
        return None
    hosts, job, count, number = (environment[name] for name in names)
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)  # "node1", "node1,other", "node[007-012,020],other"
    return f"{first[1]}{first[2] or ''}:{PORT + int(job) % PORTS}" if first else "", int(count), int(number)


def one_of_many(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or a Cloud TPU has started other processes of this job too, or may have."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment:
        return True
    chips = any(glob.glob(pattern) for pattern in TPU_CHIPS)
    return chips and importlib.util.find_spec("libtpu") is not None
