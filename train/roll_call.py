"""Processes meet before jax starts: when one is missing, jax ends the others by an abort that names nobody."""

import contextlib
import re
import socket
import time

from pdrop_jax.errors import UserError

RETRY_SECONDS = 0.2
MOST_PROCESSES = 2**16
PATIENCE = 10.0  # seconds that a word between two processes may take


def roll_call(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Returns when all processes have come. Process 0 listens where it will be jax's coordinator, and the others call.

    Args:
      coordinator: HOST:PORT of process 0.
      seconds: how long to wait.

    Raises:
      UserError: some have not come in time, and which; two with one number; an address or a number that is none.
    """
    host, _, port = coordinator.rpartition(":")
    if not 1 <= num_processes <= MOST_PROCESSES:
        raise UserError(f"--num-processes is {num_processes}, it must be 1 to {MOST_PROCESSES}")
    is_port = re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16
    if not host or not is_port or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator {coordinator} --process-id {process_id}: expected HOST:PORT of process 0, "
            f"and a number of 0 to {num_processes - 1}"
        )
    deadline = time.monotonic() + seconds
    answer = _listen(int(port), num_processes, deadline) if process_id == 0 else _call(host, port, process_id, deadline)
    if answer:
        raise UserError(f"{answer} (waited {seconds:.0f} s at {coordinator})")


def _listen(port: int, num_processes: int, deadline: float) -> str:
    """What process 0 found wrong, which it tells all who came; empty if all did."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    come: dict[int, socket.socket | None] = {0: None}
    answer = ""
    with (
        socket.create_server(("", port), family=family, dualstack_ipv6=both) as server,
        contextlib.ExitStack() as lines,
    ):
        while len(come) < num_processes and not answer and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller = lines.enter_context(server.accept()[0])
                caller.settimeout(PATIENCE)
                number = int(caller.recv(32))
            except (OSError, ValueError):  # nobody came, or somebody who is none of us
                continue
            if number in come:
                answer = f"two processes are number {number}"
            come[number] = caller
        missing = [str(n) for n in range(num_processes) if n not in come]
        if missing and not answer:
            answer = f"of {num_processes} processes these have not come: {', '.join(missing)}"
        for caller in filter(None, come.values()):
            with contextlib.suppress(OSError):
                caller.sendall(f"{answer}\n".encode())
    return answer


def _call(host: str, port: str, process_id: int, deadline: float) -> str:
    """What process 0 answers; empty if all have come."""
    while True:
        try:
            line = socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                return f"process 0 has not come: {error.strerror or error}"
            time.sleep(RETRY_SECONDS)
    with line, line.makefile() as words:
        try:
            line.sendall(str(process_id).encode())
            line.settimeout(max(deadline - time.monotonic(), 0) + PATIENCE)
            answer = words.readline()
        except OSError:
            answer = ""
    return answer.strip() if answer else "process 0 has gone"
