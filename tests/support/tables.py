"""Snapshot tables put together by hand and hung into an image that QEMU made."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from .qemu import patch


@dataclass
class Entry:
    """One entry; ``extra`` is its extra data as it stands in the file."""

    id: bytes
    name: bytes
    l1_table_offset: int
    l1_size: int
    date: tuple[int, int] = (1_700_000_000, 123_456_789)
    vm_clock: int = 0
    vm_state_size: int = 0
    extra: bytes = b""

    def pack(self) -> bytes:
        head = struct.pack(
            ">QIHHIIQII",
            self.l1_table_offset,
            self.l1_size,
            len(self.id),
            len(self.name),
            *self.date,
            self.vm_clock,
            self.vm_state_size,
            len(self.extra),
        )
        packed = head + self.extra + self.id + self.name
        return packed + bytes(-len(packed) % 8)


def write_table(path: Path, entries: list[Entry], count: int | None = None) -> int:
    """A new snapshot table in clusters of its own at the end of the file; returns its offset.

    ``count`` is what the header says, the number of entries unless given.
    """
    with open(path, "r+b") as f:
        f.seek(20)
        cluster = 1 << int.from_bytes(f.read(4), "big")
        offset = -(-f.seek(0, 2) // cluster) * cluster
        table = b"".join(e.pack() for e in entries)
        f.seek(offset)
        f.write(table + bytes(-len(table) % cluster))
    patch(path, 60, struct.pack(">IQ", len(entries) if count is None else count, offset))
    return offset
