"""Which entry of a cache holds what. The arrays are elsewhere (``pools``); here are keys, numbers and counters."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class CacheCounts:
    """How a cache has done so far, for a server to export.

    Attributes:
      hits, misses: lookups that found their entry, and that did not.
      entries, capacity: entries in use, and all of them.
      bytes: device memory of all entries, which is taken when the engine is made.
    """

    hits: int
    misses: int
    entries: int
    capacity: int
    bytes: int


class Lru:
    """Numbers of entries by key. The entry that has not been used for the longest time makes room for a new key."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._hits = self._misses = 0

    def __contains__(self, key: bytes | None) -> bool:
        return key in self._entries

    def find(self, key: bytes) -> int | None:
        """The entry of ``key``, used from now on; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            self._misses += 1
        else:
            self._hits += 1
            self._entries.move_to_end(key)
        return entry

    def claim(self, key: bytes) -> int:
        """An entry for ``key``, which must not have one yet. What it held is forgotten."""
        entry = len(self._entries) if len(self._entries) < self.capacity else self._entries.popitem(last=False)[1]
        self._entries[key] = entry
        return entry

    def counts(self, nbytes: int) -> CacheCounts:
        return CacheCounts(self._hits, self._misses, len(self._entries), self.capacity, nbytes)
