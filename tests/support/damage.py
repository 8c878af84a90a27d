"""Where QEMU put the tables, so that tests can change single fields of them.

Plain arithmetic of the format, on purpose not that of qcow2snap_core.
"""

from __future__ import annotations

import struct
from pathlib import Path

from support import qemu

OFFSET = 0x00FF_FFFF_FFFF_FE00
END_OF_FILE = 1 << 40  # far behind any image's end, aligned to any cluster

# Offsets in the header, and in an entry of the snapshot table.
BACKING_FORMAT = bytes.fromhex("e2792aca")
INCOMPATIBLE = 72
SNAPSHOT_L1_SIZE = 8

# The last byte of each field in an entry, for one whose ID has one byte.
SNAPSHOT_FIELDS = {
    "l1_table_offset": 7,
    "l1_size": 11,
    "date_sec": 19,
    "date_nsec": 23,
    "vm_clock_nsec": 31,
    "icount": 63,
    "name": 65,
}


def cluster_size(path: Path) -> int:
    return 1 << struct.unpack(">I", qemu.peek(path, 20, 4))[0]


def l1_entry(path: Path, snapshot: str, guest: int) -> int:
    """The file offset of the L1 entry for a guest offset."""
    cluster = cluster_size(path)
    index = guest // (cluster * (cluster // 8))
    return qemu.snapshots(path)[snapshot].l1_table_offset + 8 * index


def l2_table(path: Path, snapshot: str, guest: int) -> int:
    """The file offset of the L2 table for a guest offset, 0 if there is none."""
    return qemu.field64(path, l1_entry(path, snapshot, guest)) & OFFSET


def l2_entry(path: Path, snapshot: str, guest: int) -> int:
    """The file offset of the L2 entry for a guest offset."""
    cluster = cluster_size(path)
    return l2_table(path, snapshot, guest) + 8 * (guest // cluster % (cluster // 8))


def put64(path: Path, offset: int, value: int) -> None:
    qemu.patch(path, offset, struct.pack(">Q", value))


def stream(path: Path, snapshot: str, guest: int) -> tuple[int, int]:
    """Of a compressed cluster: (its file offset, how many sectors it takes beyond the first)."""
    entry = qemu.field64(path, l2_entry(path, snapshot, guest))
    assert entry & 1 << 62, "it is not compressed"
    bits = 62 - (cluster_size(path).bit_length() - 1 - 8)
    return entry & (1 << bits) - 1, (entry & (1 << 62) - 1) >> bits


def rename(path: Path, names: dict[str, bytes]) -> None:
    """Give snapshots names that QEMU's tools would not: a new table at the end of the file."""
    table = b""
    found = qemu.snapshots(path)
    for name, snapshot in found.items():
        entry = table_entry(path, snapshot.entry_offset)
        id_size, name_size = struct.unpack(">HH", entry[12:16])
        new = names.get(name, entry[len(entry) - name_size :])
        entry = entry[:14] + struct.pack(">H", len(new)) + entry[16 : len(entry) - name_size] + new
        assert id_size, "QEMU gives every snapshot an ID"
        table += entry + bytes(-len(entry) % 8)
    put_table(path, len(found), table)


def table_entry(path: Path, offset: int) -> bytes:
    """An entry of the snapshot table, without its padding."""
    head = qemu.peek(path, offset, 40)
    id_size, name_size = struct.unpack(">HH", head[12:16])
    return qemu.peek(path, offset, 40 + id_size + name_size + int.from_bytes(head[36:], "big"))


def put_table(path: Path, count: int, table: bytes) -> None:
    cluster = cluster_size(path)
    offset = -(-path.stat().st_size // cluster) * cluster
    qemu.patch(path, offset, table.ljust(cluster, b"\0"))
    qemu.patch(path, 60, struct.pack(">IQ", count, offset))


def drop_backing_format(path: Path) -> None:
    """Turn the header extension that records it into one that nobody knows."""
    at = qemu.peek(path, 0, 4096).index(BACKING_FORMAT)
    qemu.patch(path, at, b"\x12\x34\x56\x78")
