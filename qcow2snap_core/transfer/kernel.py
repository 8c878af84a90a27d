"""Copying by the kernel, from file to file, where the image holds the guest's bytes as they are.

copy_file_range saves a copy through this program's memory; where the filesystem can share blocks
(Btrfs, XFS) it copies nothing at all.  What it says is believed no more than a read is: only what
it says it has copied counts, and the guard is asked after that.  It copies nothing past the end of
the image's file, and can do less than it was asked for at any time: all that it leaves, for
whatever reason, is read and written in the ordinary way, which also finds the words for errors.
"""

from __future__ import annotations

import os

from ..errors import ImageError, StorageError
from ..image.disk import Disk


class KernelCopy:
    """From a disk to an open file; may be used by several threads."""

    def __init__(self, disk: Disk, fd: int) -> None:
        self._disk = disk
        self._fd = fd
        self._possible = True

    def copy(self, offset: int, length: int) -> int:
        """Copy the start of a range to the same offset of the file: how many bytes that was.

        Raises SnapshotGone when they are not to be believed.
        """
        done = 0
        while self._possible and done < length:
            n = self._once(offset + done, length - done)
            if not n:
                break
            done += n
        if done:
            self._disk.confirm()
        return done

    def _once(self, offset: int, length: int) -> int:
        try:
            found = self._disk.in_file(offset, length)
        except (ImageError, StorageError):
            return 0
        if found is None:
            return 0
        try:
            return os.copy_file_range(found.fd, self._fd, found.length, found.offset, offset)
        except OSError:  # two filesystems, or one that cannot; or an error that a read has too
            self._possible = False
            return 0
