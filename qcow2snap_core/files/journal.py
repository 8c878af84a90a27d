"""What a filesystem's journal says about the filesystem beside it.

A snapshot of a running machine holds a filesystem that was not unmounted.  Its last changes are in
its journal alone, and beside it an inode may still claim blocks that another file has by now: to
read it as it lies is to read wrong bytes.  An ext journal is replayed here, into memory; for other
filesystems it can only be seen that there is something to replay.

ext: the kernel's Documentation/filesystems/ext4/journal.rst and fs/jbd2/recovery.c.  Checksums are
not compared: QEMU's snapshot is of one instant, in which a commit block that was written has its
transaction before it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from ..errors import ImageError
from .window import Window

_MAGIC: Final = 0xC03B3998
_DESCRIPTOR, _COMMIT, _REVOKE = 1, 2, 5
_REVOKES, _64BIT, _CSUM_V2, _CSUM_V3 = 0x1, 0x2, 0x8, 0x10
_KNOWN: Final = _REVOKES | _64BIT | _CSUM_V2 | _CSUM_V3
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_MOST: Final = 1 << 30  # bytes; mke2fs makes none that is larger

#: Reads all of (offset, length) of the journal, or raises
Read = Callable[[int, int], bytes]


def replayed(read: Read, size: int) -> tuple[int, dict[int, bytes]]:
    """The block size and the blocks that replaying an ext journal of that size would write.

    Raises ImageError for a journal that is damaged, or of a kind that is not known here.
    """
    header = read(0, 1024)
    if struct.unpack_from(">I", header)[0] != _MAGIC:
        raise ImageError("the filesystem's journal is damaged: no header")
    block_size, total, first, sequence, start = struct.unpack_from(">5I", header, 12)
    incompatible = struct.unpack_from(">I", header, 40)[0] if header[7] == 4 else 0
    if incompatible & ~_KNOWN:
        raise ImageError(f"the filesystem's journal has unknown features {incompatible:#x}")
    if block_size not in (1024, 2048, 4096, 8192, 16384, 32768, 65536) or not (
        0 < first < total and total * block_size <= min(size, _MOST)
    ):
        raise ImageError("the filesystem's journal is damaged: its size")
    if not start:
        return block_size, {}
    if not first <= start < total:
        raise ImageError("the filesystem's journal is damaged: its start")
    journal = _Journal(read, block_size, first, total, incompatible)
    return block_size, journal.blocks(start, sequence)


class _Journal:
    def __init__(self, read: Read, block_size: int, first: int, total: int, features: int) -> None:
        self._read = read
        self._size = block_size
        self._first, self._total = first, total
        self._features = features

    def blocks(self, start: int, sequence: int) -> dict[int, bytes]:
        """What the complete transactions write; later ones win, and what was revoked does not
        count, since the block has become somebody's data."""
        found: dict[int, tuple[int, bool]] = {}
        for writes, revokes in self._transactions(start, sequence):
            found |= writes
            for where in revokes:
                for block in self._revoked(self._block(where)):
                    found.pop(block, None)
        result = {}
        for block, (where, escape) in found.items():
            data = self._block(where)
            result[block] = struct.pack(">I", _MAGIC) + data[4:] if escape else data
        return result

    def _transactions(
        self, position: int, sequence: int
    ) -> Iterator[tuple[dict[int, tuple[int, bool]], list[int]]]:
        """Of each the blocks that it writes, with where they are in the journal and whether they
        are escaped; and where it revokes others: a block of these has thousands of numbers."""
        writes: dict[int, tuple[int, bool]] = {}
        revokes: list[int] = []
        left = self._total - self._first  # each block is part of the log once
        while left > 0:
            block = self._block(position)
            magic, kind, its = struct.unpack_from(">3I", block)
            if magic != _MAGIC or its != sequence:
                return
            here, position = position, self._after(position)
            left -= 1
            if kind == _DESCRIPTOR:
                for target, escape in self._tags(block):
                    writes[target] = position, escape
                    position = self._after(position)
                    left -= 1
            elif kind == _REVOKE:
                revokes.append(here)
            elif kind == _COMMIT:
                yield writes, revokes
                writes, revokes = {}, []
                sequence = (sequence + 1) & 0xFFFFFFFF
            else:
                return
        if left < 0:
            raise ImageError("the filesystem's journal is damaged: it has no end")

    def _tags(self, block: bytes) -> Iterator[tuple[int, bool]]:
        wide = self._features & _64BIT
        checked = self._features & (_CSUM_V2 | _CSUM_V3)
        if self._features & _CSUM_V3:
            size = 16
        else:  # journal_tag_bytes
            size = 8 + (4 if wide else 0) + (2 if self._features & _CSUM_V2 else 0)
        offset, end = 12, self._size - (4 if checked else 0)
        while offset + size <= end:
            if self._features & _CSUM_V3:
                low, flags, high = struct.unpack_from(">3I", block, offset)
            else:
                low, flags = struct.unpack_from(">I2xH", block, offset)
                high = struct.unpack_from(">I", block, offset + 8)[0] if wide else 0
            yield low | (high << 32 if wide else 0), bool(flags & _ESCAPED)
            offset += size + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                return

    def _revoked(self, block: bytes) -> tuple[int, ...]:
        size, code = (8, "Q") if self._features & _64BIT else (4, "I")
        [used] = struct.unpack_from(">I", block, 12)
        if not 16 <= used <= self._size:
            raise ImageError("the filesystem's journal is damaged: a revoke block")
        return struct.unpack_from(f">{(used - 16) // size}{code}", block, 16)

    def _block(self, number: int) -> bytes:
        return self._read(number * self._size, self._size)

    def _after(self, number: int) -> int:
        return number + 1 if number + 1 < self._total else self._first


