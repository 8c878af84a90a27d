"""Things that one thread at a time may use: decoder and cipher contexts, aligned buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..typed import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """Hands out what lies there, else makes one; as many are made as were ever in use at once.

    A context of a thread's own would not do: nbdkit's threads come and go with the connections.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._idle: deque[T] = deque()
        #: ``give(thing)`` takes back what :meth:`take` handed out.
        self.give = self._idle.append

    def take(self) -> T:
        """One that nobody else is using."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()
