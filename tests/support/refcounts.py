"""The refcounts that are in an image, read by plain arithmetic and not by qcow2snap_core."""

from __future__ import annotations

import struct
from pathlib import Path

from support import qemu


def refcounts(path: Path) -> dict[int, int]:
    """{cluster number: refcount} of all that are not 0, without the refcount tables' own."""
    data = path.read_bytes()
    (bits,) = struct.unpack_from(">I", data, 20)
    table, clusters = struct.unpack_from(">QI", data, 48)
    (order,) = struct.unpack_from(">I", data, 96) if data[7] == 3 else (4,)
    size, width = 1 << bits, 1 << order
    own = set(range(table // size, table // size + clusters))
    found = {}
    per_block = size * 8 // width
    for n in range(clusters * size // 8):
        (block,) = struct.unpack_from(">Q", data, table + 8 * n)
        if not block:
            continue
        own.add(block // size)
        raw = data[block : block + size]
        for i in range(min(per_block, -(-len(data) // size) - n * per_block)):
            if width >= 8:
                count = int.from_bytes(raw[i * width // 8 : (i + 1) * width // 8], "big")
            else:
                count = raw[i * width // 8] >> i * width % 8 & (1 << width) - 1
            if count:
                found[n * per_block + i] = count
    return {n: count for n, count in found.items() if n not in own}


def allocated(path: Path) -> int:
    """The bytes of all clusters in use, but for the refcounts' own."""
    return len(refcounts(path)) << struct.unpack(">I", qemu.peek(path, 20, 4))[0]


def place(path: Path, cluster: int) -> tuple[int, int, int]:
    """Where a refcount is: (file offset of its byte or bytes, width in bits, lowest bit there)."""
    data = path.read_bytes()
    (bits,) = struct.unpack_from(">I", data, 20)
    (table,) = struct.unpack_from(">Q", data, 48)
    (order,) = struct.unpack_from(">I", data, 96) if data[7] == 3 else (4,)
    width = 1 << order
    number, at = divmod(cluster, (8 << bits) // width)
    (block,) = struct.unpack_from(">Q", data, table + 8 * number)
    return block + at * width // 8, width, at * width % 8


def set_refcount(path: Path, cluster: int, count: int) -> None:
    offset, width, low = place(path, cluster)
    if width >= 8:
        qemu.patch(path, offset, count.to_bytes(width // 8, "big"))
        return
    mask = (1 << width) - 1
    byte = qemu.peek(path, offset, 1)[0] & ~(mask << low) | count << low
    qemu.patch(path, offset, bytes((byte,)))


def count_table(path: Path) -> None:
    """Count the clusters of a snapshot table that was put at the end of the file, as QEMU would."""
    (bits,) = struct.unpack(">I", qemu.peek(path, 20, 4))
    for cluster in range(qemu.field64(path, 64) >> bits, -(-path.stat().st_size >> bits)):
        set_refcount(path, cluster, 1)
