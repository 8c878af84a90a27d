"""What can lie below a snapshot's disk: a raw file here, or another qcow2 file's active disk."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import StorageError, shown
from ..storage.local import Buffer, Storage
from ..typed import Protocol
from .extents import ALLOCATED, HOLE_ZERO, FileRange, MappedRange
from .mapping import DATA, ZERO, Budget
from .native import LayerDescription


class Layer(Protocol):
    """One of a chain."""

    size: int

    @property
    def below(self) -> Layer | None:
        """The next one."""

    def description(self) -> LayerDescription | None:
        """What :mod:`.native` tells the engine of it; None where it cannot read that."""

    def fill(self, buffer: Buffer, offset: int, budget: Budget | None = None) -> None:
        """Fill the buffer; the range lies inside the layer.  Raises ImageError, StorageError."""

    def ranges(
        self, offset: int, length: int, budget: Budget | None = None
    ) -> Iterator[MappedRange]:
        """The range, lazily, or as much of it as the budget goes; merging is up to the caller."""

    def in_file(self, offset: int, length: int) -> FileRange | None:
        """Where the start of the range lies in a file as it is; None where it does not, or where
        nothing but a read can tell.  Raises ImageError, StorageError.

        The file may end before it does, and who has used it asks :meth:`.Disk.confirm`.
        """


class RawLayer:
    """A raw backing file: its bytes are the disk's, its holes are zeros."""

    below = None

    def __init__(self, storage: Storage) -> None:
        self.size = storage.size()
        self._storage = storage

    def description(self) -> LayerDescription | None:
        fd = self._storage.plain_fd
        return None if fd is None else (fd, self.size)

    def in_file(self, offset: int, length: int) -> FileRange | None:
        fd = self._storage.plain_fd
        return None if fd is None else FileRange(fd, offset, length)

    def fill(self, buffer: Buffer, offset: int, budget: Budget | None = None) -> None:
        got = self._storage.read_into(buffer, offset)
        if got < len(buffer):
            raise self._shrunk()

    def ranges(
        self, offset: int, length: int, budget: Budget | None = None
    ) -> Iterator[MappedRange]:
        if offset + length > self._storage.size():
            raise self._shrunk()  # or what is missing would pass for a hole
        for start, n, hole in self._storage.holes(offset, length):
            if hole and offset + length > self._storage.size():
                raise self._shrunk()
            if hole:
                yield MappedRange(start, n, HOLE_ZERO, None, ZERO, 0)
            else:
                yield MappedRange(start, n, ALLOCATED, None, DATA, start)
            if budget is not None:
                budget.remaining -= 1
                if budget.remaining < 0:
                    return

    def _shrunk(self) -> StorageError:
        storage = self._storage
        return StorageError(
            f"{shown(storage.path)} has only {storage.size()} bytes left of {self.size}"
        )
