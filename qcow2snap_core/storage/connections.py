"""The connections to one NBD export, which several threads take turns at.

libnbd's handles serve one request at a time, so there are several connections where the server
says that they show the same (multi-conn): one for each request under way, up to a limit.  They
are made when they are needed.

A connection knows the size that the export had when it was made.  What a running QEMU appends is
therefore seen by connections that are younger: :meth:`Connections.measure` makes one.

They must all lead to the same file, or the guard would ask one about data from another, and NBD
has no word for that.  A file that replaced another on the server shows by its size at most.  So
when a new connection sees another size, or one was lost, those from before are not used again.
"""

from __future__ import annotations

import time
from threading import Condition
from typing import Any, Final, NamedTuple

from ..errors import Error, StorageError
from .libnbd import absolute, libnbd, message_of, without_secrets
from .local import closed

_MOST: Final = 8  # connections
_PATIENCE: Final = 30.0  # seconds for the first connection
# A server that takes no more than it has (qemu-nbd -e) lets further ones wait for ever.
_PATIENCE_FOR_MORE: Final = 2.0
_SIZE_HOLDS_FOR: Final = 1.0
_PAUSE_AFTER_FAILURE: Final = 30.0
_MAX_REQUEST: Final = 32 << 20  # what every server takes


class Connection(NamedTuple):
    """One that is up."""

    handle: Any
    size: int  # of the export when it was made
    generation: int


class Connections:
    """A pool of them."""

    def __init__(self, uri: str) -> None:
        """Makes the first.  Raises StorageError with the reason alone, and ValueError."""
        self.size = 0  #: of the export, as the last connection saw it
        self._uri = absolute(uri)
        self._path = without_secrets(uri)
        self._nbd = libnbd()
        self._changed = Condition()
        self._idle: list[Connection] = []
        self._made = 0  # and not dropped
        self._limit = 1
        self._closed = False
        self._measured = 0.0
        self._generation = 0  # of the connections that are still used
        first = self._connect(_PATIENCE)
        self._made = 1
        self._many = bool(first.handle.can_multi_conn())
        self._limit = _MOST if self._many else 1
        self.max_request: Final = min(_MAX_REQUEST, _max_request(first.handle))
        self._idle.append(first)

    def close(self) -> None:
        """End the idle ones; those in use when they are given back."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for connection in idle:
            self._end(connection)

    # --- Taking turns ---

    def take(self) -> Connection:
        """One that nobody else uses, of the present generation."""
        while True:
            with self._changed:
                while not self._closed and not self._idle and self._made >= self._limit:
                    self._changed.wait()
                if self._closed:
                    raise closed(self._path)
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

    def give(self, connection: Connection) -> None:
        """Back from :meth:`take`; whether it still works is looked at here."""
        with self._changed:
            current = connection.generation == self._generation and not self._closed
            if current and connection.handle.aio_is_ready():
                self._idle.append(connection)
            else:
                self._made -= 1
                self._end(connection)
            self._changed.notify()

    def take_idle(self) -> Connection | None:
        """One that is there and that nobody uses."""
        with self._changed:
            return self._idle.pop() if self._idle else None

    def was_lost(self, connection: Connection) -> bool:
        """Whether an error on it means that it is gone; then others of its time are not used
        either."""
        if not (connection.handle.aio_is_dead() or connection.handle.aio_is_closed()):
            return False
        if connection.generation == self._generation:
            self._new_generation()
        return True

    # --- The size ---

    def refresh_size(self) -> None:
        """Let the size be that of a second ago; where the server takes one connection only, that at
        the start."""
        if time.monotonic() - self._measured > _SIZE_HOLDS_FOR:
            self.measure()

    def measure(self) -> None:
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
            if not self._idle and self._made < self._limit and not self._closed:
                self._made += 1
                self.give(connection)
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

    # --- Inside ---

    def _new_generation(self) -> None:
        """Do not use those again that there are; the ones in use are dropped when given back."""
        with self._changed:
            self._generation += 1

    def _connect(self, patience: float) -> Connection:
        """Raises StorageError with the reason alone."""
        deadline = time.monotonic() + patience
        handle = self._nbd.NBD()
        try:
            handle.set_uri_allow_local_file(True)  # a key file: the user typed its name
            handle.aio_connect_uri(self._uri)
            while handle.aio_is_connecting():
                left = deadline - time.monotonic()
                if left <= 0 or not handle.poll(max(1, int(left * 1000))):
                    raise StorageError("the server does not answer")
            size = handle.get_size()
        except self._nbd.Error as e:
            raise StorageError(message_of(e, self._uri)) from e
        with self._changed:
            if size != self.size:
                self.size = size
                self._new_generation()
            self._measured = time.monotonic()
            return Connection(handle, size, self._generation)

    def _end(self, connection: Connection, patience: float = 0) -> None:
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
