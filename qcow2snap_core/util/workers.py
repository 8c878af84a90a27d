"""Several threads that take things from one iterator, until it ends or one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Lock
from typing import Final, Generic, TypeVar

from .interrupts import raise_if_interrupted

T = TypeVar("T")

_PATIENCE: Final = 0.1  # seconds until Ctrl-C is heard


def spread(things: Iterable[T], worker: Callable[[], Callable[[T], None]], threads: int) -> None:
    """Do each thing once; every thread makes itself a worker, with buffers of its own.

    The first error of any thread ends it and is raised; so does Ctrl-C (:mod:`.interrupts`).
    """
    shared = _Shared(iter(things))

    def work() -> None:
        do = worker()
        for thing in shared:
            do(thing)

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(work) for _ in range(threads)]
            running = True
            while running:
                raise_if_interrupted()
                done, pending = wait(futures, _PATIENCE, return_when=FIRST_EXCEPTION)
                running = bool(pending) and not any(f.exception() for f in done)
        finally:
            shared.stop()  # leaving the block waits for what each is doing now
    for future in done:
        future.result()


class _Shared(Generic[T]):
    """An iterator that many threads may ask."""

    def __init__(self, things: Iterator[T]) -> None:
        self._things = things
        self._lock = Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._things)
