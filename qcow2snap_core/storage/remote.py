"""An image file behind an NBD server, which may have it from ssh, https, Ceph or an object store.

libnbd's handles serve one request at a time, so there are several connections where the server
says that they show the same (multi-conn): one for each request under way, up to a limit.  They
are made when they are needed.  A connection that is lost is replaced and the request repeated,
once; after that it is an error, and the next request tries anew.

A connection knows the size that the export had when it was made.  What a running QEMU appends is
therefore seen by connections that are younger: :meth:`RemoteFile.size` makes one now and then.

They must all lead to the same file, or the guard would ask one about data from another, and NBD
has no word for that.  A file that replaced another on the server shows by its size at most.  So
when a new connection sees another size, or one was lost, those from before are not used again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from threading import Condition
from typing import Any, Final, NamedTuple

from ..errors import Error, StorageError, UsageError, shown
from .libnbd import absolute, libnbd, message_of, without_secrets
from .local import Buffer, ExpectedBytes, closed, ensure_open

_MOST: Final = 8  # connections
_PATIENCE: Final = 30.0  # seconds for the first connection
# A server that takes no more than it has (qemu-nbd -e) lets further ones wait for ever.
_PATIENCE_FOR_MORE: Final = 2.0
_SIZE_HOLDS_FOR: Final = 1.0
_PAUSE_AFTER_FAILURE: Final = 30.0
_MAX_REQUEST: Final = 32 << 20  # what every server takes

_numbers = count()


class _Connection(NamedTuple):
    handle: Any
    size: int  # of the export when it was made
    generation: int


class RemoteFile:
    """An NBD export.  Safe to use from several threads."""

    plain_fd: int | None = None

    directory: str | None = None
    trusted: str | None = None

    def __init__(self, uri: str) -> None:
        """Connects.  Raises UsageError when that fails."""
        self.path = without_secrets(uri)
        self.absolute = absolute(uri)
        self.inode = (-2, next(_numbers))  # whatever is behind it, it is no file of ours
        self._nbd = libnbd()
        self._changed = Condition()
        self._idle: list[_Connection] = []
        self._made = 0  # and not dropped
        self._limit = 1
        self.closed = False
        self._size = 0
        self._measured = 0.0
        self._generation = 0  # of the connections that are still used
        try:
            first = self._connect(_PATIENCE)
        except (StorageError, ValueError) as e:  # libnbd takes UTF-8 without a NUL
            raise UsageError(f"cannot open {shown(self.path)}: {e}") from e
        self._made = 1
        self._many = bool(first.handle.can_multi_conn())
        self._limit = _MOST if self._many else 1
        self._max_request = min(_MAX_REQUEST, _max_request(first.handle))
        self._idle.append(first)

    # --- Storage ---

    def size(self) -> int:
        """The size a second ago; where the server takes one connection only, that at the start."""
        ensure_open(self)
        if time.monotonic() - self._measured > _SIZE_HOLDS_FOR:
            self._measure()
        return self._size

    def read_into(self, buffer: Buffer, offset: int) -> int:
        view = memoryview(buffer).cast("B")
        want = self._inside(len(view), offset)
        for at in range(0, want, self._max_request):
            piece = view[at : min(want, at + self._max_request)]
            piece[:] = self._read(len(piece), offset + at)
        return want

    def read(self, length: int, offset: int) -> bytes:
        if 0 < length <= self._max_request and offset + length <= self._size:
            return bytes(self._read(length, offset))
        data = bytearray(length)
        return bytes(memoryview(data)[: self.read_into(data, offset)])

    def holds(self, pieces: ExpectedBytes) -> bool:
        # One after the other, each a round trip.  Asked for together they may be answered in any
        # order, and the guard's argument wants the header's answer to be the older one.
        for content, offset in pieces:
            if self.read(len(content), offset) != content:
                self._measure()  # whoever changed it may have put the new table behind the end
                return False
        return True

    def holes(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        # Only raw layers are asked for their holes, and what a layer names is never remote.
        yield offset, length, False

    def will_need(self, offset: int, length: int) -> None:
        """A hint for the server, if it takes any; the answer is left to the connection's next
        user."""
        with self._changed:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            return
        try:
            want = min(connection.size - offset, length, self._max_request)
            if want > 0 and connection.handle.can_cache():
                connection.handle.aio_cache(want, offset, lambda _: 1)
        except self._nbd.Error:
            pass  # whoever needs the data will see the error
        finally:
            self._give(connection)

    def close(self) -> None:
        with self._changed:
            self.closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for connection in idle:
            self._end(connection)

    # --- Requests ---

    def _inside(self, length: int, offset: int) -> int:
        """How much of a range is inside the export."""
        ensure_open(self)
        if offset + length > self._size:
            # What is short is taken for the file's end, and for damage: so this has to be the end
            # that it has now.
            self._measure()
        return max(0, min(length, self._size - offset))

    def _read(self, length: int, offset: int) -> bytearray:
        """That much from inside the export."""
        try:
            for again in (True, False):
                connection = self._take()
                try:
                    data: bytearray = connection.handle.pread(length, offset)
                    return data
                except self._nbd.Error as e:
                    lost = connection.handle.aio_is_dead() or connection.handle.aio_is_closed()
                    if not (lost and again):
                        raise StorageError(message_of(e)) from e
                    if connection.generation == self._generation:
                        self._new_generation()
                finally:
                    self._give(connection)
        except StorageError as e:
            raise StorageError(
                f"reading {length} bytes of {shown(self.path)} at host offset {offset:#x} "
                f"failed: {e}"
            ) from e
        raise AssertionError

    def _measure(self) -> None:
        """Learn the size from a new connection."""
        if time.monotonic() < self._measured:
            return  # it failed a moment ago
        full = 1 < self._limit <= self._made  # as was seen when one more was wanted
        if (not full and self._renew()) or (self._make_room() and self._renew()):
            return
        self._measured = time.monotonic() + _PAUSE_AFTER_FAILURE

    def _renew(self) -> bool:
        """Make a connection, and keep it if none is idle; whether it could be made."""
        try:
            connection = self._connect(_PATIENCE_FOR_MORE)
        except StorageError:
            return False
        with self._changed:
            if not self._idle and self._made < self._limit and not self.closed:
                self._made += 1
                self._give(connection)
                return True
        self._end(connection)
        return True

    def _make_room(self) -> bool:
        """End an idle connection, but never the only one: there are servers that end with it."""
        with self._changed:
            if self._made < 2 or not self._idle:
                return False
            self._made -= 1
            old = self._idle.pop(0)
        self._end(old, _PATIENCE_FOR_MORE)
        return True

    # --- Connections ---

    def _take(self) -> _Connection:
        """One that nobody else uses, of the present generation."""
        while True:
            with self._changed:
                while not self.closed and not self._idle and self._made >= self._limit:
                    self._changed.wait()
                if self.closed:
                    raise closed(self.path)
                if self._idle:
                    connection = self._idle.pop()
                    if connection.generation == self._generation:
                        return connection
                    self._made -= 1
                    self._end(connection)
                    continue
                self._made += 1
                alone = self._made == 1
            try:
                connection = self._connect(_PATIENCE if alone else _PATIENCE_FOR_MORE)
            except Error:
                with self._changed:
                    self._made -= 1
                    alone = not self._made
                    self._limit = max(1, self._made)  # make do with what there is
                    self._changed.notify_all()
                if alone:
                    raise
                continue
            if alone and self._many:
                self._limit = _MOST
            return connection

    def _give(self, connection: _Connection) -> None:
        """Back from :meth:`_take`; whether it still works is looked at here."""
        with self._changed:
            current = connection.generation == self._generation and not self.closed
            if current and connection.handle.aio_is_ready():
                self._idle.append(connection)
            else:
                self._made -= 1
                self._end(connection)
            self._changed.notify()

    def _new_generation(self) -> None:
        """Do not use those again that there are; the ones in use are dropped when given back."""
        with self._changed:
            self._generation += 1

    def _connect(self, patience: float) -> _Connection:
        """Raises StorageError with the reason alone."""
        deadline = time.monotonic() + patience
        handle = self._nbd.NBD()
        try:
            handle.set_uri_allow_local_file(True)  # a key file: the user typed its name
            handle.aio_connect_uri(self.absolute)
            while handle.aio_is_connecting():
                left = deadline - time.monotonic()
                if left <= 0 or not handle.poll(max(1, int(left * 1000))):
                    raise StorageError("the server does not answer")
            size = handle.get_size()
        except self._nbd.Error as e:
            raise StorageError(message_of(e, self.absolute)) from e
        with self._changed:
            if size != self._size:
                self._size = size
                self._new_generation()
            self._measured = time.monotonic()
            return _Connection(handle, size, self._generation)

    def _end(self, connection: _Connection, patience: float = 0) -> None:
        """Say goodbye, and wait for the answer for that many seconds at the most."""
        handle = connection.handle
        try:
            if handle.aio_is_ready():
                handle.aio_disconnect()
                deadline = time.monotonic() + patience
                while not handle.aio_is_closed() and (left := deadline - time.monotonic()) > 0:
                    handle.poll(max(1, int(left * 1000)))
        except self._nbd.Error:
            pass


def _max_request(handle: Any) -> int:
    """The server's limit; 0 from libnbd means that it named none."""
    get = getattr(handle, "get_block_size", None)
    return (get(libnbd().SIZE_MAXIMUM) if get else 0) or _MAX_REQUEST
