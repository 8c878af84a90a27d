"""Small reads from the page cache that keep the interpreter's lock.

``os.preadv`` lets go of the GIL for the length of the system call.  Among several connections
somebody else then takes it, and to get it back costs a futex and a switch of threads: far more
than the microsecond in which the kernel copies 4 KiB from its cache.  Called through
``ctypes.PyDLL`` the same system calls keep the lock.

They must not wait for a disk then, since everybody would wait with them: ``RWF_NOWAIT`` makes the
kernel refuse what is not in its cache, and the caller does it the ordinary way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

from .pool import Pool

_LIBC: Final = ctypes.PyDLL(None)
_RWF_NOWAIT: Final = 8

#: Larger reads take longer than a change of threads, and copies should run in parallel.
SMALL: Final = 32 << 10

_preadv2: Final = getattr(_LIBC, "preadv2", None)  # glibc 2.26
if _preadv2 is not None:
    _preadv2.restype = ctypes.c_ssize_t
    _preadv2.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
pread: Final = _LIBC.pread
pread.restype = ctypes.c_ssize_t
pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]

_from_buffer: Final = ctypes.c_char.from_buffer
_addressof: Final = ctypes.addressof
_IoVec: Final[Any] = ctypes.c_size_t * 2  # struct iovec: base and length


def read_cached(fd: int, buffer: Any, offset: int) -> int:
    """As ``os.preadv`` into one writable buffer, but only what is in the page cache; else -1."""
    if _preadv2 is None:
        return -1
    vector = _IoVec(_addressof(_from_buffer(buffer)), len(buffer))
    got: int = _preadv2(fd, _addressof(vector), 1, offset, _RWF_NOWAIT)
    return got


def watch(fd: int, places: Sequence[tuple[int, bytes]]) -> Callable[[], bool]:
    """A function that reads some places of a file, in this order, and tells whether all still
    hold these bytes.

    The places should be small and often read: they are in the page cache, but for rare moments.
    """
    expected = b"".join(content for _, content in places)
    # Several threads ask at once, and one's second read must not meet another's first.
    buffers = Pool(lambda: ctypes.create_string_buffer(len(expected)))

    def unchanged() -> bool:
        buffer = buffers.take()
        at = _addressof(buffer)
        whole = True
        for offset, content in places:
            length = len(content)
            whole = whole and pread(fd, at, length, offset) == length
            at += length
        same = whole and buffer.raw == expected
        buffers.give(buffer)
        return same

    return unchanged
