"""A writable NBD export, over several connections where the server allows that.

A server may be silent for as long as it likes while it writes or flushes: minutes are usual where
much has to reach a slow disk.  But nothing is waited for in a way that keeps Ctrl-C from being
heard, so libnbd's asynchronous calls are used, as in :mod:`..storage.connections`, and polled.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final

from ..errors import StorageError, UsageError, shown
from ..image.extents import ALLOCATED, HOLE_ZERO, Extent
from ..storage.connections import disconnect
from ..storage.libnbd import PATIENCE, libnbd, message_of, without_secrets
from ..storage.local import Buffer
from ..util.interrupts import raise_if_interrupted
from .targets import failed, write_zeros

_MOST_ASKED: Final = 1 << 30  # NBD lengths have 32 bits
_SLICE: Final = 100  # milliseconds until Ctrl-C is heard


class NbdTarget:
    """One as a :class:`.Target`."""

    foreign = True
    fd: int | None = None

    def __init__(
        self,
        name: str,
        connect: Callable[[Any], None],
        connections: int,
        patience: float = PATIENCE,
    ) -> None:
        """``connect`` is called with the first handle, and may leave it connecting, which takes
        ``patience`` seconds at the most; ``name`` is for error lines.  Raises UsageError."""
        self._name = without_secrets(name)
        self._nbd = libnbd()
        self._patience = patience
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
                    self._open(lambda handle: handle.aio_connect_uri(again))
        except self._nbd.Error as e:
            self.close()
            raise UsageError(f"cannot open {shown(self._name)}: {message_of(e, name)}") from e
        except BaseException:
            self._kill_server()
            self.close()
            raise

    def _open(self, connect: Callable[[Any], None]) -> None:
        handle = self._nbd.NBD()
        self._all.append(handle)
        handle.add_meta_context(self._nbd.CONTEXT_BASE_ALLOCATION)
        connect(handle)
        deadline = time.monotonic() + self._patience
        while handle.aio_is_connecting():
            raise_if_interrupted()
            if time.monotonic() > deadline:
                name, patience = shown(self._name), f"{self._patience:g} s"
                raise UsageError(f"cannot open {name}: the server has not answered for {patience}")
            handle.poll(_SLICE)
        self._idle.put(handle)

    def write(self, view: memoryview, offset: int) -> None:
        self._call(offset, lambda handle: handle.aio_pwrite(view, offset))

    def zero(self, offset: int, length: int) -> None:
        if self._can_zero:
            self._call(offset, lambda handle: handle.aio_zero(length, offset))
            return
        write_zeros(self, offset, length)

    def pread_into(self, buffer: Buffer, offset: int) -> None:
        self._call(offset, lambda handle: handle.aio_pread(buffer, offset), "reading")

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
            self._call(offset, lambda handle: handle.aio_block_status(ask, offset, note), "asking")
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
                    self._finish(handle, handle.aio_flush())
            except self._nbd.Error as e:
                raise failed(self._name, 0, message_of(e)) from e

    def close(self) -> None:
        """Disconnect; waits for the end of a server that was started for this."""
        self._idle = SimpleQueue()
        try:
            # The first handle last: when it goes, libnbd waits for the server that it started,
            # which in turn waits for the end of all the other connections.
            while self._all:
                disconnect(self._all[-1], self._patience)
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

    def _call(self, offset: int, begin: Callable[[Any], int], how: str = "writing to") -> None:
        handle = self._idle.get()
        try:
            self._finish(handle, begin(handle))
        except self._nbd.Error as e:
            raise failed(self._name, offset, message_of(e), how) from e
        finally:
            self._idle.put(handle)

    def _finish(self, handle: Any, cookie: int) -> None:
        """Wait for a request.  Raises libnbd's error."""
        while not handle.aio_command_completed(cookie):
            raise_if_interrupted()
            handle.poll(_SLICE)
