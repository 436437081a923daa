"""Turns of threads that share a device."""

import collections
import threading


class Turns:
    """A lock whose waiting threads get it in the order in which they came, as a context manager.

    With a plain lock an engine that releases it and takes it again at once would keep the others from the device. On a
    mesh, two threads that run programs at the same time could also wait for each other forever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line = collections.deque[int]()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._line.append(me)
            self._changed.wait_for(lambda: self._line[0] == me)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()
