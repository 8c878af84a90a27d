"""How much memory Python's objects may take, counted with tracemalloc."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

from .qemu import MiB

ALLOWED = 64 * MiB


@contextmanager
def bounded(limit: int = ALLOWED) -> Iterator[None]:
    """Python's objects must not take more at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
