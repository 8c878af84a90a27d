"""The partitions of a disk: GUID tables and master boot records, with logical partitions.

The numbers are those of the kernel and of nbdkit's partition filter.  Tables are a guest's: each
number in them is held against the disk's size, and a chain of logical partitions has an end.  This
is read here and by no library, since ``mount`` names partitions on machines that have none.

Sources: UEFI 2.10, sections 5.2 and 5.3; the kernel's block/partitions/msdos.c and efi.c.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from typing import Final, NamedTuple

from ..errors import ImageError
from .window import Window

_SECTORS: Final = (512, 4096)
_MOST_ENTRIES: Final = 1024  # Linux numbers no more than 256
_MOST_LOGICAL: Final = 256
_EXTENDED: Final = (0x05, 0x0F, 0x85)
_PROTECTIVE: Final = 0xEE
_SIGNATURE: Final = b"\x55\xaa"

#: What is often there, for people
_NAMES: Final = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI System",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Windows data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Windows reserved",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
}
_TYPES: Final = {
    **dict.fromkeys((0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E), "FAT"),
    0x07: "NTFS or exFAT",
    0x82: "Linux swap",
    0x83: "Linux",
    0x8E: "Linux LVM",
    0xEF: "EFI System",
}


class Partition(NamedTuple):
    """A range of the disk."""

    number: int
    offset: int  #: bytes
    length: int
    type: str  #: what the table says is in it


def partitions(disk: Window) -> list[Partition]:
    """Those of a disk, by number; none where there is no table.

    Raises ImageError for a table that is damaged, or that leads outside of the disk.
    """
    start = disk.pread(0, 512)
    for sector in _SECTORS:
        if disk.pread(sector, 8) == b"EFI PART":
            found = _gpt(disk, sector)
            break
    else:
        found = _mbr(disk, start) if start[510:512] == _SIGNATURE else []
    for part in found:
        if part.offset + part.length > disk.length:
            raise ImageError(f"partition {part.number} ends behind the end of the disk")
    return sorted(found)


def _gpt(disk: Window, sector: int) -> list[Partition]:
    header = disk.exactly(sector, 92)
    size, checksum = struct.unpack_from("<II", header, 12)
    lba, count, entry_size, entries_checksum = struct.unpack_from("<QIII", header, 72)
    whole = disk.pread(sector, min(size, sector))
    if not 92 <= size <= sector or zlib.crc32(whole[:16] + bytes(4) + whole[20:]) != checksum:
        raise ImageError("the disk's GUID partition table is damaged: its header's checksum")
    if entry_size % 128 or not 128 <= entry_size <= 4096 or count > _MOST_ENTRIES:
        raise ImageError("the disk's GUID partition table is damaged: the size of its entries")
    if lba * sector + count * entry_size > disk.length:
        raise ImageError("the disk's GUID partition table is damaged: it lies behind the end")
    table = disk.pread(lba * sector, count * entry_size)
    if zlib.crc32(table) != entries_checksum:
        raise ImageError("the disk's GUID partition table is damaged: its entries' checksum")
    found = []
    for i in range(count):
        kind, first, last = struct.unpack_from("<16s16xQQ", table, i * entry_size)
        if any(kind):
            if last < first:
                raise ImageError(f"partition {i + 1} ends before its start")
            name = str(uuid.UUID(bytes_le=kind))
            where = first * sector, (last - first + 1) * sector
            found.append(Partition(i + 1, *where, _NAMES.get(name, name)))
    return found


def _mbr(disk: Window, start: bytes) -> list[Partition]:
    found = []
    for number, (kind, first, count) in enumerate(_entries(start), 1):
        if kind in _EXTENDED:
            found += _logical(disk, first)
        elif kind not in (0, _PROTECTIVE) and count:
            found.append(_partition(number, kind, first, count))
    return found


def _logical(disk: Window, first: int) -> list[Partition]:
    """Each has a boot record of its own, with its place relative to that, and with the place of the
    next one relative to the first."""
    found: list[Partition] = []
    record = first
    for _ in range(_MOST_LOGICAL):
        sector = disk.pread(record * 512, 512)
        if sector[510:512] != _SIGNATURE:
            break
        (kind, start, count), (_, onwards, more) = _entries(sector)[:2]
        if kind and count:
            found.append(_partition(5 + len(found), kind, record + start, count))
        if not onwards or not more:
            return found
        record = first + onwards
    raise ImageError("the disk's chain of logical partitions is damaged")


def _entries(sector: bytes) -> list[tuple[int, int, int]]:
    """Type, first sector and number of sectors."""
    return [struct.unpack_from("<4xB3xII", sector, 446 + 16 * i) for i in range(4)]


def _partition(number: int, kind: int, first: int, count: int) -> Partition:
    return Partition(number, first * 512, count * 512, _TYPES.get(kind, f"type {kind:#04x}"))
