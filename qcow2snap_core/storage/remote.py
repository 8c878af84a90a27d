"""An image file behind an NBD server, which may have it from ssh, https, Ceph or an object store.

A connection that is lost is replaced and the request repeated, once; after that it is an error, and
the next request tries anew (:mod:`.connections`).  A server that is silent for too long is an error
at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from ..errors import StorageError, UsageError, shown
from .connections import Connections
from .libnbd import PATIENCE, absolute, libnbd, message_of, without_secrets
from .local import REMOTE, Buffer, ExpectedBytes, ensure_open

_numbers = count()


class RemoteFile:
    """An NBD export.  Safe to use from several threads."""

    plain_fd: int | None = None
    directory: str | None = None
    trusted: str | None = None

    def __init__(self, uri: str, patience: float = PATIENCE) -> None:
        """Connects.  ``patience``: how many seconds the server may be silent when it should answer.
        Raises UsageError when that fails."""
        self.path = without_secrets(uri)
        self.absolute = absolute(uri)
        self.inode = (REMOTE, next(_numbers))  # whatever is behind it, it is no file of ours
        self.closed = False
        self._nbd = libnbd()
        try:
            self._connections = Connections(uri, patience)
        except (StorageError, ValueError) as e:  # libnbd takes UTF-8 without a NUL
            raise UsageError(f"cannot open {shown(self.path)}: {e}") from e

    def size(self) -> int:
        """That of a second ago; where the server takes one connection only, that at the start."""
        ensure_open(self)
        self._connections.refresh_size()
        return self._connections.size

    def read_into(self, buffer: Buffer, offset: int) -> int:
        view = memoryview(buffer).cast("B")
        want = self._inside(len(view), offset)
        for at in range(0, want, self._connections.max_request):
            piece = view[at : min(want, at + self._connections.max_request)]
            piece[:] = self._read(len(piece), offset + at)
        return want

    def read(self, length: int, offset: int) -> bytes:
        there = self._connections
        if 0 < length <= there.max_request and offset + length <= there.size:
            return bytes(self._read(length, offset))
        data = bytearray(length)
        return bytes(memoryview(data)[: self.read_into(data, offset)])

    def holds(self, expected: ExpectedBytes) -> bool:
        # One after the other, each a round trip.  Asked for together they may be answered in any
        # order, and the guard's argument wants the header's answer to be the older one.
        for content, offset in expected:
            if self.read(len(content), offset) != content:
                # Whoever changed it may have put the new table behind the end.
                self._connections.measure()
                return False
        return True

    def holes(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        # Only raw layers are asked for their holes, and what a layer names is never remote.
        yield offset, length, False

    def will_need(self, offset: int, length: int) -> None:
        """A hint for the server, if it takes any; the answer is left to the connection's next
        user."""
        connection = self._connections.take_idle()
        if connection is None:
            return
        try:
            want = min(connection.size - offset, length, self._connections.max_request)
            if want > 0 and connection.handle.can_cache():
                connection.handle.aio_cache(want, offset, lambda _: 1)
        except self._nbd.Error:
            pass  # whoever needs the data will see the error
        finally:
            self._connections.give(connection)

    def close(self) -> None:
        self.closed = True
        self._connections.close()

    # --- Inside ---

    def _inside(self, length: int, offset: int) -> int:
        """How much of a range is inside the export."""
        ensure_open(self)
        if offset + length > self._connections.size:
            # What is short is taken for the file's end, and for damage: so this has to be the end
            # that it has now.
            self._connections.measure()
        return max(0, min(length, self._connections.size - offset))

    def _read(self, length: int, offset: int) -> bytearray:
        """That much from inside the export."""
        try:
            for again in (True, False):
                connection = self._connections.take()
                try:
                    return self._connections.read(connection, length, offset)
                except self._nbd.Error as e:
                    if not (again and self._connections.was_lost(connection)):
                        raise StorageError(message_of(e)) from e
                finally:
                    self._connections.give(connection)
        except StorageError as e:
            raise StorageError(
                f"reading {length} bytes of {shown(self.path)} at host offset {offset:#x} "
                f"failed: {e}"
            ) from e
        raise AssertionError