def is_xfs_log_dirty(window: Window) -> bool:
    """Whether the last record of an XFS log is not the one of an unmounting (xlog_find_tail).

    Raises ImageError when the log is not where the superblock says.
    """
    header = window.exactly(0, 256)
    [block_size] = struct.unpack_from(">I", header, 4)
    [start] = struct.unpack_from(">Q", header, 48)
    [group_blocks] = struct.unpack_from(">I", header, 84)
    [blocks] = struct.unpack_from(">I", header, 96)
    shift = header[124]
    group, within = start >> shift, start & ((1 << shift) - 1)
    offset, length = (group * group_blocks + within) * block_size, blocks * block_size
    if not start:
        return True  # it is on another device, where nobody has looked
    if shift > 31 or not 0 < length <= 4 << 30 or offset + length > window.length:
        raise ImageError("the XFS filesystem is damaged: the place of its log")
    newest = (0, 0)
    at = None
    for piece in range(offset, offset + length, 1 << 20):
        data = window.pread(piece, min(1 << 20, offset + length - piece))
        for place in range(0, len(data), 512):
            if data[place : place + 4] == b"\xfe\xed\xba\xbe":
                cycle, number = struct.unpack_from(">II", data, place + 16)  # h_lsn
                if (cycle, number) > newest:
                    newest, at = (cycle, number), piece + place
    if at is None:
        return False
    record = window.exactly(at, 512)
    [operations] = struct.unpack_from(">I", record, 40)
    size = struct.unpack_from(">I", record, 320)[0]
    headers = max(1, -(-size // 32768)) if struct.unpack_from(">I", record, 8)[0] & 2 else 1
    operation = window.exactly(at + headers * 512, 12)
    return not (operations == 1 and operation[9] & 0x20)  # XLOG_UNMOUNT_TRANS


def is_ntfs_log_dirty(read: Read, size: int) -> bool:
    """Whether the newer of the two restart pages of $LogFile says so (ntfs_is_logfile_clean)."""
    newest, dirty = -1, False
    for page in (0, 4096):
        if page + 4096 > size:
            continue
        data = read(page, 4096)
        if data[:4] != b"RSTR":
            continue
        [area] = struct.unpack_from("<H", data, 24)
        if area + 16 > len(data):
            raise ImageError("the NTFS filesystem is damaged: its log's restart area")
        lsn, _, _, in_use, flags = struct.unpack_from("<Q4H", data, area)
        if lsn > newest:
            newest, dirty = lsn, in_use != 0xFFFF and not flags & 2
    return dirty
