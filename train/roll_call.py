"""Check that all processes are running before jax starts.

If a process is missing, jax aborts the others without saying which one it was.
"""

import contextlib
import re
import socket
import time

from pdrop_jax.errors import UserError

RETRY_SECONDS = 0.2
MOST_PROCESSES = 2**16
MESSAGE_SECONDS = 10.0  # time limit of one message between two processes


def roll_call(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Returns once all processes have connected to process 0, which listens at the address of jax's coordinator.

    Args:
      coordinator: HOST:PORT of process 0.
      seconds: time limit.

    Raises:
      UserError: some processes have not connected in time (the message lists them), two processes have the same id, or
        an argument is invalid.
    """
    host, _, port = coordinator.rpartition(":")
    if not 1 <= num_processes <= MOST_PROCESSES:
        raise UserError(f"--num-processes is {num_processes}, it must be between 1 and {MOST_PROCESSES}")
    is_port = re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16
    if not host or not is_port or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator {coordinator} --process-id {process_id}: expected HOST:PORT of process 0 "
            f"and a process id between 0 and {num_processes - 1}"
        )
    deadline = time.monotonic() + seconds
    answer = _listen(int(port), num_processes, deadline) if process_id == 0 else _call(host, port, process_id, deadline)
    if answer:
        raise UserError(f"{answer} (waited {seconds:.0f} s at {coordinator})")


def _listen(port: int, num_processes: int, deadline: float) -> str:
    """Runs in process 0. Returns an error message, also sent to all connected processes; empty on success."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    connected: dict[int, socket.socket | None] = {0: None}
    answer = ""
    with (
        socket.create_server(("", port), family=family, dualstack_ipv6=both) as server,
        contextlib.ExitStack() as lines,
    ):
        while len(connected) < num_processes and not answer and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller = lines.enter_context(server.accept()[0])
                caller.settimeout(MESSAGE_SECONDS)
                number = int(caller.recv(32))
            except (OSError, ValueError):  # timeout, or a connection from an unrelated program
                continue
            if number in connected:
                answer = f"two processes have --process-id {number}"
            connected[number] = caller
        missing = [str(n) for n in range(num_processes) if n not in connected]
        if missing and not answer:
            answer = f"{len(missing)} of {num_processes} processes have not connected: {', '.join(missing)}"
        for caller in filter(None, connected.values()):
            with contextlib.suppress(OSError):
                caller.sendall(f"{answer}\n".encode())
    return answer


def _call(host: str, port: str, process_id: int, deadline: float) -> str:
    """Runs in the other processes. Returns the error message of process 0; empty on success."""
    while True:
        try:
            line = socket.create_connection((host.strip("[]"), int(port)), timeout=MESSAGE_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                return f"process 0 cannot be reached: {error.strerror or error}"
            time.sleep(RETRY_SECONDS)
    with line, line.makefile() as words:
        try:
            line.sendall(str(process_id).encode())
            line.settimeout(max(deadline - time.monotonic(), 0) + MESSAGE_SECONDS)
            answer = words.readline()
        except OSError:
            answer = ""
    return answer.strip() if answer else "process 0 has closed the connection"
