"""Telling the C library not to keep a heap for every thread.

glibc gives threads heaps of their own, up to eight for each core, and leaves in each of them what
large buffers have taken: with clusters of 2 MiB and 64 clients that is 100 MiB that nothing uses.
A thread that allocates holds the interpreter's lock most of the time, so two heaps are enough.
"""

from __future__ import annotations

import ctypes

from ..typed import Final

_M_ARENA_MAX: Final = -8
_HEAPS: Final = 2


def share_heaps() -> None:
    """For the whole process, from now on; nothing where the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _HEAPS)
