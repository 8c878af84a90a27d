"""A cache with a bound in bytes, shared by all threads: L2 tables and decoded clusters live here.

Eviction is first in, first out.  So a hit changes nothing, costs one dictionary look-up and needs
no lock; that is worth more here than what a least-recently-used order would keep, since losing an
entry costs one read from the page cache or one decode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from threading import Lock

from ..typed import Final, Generic, TypeVar

# Of a value beside its bytes: its object, its key and its places in two dictionaries.  Clusters of
# 512 bytes would otherwise take twice what the bound says.
OVERHEAD: Final = 400

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """At most ``limit`` bytes of memory, the oldest value dropped first."""

    def __init__(self, limit: int, overhead: int = 0) -> None:
        """``overhead`` is added to the size of each value."""
        self.limit = limit
        self._overhead = overhead
        self.used = 0
        #: what it holds, for the native engine to look into; changed here alone
        self.items: dict[K, V] = {}
        self._sizes: dict[K, int] = {}
        # Oldest first.  The dictionary has them in that order as well, but looks for its first item
        # behind all the places of those that were dropped.
        self._order: deque[K] = deque()
        self._lock = Lock()
        self._loading: dict[K, Lock] = {}
        #: ``get(key)``: the value or None.
        self.get = self.items.get

    def load(self, key: K, make: Callable[[], V], size: int) -> V:
        """The value of ``key``, made on first use: once, however many threads wait for it.

        ``size`` is what it weighs in bytes.  A value larger than the bound is made and not kept.
        """
        try:
            with self._loading.setdefault(key, Lock()):
                value = self.items.get(key)
                if value is None:
                    value = make()
                    self._put(key, value, size + self._overhead)
                return value
        finally:
            self._loading.pop(key, None)

    def _put(self, key: K, value: V, size: int) -> None:
        if size > self.limit:
            return
        with self._lock:
            # Two can make one value after all, when one waited for a third that was dropped at
            # once: it then holds a lock that newcomers do not find.
            if key in self.items:
                self.used -= self._sizes.pop(key)
                del self.items[key]
                self._order.remove(key)
            while self.used + size > self.limit:
                oldest = self._order.popleft()
                del self.items[oldest]
                self.used -= self._sizes.pop(oldest)
            self.items[key] = value
            self._sizes[key] = size
            self._order.append(key)
            self.used += size
