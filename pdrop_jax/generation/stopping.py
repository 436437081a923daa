"""Where an answer ends besides at a stop token, and which tokens it may have: decided on the host, token by token."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pdrop_jax.inputs.processor import TextStream


class Constraint(Protocol):
    """What an answer must look like, such as a grammar. Used by one request, in one thread at a time."""

    def accept(self, ids: Sequence[int]) -> None:
        """Takes note of new tokens, without the stop token."""

    def allowed(self) -> np.ndarray:
        """(ceil(V / 32),) int32, a bit for each token that may come next, as ``next_token.only`` reads them."""


class StopStream:
    """A ``TextStream`` that ends in front of the first of ``stops``: no part of a stop string is ever shown.

    White space at both ends of an answer is not part of it, so a stop string is not looked for there.

    Attributes:
      stopped: whether a stop string was found.
    """

    def __init__(self, text: TextStream, stops: Sequence[str]) -> None:
        self._text, self._stops = text, stops
        self._held = ""  # could be the beginning of a stop string
        self.stopped = False

    def put(self, token_id: int) -> str:
        """The text that ``token_id`` makes final; may be empty."""
        return self._until_stop(self._text.put(token_id))

    def end(self) -> str:
        """The text that is still held back."""
        if self.stopped:
            return ""
        text = self._until_stop(self._text.end())
        return text if self.stopped else text + self._held

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        sizes = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        held = max(sizes, default=0)
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        return shown
