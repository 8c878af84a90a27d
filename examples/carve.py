"""Find the files that were lost between two snapshots, by how files begin.

usage: carve.py IMAGE OLD NEW [DIRECTORY]

What NEW has otherwise than OLD was written over, or given back by the guest's filesystem.  There
OLD still has the content: each sector of it that begins like a file of a known kind is listed, with
its offset in the disk.  With DIRECTORY the bytes from there on, as far as they were lost too, are
put into a file of their own, at most 16 MiB.
"""

import os
import sys
from collections.abc import Iterator

import qcow2snap_core
from qcow2snap_core import Disk

SECTOR = 512  # files begin at a block of the filesystem, so at a sector
PIECE = 1 << 20
MOST = 16 << 20
KINDS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"%PDF-": "pdf",
    b"PK\x03\x04": "zip",
    b"\x7fELF": "elf",
    b"SQLite format 3\0": "sqlite",
}


def lost(old: Disk, new: Disk) -> Iterator[tuple[int, int]]:
    """(offset, length) of what may have been lost, as far as the old disk has data there."""
    ranges = [(e.offset, e.length) for e in qcow2snap_core.changes(old, new)]
    ranges.append((new.size, max(0, old.size - new.size)))
    for offset, length in ranges:
        if offset < old.size:
            extents = old.extents(offset, min(length, old.size - offset))
            yield from ((e.offset, e.length) for e in extents if not e.is_zero)


def beginnings(disk: Disk, offset: int, length: int) -> Iterator[tuple[int, str]]:
    """(offset, kind) of the sectors that begin like a file."""
    for start in range(offset, offset + length, PIECE):
        piece = disk.pread(min(PIECE, offset + length - start), start)
        for at in range(-start % SECTOR, len(piece), SECTOR):
            for magic, kind in KINDS.items():
                if piece.startswith(magic, at):
                    yield start + at, kind


def main(path: str, old_name: str, new_name: str, directory: str | None = None) -> None:
    with qcow2snap_core.open(path) as image:
        old, new = image.open(old_name), image.open(new_name)
        for offset, length in lost(old, new):
            for at, kind in beginnings(old, offset, length):
                print(f"{at:12} {kind}")
                if directory is not None:
                    with open(os.path.join(directory, f"{at}.{kind}"), "wb") as file:
                        file.write(old.pread(min(MOST, offset + length - at), at))


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit("usage: carve.py IMAGE OLD NEW [DIRECTORY]")
    try:
        main(*sys.argv[1:])
    except (qcow2snap_core.Error, OSError) as e:
        sys.exit(f"carve.py: {e}")
