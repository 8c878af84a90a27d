"""A snapshot's disk, its VM state or the active disk, as users see it."""

from __future__ import annotations

import io
from collections.abc import Iterator

from ..image.disk import Disk as InnerDisk
from ..image.extents import Extent as InnerExtent
from ..image.extents import merged
from ..image.image import Image as InnerImage
from ..storage.local import Buffer
from ..typed import TYPE_CHECKING, NamedTuple
from . import arguments
from .names import public
from .snapshot import Snapshot

if TYPE_CHECKING:
    from typing import NoReturn

_HOLE = 1  # NBD_STATE_HOLE
_ZERO = 2  # NBD_STATE_ZERO


@public
class Extent(NamedTuple):
    """A range of one type; a tuple of three."""

    offset: int  #: in the disk, bytes
    length: int  #: bytes
    type: int  #: of NBD's ``base:allocation``: 0 is data, 3 a hole that reads as zeros

    @property
    def is_hole(self) -> bool:
        """Whether nothing is allocated for it."""
        return bool(self.type & _HOLE)

    @property
    def is_zero(self) -> bool:
        """Whether all of it reads as zeros; data may do so too, which is not known without a
        read."""
        return bool(self.type & _ZERO)


@public
class Disk:
    """What :meth:`.Image.open` and :meth:`.Image.active` return: bytes and extents, read-only.

    Any number of threads may use a disk.  It needs no closing.  Once its image is closed,
    everything but its attributes raises ValueError.
    """

    __slots__ = ("_disk", "_image", "_snapshot", "_vm_state")

    def __init__(
        self, image: InnerImage, disk: InnerDisk, snapshot: Snapshot | None, vm_state: bool = False
    ) -> None:
        self._image = image
        self._disk = disk
        self._snapshot = snapshot
        self._vm_state = vm_state

    @property
    def size(self) -> int:
        """Bytes: the size that the disk had when the snapshot was taken."""
        return self._disk.size

    @property
    def cluster_size(self) -> int:
        """Bytes; reads that begin and end at a multiple of it cost least."""
        return self._disk.cluster_size

    @property
    def snapshot(self) -> Snapshot | None:
        """The snapshot whose disk or VM state this is; None for the active disk."""
        return self._snapshot

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset``.

        Raises ValueError outside the disk; ImageError or StorageError when the content cannot be
        read, SnapshotGone when the snapshot was deleted.  For an active disk it raises UsageError
        while a QEMU has the image open for writing.
        """
        arguments.within(self.size, length, offset)  # before there is a buffer of that length
        return self._disk.pread(length, offset)

    def pread_into(self, buffer: Buffer, offset: int) -> None:
        """Fill a writable, contiguous buffer from ``offset``, all of its bytes.

        Raises as :meth:`pread`, and TypeError for an unsuitable buffer.  After an error the
        content of the buffer is undefined.
        """
        view = arguments.writable("buffer", buffer)
        arguments.within(self.size, view.nbytes, offset)
        self._disk.pread_into(buffer, offset)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """All extents of a range, in order, merged and without gaps, from the tables alone; to the
        end of the disk where no length is given.

        Raises ValueError at once outside the disk.  The iterator raises as :meth:`pread` when it
        comes to a damaged table.
        """
        if length is None:
            length = max(0, self.size - arguments.integer("offset", offset, None))
        arguments.within(self.size, length, offset)
        self._disk.ensure_open()
        return self._extents(offset, offset + length)

    def raw(self) -> io.RawIOBase:
        """The disk as a seekable, read-only file object, with a position of its own.

        Its reads raise as :meth:`pread`, but at the end of the disk they return less, as those of
        files do.  Closing it closes nothing else.
        """
        return self._disk.raw()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Disk cannot be pickled or copied: pickle its snapshot and open that")

    def __repr__(self) -> str:
        what = self._disk.name if self._snapshot else f"active disk of {self._disk.name}"
        return f"<Disk: {what}, {self.size} bytes>"

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        for extent in merged(_in_turns(self._disk, offset, end)):
            self._disk.ensure_open()
            yield Extent._make(extent)


def _in_turns(disk: InnerDisk, offset: int, end: int) -> Iterator[InnerExtent]:
    """A server's answer ends early after a bounded amount of work; here they are asked for until
    there is no more."""
    while offset < end:
        for extent in disk.extents(offset, end - offset):
            yield extent
            offset = extent.offset + extent.length
