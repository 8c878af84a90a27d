"""Locks and semaphores that know who waits for them, so that a test need not wait for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import BoundedSemaphore, Lock


class Crowd:
    """A number of threads, each of which is inside of something or waits for its turn."""

    def __init__(self, size: int) -> None:
        self.most = 0  # that were inside when all had come
        self._size = size
        self._inside = self._waiting = 0
        self._changed = threading.Condition()

    def go_in(self) -> None:
        """Stay there until each of the others is inside or waits for its turn."""
        with self._changed:
            self._inside += 1
            self._changed.notify_all()
            assert self._changed.wait_for(self._all_came, timeout=60)
            self.most = self.most or self._inside

    def wait(self) -> None:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()

    def _all_came(self) -> bool:
        return self.most > 0 or self._inside + self._waiting == self._size


class Watched(AbstractContextManager[None]):
    """Calls ``wait`` when somebody has to wait for the lock or semaphore."""

    def __init__(self, turns: Lock | BoundedSemaphore, wait: Callable[[], object]) -> None:
        self._turns = turns
        self._wait = wait

    def __enter__(self) -> None:
        if not self._turns.acquire(blocking=False):
            self._wait()
            self._turns.acquire()

    def __exit__(self, *raised: object) -> None:
        self._turns.release()
