"""Signs of trouble in a running job: spikes of the loss, and hosts that keep the others waiting."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

WINDOW = 100  # recent losses that a new one is compared with
FEWEST = 20  # losses without which nothing is called a spike
# Deviations from the median, in units of the median absolute deviation: 6.7 standard deviations of normal noise.
SPIKE = 10.0
LEAST = 0.01  # smallest deviation that is assumed, as a share of the median

# A host is slow if it delays the others by more than this share of a step. Steps are synchronous, so all hosts take the
# same time for them; they differ in how long the devices of a host wait for it.
DELAY = 0.1
COMPARE_EVERY = 20  # steps between two comparisons of the hosts


class LossWatch:
    """Finds losses far above the recent ones: above median + 10 MAD of the last 100.

    Args:
      losses: those before the first that is checked.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._recent = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def limit(self, loss: float) -> float | None:
        """The limit that ``loss`` exceeds; None if it does not. Remembers the loss, unless it is not finite."""
        if not math.isfinite(loss):
            return None  # counted as a skipped step
        limit = math.inf
        if len(self._recent) >= FEWEST:
            median = statistics.median(self._recent)
            deviation = statistics.median(abs(x - median) for x in self._recent)
            limit = median + SPIKE * max(deviation, LEAST * abs(median))
        self._recent.append(loss)
        return limit if loss > limit else None


def slow_hosts(host_seconds: Sequence[float], step_seconds: float) -> list[int]:
    """Indices of the processes that delay the others.

    Args:
      host_seconds: for each process, the time per step in which its devices waited for the host.
      step_seconds: time per step.
    """
    median = statistics.median_low(host_seconds)  # of two hosts, the faster one
    return [n for n, seconds in enumerate(host_seconds) if seconds - median > DELAY * step_seconds]
