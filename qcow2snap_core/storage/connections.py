"""The connections to one NBD export, which several threads take turns at.

libnbd's handles serve one request at a time, so there are several connections where the server
says that they show the same (multi-conn): one for each request under way, up to a limit.  They
are made when they are needed.

A connection knows the size that the export had when it was made.  What a running QEMU appends is
therefore seen by connections that are younger: :meth:`Connections.measure` makes one.

All of them must lead to the same file, or the guard would ask one file about data from another, and
NBD has no means to tell.  If a file was replaced by another on the server, at most its size shows
that.  So when a new connection sees another size, or a connection was lost, the older ones are not
used again.

Every wait has a limit: for a connection, for an answer, for a turn.  libnbd's synchronous calls
have none, so the asynchronous ones are used, and polled.  The limit is for silence, not for the
time that an answer takes, so a large answer over a slow line is not cut off.  If an answer is given
up its connection is of no use any more and is closed; so are the others of the same time, since the
server that was silent on one may well be gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition
from typing import Any, Final

from ..errors import Error, StorageError
from ..util.interrupts import interrupted, raise_if_interrupted
from .libnbd import absolute, libnbd, message_of, without_secrets
from .local import closed

_MOST: Final = 8  # connections
# A server that takes no more than it has (qemu-nbd -e) lets further ones wait for ever.
_PATIENCE_FOR_MORE: Final = 2.0
_SIZE_HOLDS_FOR: Final = 1.0
_PAUSE_AFTER_FAILURE: Final = 30.0
_MAX_REQUEST: Final = 32 << 20  # what every server takes
_SLICE: Final = 0.1  # seconds until Ctrl-C is heard


class Silent(StorageError):
    """The server has not said anything for too long."""


class Connection:
    """One that is up."""

    __slots__ = ("buffer", "generation", "handle", "size")

    def __init__(self, handle: Any, size: int, generation: int) -> None:
        self.handle = handle
        self.size = size  # of the export when it was made
        self.generation = generation
        #: where an answer will be put that is still to come
        self.buffer: bytearray | None = None


class Connections:
    """A pool of them."""

    def __init__(self, uri: str, patience: float) -> None:
        """Makes the first.  ``patience``: how many seconds the server may be silent while
        something is expected of it.  Raises StorageError with the reason alone, and ValueError."""
        self.size = 0  #: of the export, as the last connection saw it
        self._patience = patience
        self._heard = 0.0  # when anything last came
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
        first = self._connect(patience)
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
            disconnect(connection.handle, 0)

    # --- Taking turns ---

    def take(self) -> Connection:
        """One that nobody else uses, of the present generation.  Raises StorageError."""
        while True:
            with self._changed:
                began = time.monotonic()
                while not self._closed and not self._idle and self._made >= self._limit:
                    self._changed.wait(_SLICE)
                    raise_if_interrupted()
                    if time.monotonic() - max(began, self._heard) > self._patience:
                        raise self._silent(self._patience)
                if self._closed:
                    raise closed(self._path)
                if self._idle:
                    connection = self._idle.pop()
                    if connection.generation == self._generation:
                        return connection
                    self._made -= 1
                    disconnect(connection.handle, 0)
                    continue
                self._made += 1
                alone = self._made == 1
            try:
                connection = self._connect(self._patience if alone else self._patience_for_more)
            except BaseException as e:
                with self._changed:
                    self._made -= 1
                    if isinstance(e, Error):
                        alone = not self._made
                        self._limit = max(1, self._made)  # make do with what there is
                    self._changed.notify_all()
                if alone or not isinstance(e, Error):
                    raise
                continue
            if alone and self._many:
                self._limit = _MOST
            return connection

    def give(self, connection: Connection) -> None:
        """Back from :meth:`take`; whether it still works is looked at here."""
        with self._changed:
            current = connection.generation == self._generation and not self._closed
            if current and connection.buffer is None and connection.handle.aio_is_ready():
                self._idle.append(connection)
            else:
                self._made -= 1
                disconnect(connection.handle, 0)
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

    def read(self, connection: Connection, length: int, offset: int) -> bytearray:
        """Bytes from inside the export.  Raises libnbd's error when there is one, and Silent."""
        handle = connection.handle
        connection.buffer = buffer = bytearray(length)
        try:
            cookie = handle.aio_pread(buffer, offset)
            self._wait(handle, lambda: handle.aio_command_completed(cookie), self._patience)
        except Silent:
            if connection.generation == self._generation:
                self._new_generation()
            raise
        except self._nbd.Error:
            connection.buffer = None  # this is the answer
            raise
        connection.buffer = None
        return buffer

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
            connection = self._connect(self._patience_for_more)
        except StorageError:
            return False
        with self._changed:
            if not self._idle and self._made < self._limit and not self._closed:
                self._made += 1
                self.give(connection)
                return True
        disconnect(connection.handle, 0)
        return True

    def _make_room(self) -> bool:
        """End an idle connection, but never the only one: there are servers that end with it."""
        with self._changed:
            if self._made < 2 or not self._idle:
                return False
            self._made -= 1
            old = self._idle.pop(0)
        disconnect(old.handle, self._patience_for_more)
        return True

    # --- Inside ---

    def _new_generation(self) -> None:
        """Do not use those again that there are; the ones in use are dropped when given back."""
        with self._changed:
            self._generation += 1

    @property
    def _patience_for_more(self) -> float:
        return min(self._patience, _PATIENCE_FOR_MORE)

    def _silent(self, patience: float) -> Silent:
        return Silent(f"the server has not answered for {patience:g} s")

    def _wait(self, handle: Any, is_done: Callable[[], bool], patience: float) -> None:
        """Raises Silent when nothing comes for that many seconds, and libnbd's error."""
        heard = time.monotonic()
        milliseconds = max(1, int(min(patience, _SLICE) * 1000))
        while not is_done():
            raise_if_interrupted()
            if handle.poll(milliseconds):
                self._heard = heard = time.monotonic()
            elif time.monotonic() - heard > patience:
                raise self._silent(patience)

    def _connect(self, patience: float) -> Connection:
        """Raises StorageError with the reason alone."""
        handle = self._nbd.NBD()
        try:
            handle.set_uri_allow_local_file(True)  # a key file: the user typed its name
            handle.aio_connect_uri(self._uri)
            self._wait(handle, lambda: not handle.aio_is_connecting(), patience)
            size = handle.get_size()
        except self._nbd.Error as e:
            raise StorageError(message_of(e, self._uri)) from e
        with self._changed:
            if size != self.size:
                self.size = size
                self._new_generation()
            self._measured = time.monotonic()
            return Connection(handle, size, self._generation)


def disconnect(handle: Any, patience: float) -> None:
    """Say goodbye, and wait for the answer for that many seconds at the most.  Where an answer to
    something else is still to come, nothing is said: dropping the handle ends the connection."""
    try:
        if handle.aio_is_ready() and not handle.aio_in_flight():
            handle.aio_disconnect()
            deadline = time.monotonic() + patience
            while not handle.aio_is_closed() and not interrupted():
                left = min(deadline - time.monotonic(), _SLICE)
                if left <= 0:
                    break
                handle.poll(max(1, int(left * 1000)))
    except libnbd().Error:
        pass  # it is gone already


def _max_request(handle: Any) -> int:
    """The server's limit; 0 from libnbd means that it named none."""
    get = getattr(handle, "get_block_size", None)
    return (get(libnbd().SIZE_MAXIMUM) if get else 0) or _MAX_REQUEST
