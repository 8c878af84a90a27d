"""Where an image's bytes are: a regular file or a block device, opened read-only.

Nothing else is ever opened.  A file is first taken hold of by a descriptor that can do nothing
(``O_PATH``): what it is and where it really lies is asked of that descriptor, the policy is
asked, and only then is the same inode opened for reading.  So a FIFO or a tape drive is never
touched, and nobody can exchange the file between the check and the open.

A regular file is read through the page cache, which QEMU's own writes keep coherent in every
cache mode.  A block device is not: when QEMU writes it with O_DIRECT, another process's cached
pages of it may stay stale, so it is read with O_DIRECT as well (:mod:`.blockdevice`).
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Callable, Iterator

from ..errors import Error, StorageError, UsageError, reason, shown
from ..typed import Any, Final, Protocol

Buffer = Any  # a writable, contiguous bytes-like object; typing.Buffer is newer than Python 3.11


# In place of a filesystem's number, in what says which file it is.
DEVICE: Final = -1
REMOTE: Final = -2  # followed by a number of our own: it may be any file

ExpectedBytes = tuple[tuple[bytes, int], ...]  # (content, host offset)


class Storage(Protocol):
    """Something with bytes at host offsets."""

    closed: bool
    path: str  # as an error line should name it
    absolute: str  # what opens it again, from any directory
    directory: str | None  # where the names in an image that lies here start from, if anywhere
    trusted: str | None  # the directory that they may lead to without being asked for, if any
    inode: tuple[int, int]  # which file it is, by whatever name
    plain_fd: int | None  # a descriptor that is read like any file; None where that needs more

    def size(self) -> int:
        """The present size in bytes; a live image grows."""

    def read_into(self, buffer: Buffer, offset: int) -> int:
        """Fill ``buffer`` from host ``offset``; fewer bytes only where the file ends.

        Raises StorageError when the disk fails.
        """

    def read(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes from host ``offset``; fewer only where the file ends."""

    def holds(self, expected: ExpectedBytes) -> bool:
        """Whether the file still has these bytes, looked at in this order."""

    def holes(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range as (offset, length, is a hole that reads as zeros)."""

    def will_need(self, offset: int, length: int) -> None:
        """Start to fetch the range, without waiting for it."""

    def close(self) -> None:
        """Whatever is asked of it from now on raises ValueError, in every thread."""


Permit = Callable[[str, tuple[int, int]], None]


def open_storage(path: str, permit: Permit | None = None) -> Storage:
    """Open a regular file or block device for reading.

    ``permit`` is called with the resolved path and the inode, as :attr:`Storage.inode`, before
    anything is opened; it raises to refuse.
    Raises UsageError when there is no such file, or it is of another kind.
    """
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as e:
        raise UsageError(f"cannot open {shown(path)}: {reason(e)}") from e
    except ValueError as e:  # Python's own words for a NUL differ from version to version
        why = "embedded null byte" if "\0" in path else str(e)
        raise UsageError(f"cannot open {shown(path)}: {why}") from e
    try:
        kind = os.fstat(handle).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise UsageError(
                f"{shown(path)} is a {kind_name(kind)}: give a regular file or a block device"
            )
        # What the descriptor holds, whatever the name means by now.
        itself = f"/proc/self/fd/{handle}"
        real = os.readlink(itself)
        if permit is not None:
            permit(real, inode(os.fstat(handle)))
        if stat.S_ISBLK(kind):
            from .blockdevice import BlockDevice

            return BlockDevice(path, _reopen(itself, os.O_DIRECT))
        return File(path, real, _reopen(itself, 0))
    except OSError as e:
        raise UsageError(f"cannot open {shown(path)}: {reason(e)}") from e
    finally:
        os.close(handle)


def from_here(path: str) -> str:
    """Absolute, but not normalized: ``a/..`` need not be ``.`` when ``a`` is a symlink."""
    return os.path.join(os.getcwd(), path)


def inode(status: os.stat_result) -> tuple[int, int]:
    """Which file it is, as :attr:`Storage.inode` says it."""
    if stat.S_ISBLK(status.st_mode):  # a device may have several nodes
        return DEVICE, status.st_rdev
    return status.st_dev, status.st_ino


def _reopen(itself: str, flags: int) -> int:
    return os.open(itself, os.O_RDONLY | os.O_CLOEXEC | flags)


def kind_name(mode: int) -> str:
    """What a file with this mode is called, without an article."""
    kinds = {
        stat.S_IFREG: "regular file",
        stat.S_IFBLK: "block device",
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFCHR: "character device",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


# What off_t holds.  No file goes further, so what lies beyond is past its end; Python's own answer
# would be an OverflowError.
MAX_OFFSET: Final = 2**63 - 1


class File:
    """A regular file."""

    def __init__(self, path: str, real: str, fd: int) -> None:
        self.path = path
        self.absolute = from_here(path)
        self.directory: str | None = os.path.dirname(real)
        self.trusted = self.directory
        self.inode = inode(os.fstat(fd))
        self.closed = False
        self._descriptor = Descriptor(fd)
        self._fd = fd
        self.plain_fd: int | None = fd

    def size(self) -> int:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):  # the one call that a closed descriptor answers
            raise closed(self.path)
        return status.st_size

    def read_into(self, buffer: Buffer, offset: int) -> int:
        if offset > MAX_OFFSET - len(buffer):
            return 0
        try:
            got = os.preadv(self._fd, (buffer,), offset)
            if got == len(buffer) or not got:
                return got
            return self._rest_into(memoryview(buffer), offset, got)
        except OSError as e:
            raise failed(self.path, offset, len(buffer), e) from e

    def _rest_into(self, view: memoryview, offset: int, got: int) -> int:
        """A short read may be the file's end, or only the kernel's way of saving itself work."""
        while got < len(view):
            more = os.preadv(self._fd, (view[got:],), offset + got)
            if not more:
                break
            got += more
        return got

    def read(self, length: int, offset: int) -> bytes:
        if offset > MAX_OFFSET - length:
            return b""
        try:
            data = os.pread(self._fd, length, offset)
            while data and len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return data
        except OSError as e:
            raise failed(self.path, offset, length, e) from e

    def holds(self, expected: ExpectedBytes) -> bool:
        # Part of every request: no more calls than the two that the kernel has to answer.
        pread, fd = os.pread, self._fd
        try:
            for content, offset in expected:
                if pread(fd, len(content), offset) != content:
                    return False
        except OSError as e:
            raise failed(self.path, offset, len(content), e) from e
        return True

    def holes(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        end = offset + length
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                yield offset, data - offset, True
            if data < end:
                hole = self._seek(data, os.SEEK_HOLE, end)
                yield data, hole - data, False
                data = hole
            offset = data

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return min(os.lseek(self._fd, offset, whence), end)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing of that kind from here to the end
                return end
            raise failed(self.path, offset, end - offset, e) from e

    def will_need(self, offset: int, length: int) -> None:
        try:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # it was a hint: whoever needs the data will see the error

    def close(self) -> None:
        self.closed = True
        self._descriptor.close()


class Descriptor:
    """An open file's number, which nobody else gets while somebody may still read by it.

    The system gives the number of a closed descriptor to the next file that is opened, so a read
    that comes late, or is just on its way in another thread, would return that file's bytes.  A
    closed one is therefore replaced by one that can neither be read nor positioned (EBADF), and
    given back when what read from it is gone: no read has to ask or to count.
    """

    def __init__(self, fd: int) -> None:
        """Owns the descriptor."""
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        _unreadable()  # now, since at the limit of open files there is none when it is needed

    def close(self) -> None:
        """From now on every read fails; harmless when called again."""
        os.dup2(_unreadable(), self._fd, inheritable=False)


_no_file: int | None = None


def _unreadable() -> int:
    global _no_file
    if _no_file is None:
        _no_file = os.open("/", os.O_PATH | os.O_CLOEXEC)
    return _no_file


def ensure_open(storage: Storage) -> None:
    """Raises ValueError once it is closed."""
    if storage.closed:
        raise closed(storage.path)


def closed(path: str) -> ValueError:
    """What every use of a closed file raises, as Python's own files do."""
    return ValueError(f"I/O operation on closed image {shown(path)}")


def failed(path: str, offset: int, length: int, e: OSError) -> Error | ValueError:
    """What a read that failed raises."""
    if e.errno == errno.EBADF:  # descriptors are made here, and replaced by close alone
        return closed(path)
    return StorageError(
        f"reading {length} bytes of {shown(path)} at host offset {offset:#x} failed: {reason(e)}"
    )
