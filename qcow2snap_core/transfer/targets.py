"""What a disk can be copied to: a raw file, a block device, an NBD export.

Each can be written and zeroed at any offset by several threads at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, Protocol

from ..errors import StorageError, UsageError, reason, shown
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent
from ..storage.libnbd import libnbd, message_of, without_secrets
from ..storage.local import Buffer
from .writeback import WriteBack


class Target(Protocol):
    """Where bytes go to.  Its methods raise StorageError."""

    size: int  # bytes
    foreign: bool  # another program writes: :mod:`.mover` keeps zeros and data apart
    fd: int | None  # a file that the kernel can copy into, if it is one

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of the view."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without taking space for it where that is possible."""

    def wrote(self, offset: int, length: int) -> None:
        """Hear that a range was written, by :meth:`write` or by the kernel: it may go on its way
        to the disk."""

    def flush(self) -> None:
        """Bring everything to the disk."""

    def close(self) -> None: ...


# linux/falloc.h
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16

_CANNOT: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
_ZEROS: Final = memoryview(bytes(1 << 20))

_MOST_ASKED: Final = 1 << 30  # NBD lengths have 32 bits


class RawTarget:
    """An open file or block device."""

    foreign = False
    fd: int | None

    def __init__(self, path: str, fd: int, *, empty: bool = False) -> None:
        """Owns the descriptor.  ``empty``: it is one hole already."""
        self._path = path
        self._fd = fd
        self.fd = fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
        self._write_back = WriteBack(fd)
        self._empty = empty
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def write(self, view: memoryview, offset: int) -> None:
        try:
            while view:
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            raise _failed(self._path, offset, reason(e)) from e

    def zero(self, offset: int, length: int) -> None:
        if self._empty:
            return
        # On a block device a hole is a discard that leaves zeros; where it cannot do that, the
        # second way has the kernel write them.
        for mode in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE):
            try:
                _fallocate(self._fd, mode, offset, length)
                return
            except OSError as e:
                if e.errno not in _CANNOT:
                    raise _failed(self._path, offset, reason(e)) from e
        _write_zeros(self, offset, length)

    def wrote(self, offset: int, length: int) -> None:
        try:
            self._write_back.wrote(offset, length)
        except OSError as e:
            raise _failed(self._path, offset, reason(e)) from e

    def flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise _failed(self._path, 0, reason(e)) from e

    def close(self) -> None:
        os.close(self._fd)


def open_device(path: str) -> RawTarget:
    """A block device that nothing else has mounted or claimed.  Raises UsageError."""
    try:
        # O_EXCL on a device: the kernel refuses it while it is mounted.
        return RawTarget(path, os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as e:
        raise UsageError(f"cannot open {shown(path)}: {reason(e)}") from e


class NbdTarget:
    """A writable NBD export, over several connections where the server allows that."""

    foreign = True
    fd: int | None = None

    def __init__(self, name: str, connect: Callable[[Any], None], connections: int) -> None:
        """``connect`` is called with the first handle; ``name`` is for error lines."""
        self._name = without_secrets(name)
        self._nbd = libnbd()
        self._all: list[Any] = []
        self._idle: SimpleQueue[Any] = SimpleQueue()
        try:
            self._open(connect)
            self.size: int = self._all[0].get_size()
            if self._all[0].is_read_only():
                raise UsageError(f"{shown(self._name)} is read-only")
            self._can_zero = self._all[0].can_zero()
            self._can_extents = self._all[0].can_meta_context(self._nbd.CONTEXT_BASE_ALLOCATION)
            if self._all[0].can_multi_conn():
                again = self._all[0].get_uri()
                for _ in range(connections - 1):
                    self._open(lambda handle: handle.connect_uri(again))
        except self._nbd.Error as e:
            self.close()
            raise UsageError(f"cannot open {shown(self._name)}: {message_of(e, name)}") from e
        except BaseException:
            self._kill_server()
            self.close()
            raise

    def _open(self, connect: Callable[[Any], None]) -> None:
        self._all.append(self._nbd.NBD())
        self._all[-1].add_meta_context(self._nbd.CONTEXT_BASE_ALLOCATION)
        connect(self._all[-1])
        self._idle.put(self._all[-1])

    def write(self, view: memoryview, offset: int) -> None:
        self._call(offset, lambda handle: handle.pwrite(view, offset))

    def zero(self, offset: int, length: int) -> None:
        if self._can_zero:
            self._call(offset, lambda handle: handle.zero(length, offset))
            return
        _write_zeros(self, offset, length)

    def pread_into(self, buffer: Buffer, offset: int) -> None:
        view = memoryview(buffer)
        view[:] = self._call(offset, lambda handle: handle.pread(len(view), offset), "reading")

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What the server says of the range; all of it is data where it says nothing."""
        if not self._can_extents:
            yield Extent(offset, length, ALLOCATED)
            return
        found: list[int] = []

        def note(context: str, at: int, entries: list[int], error: Any) -> int:
            if context == self._nbd.CONTEXT_BASE_ALLOCATION and at == offset:
                found[:] = entries
            return 0

        ask = min(length, _MOST_ASKED)
        with suppress(StorageError):  # then its bytes will tell
            self._call(offset, lambda handle: handle.block_status(ask, offset, note), "asking")
        at, end = offset, offset + length
        for n, flags in zip(found[::2], found[1::2], strict=True):
            inside = min(n, end - at)
            if inside <= 0:
                break
            yield Extent(at, inside, HOLE_ZERO if flags & self._nbd.STATE_ZERO else ALLOCATED)
            at += inside
        if at == offset:
            yield Extent(offset, ask, ALLOCATED)

    def wrote(self, offset: int, length: int) -> None:
        """Nothing to do: it is its server's file."""

    def flush(self) -> None:
        for handle in self._all:
            try:
                if handle.can_flush():
                    handle.flush()
            except self._nbd.Error as e:
                raise _failed(self._name, 0, message_of(e)) from e

    def close(self) -> None:
        """Disconnect; waits for the end of a server that was started for this."""
        self._idle = SimpleQueue()
        try:
            # The first handle last: when it goes, libnbd waits for the server that it started,
            # which in turn waits for the end of all the other connections.
            while self._all:
                with suppress(self._nbd.Error):  # the connection may be dead already
                    self._all[-1].shutdown()
                self._all.pop()
        except BaseException:
            self._kill_server()
            raise

    def _kill_server(self) -> None:
        """End a server that was started for this, where an interrupt may have left handles behind
        that nobody closes in order."""
        with suppress(self._nbd.Error):  # there is none
            for handle in self._all[:1]:
                handle.kill_subprocess(signal.SIGKILL)

    def _call(self, offset: int, do: Callable[[Any], Any], how: str = "writing to") -> Any:
        handle = self._idle.get()
        try:
            return do(handle)
        except self._nbd.Error as e:
            raise _failed(self._name, offset, message_of(e), how) from e
        finally:
            self._idle.put(handle)


def _write_zeros(target: Target, offset: int, length: int) -> None:
    for at in range(offset, offset + length, len(_ZEROS)):
        target.write(_ZEROS[: offset + length - at], at)


def _failed(name: str, offset: int, why: str, how: str = "writing to") -> StorageError:
    return StorageError(f"{how} {shown(name)} at offset {offset:#x} failed: {why}")


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
