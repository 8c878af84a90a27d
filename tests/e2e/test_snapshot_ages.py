"""Snapshots of every age: entries without extra data or with some from the future, an L1 table
smaller than the disk needs, and disks that were resized since."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.server import serve
from support.tables import Entry, write_table

SIZE = 3 * MiB
ICOUNT = 12345


def make(directory: Path, compat: str, **options: object) -> Path:
    path = qemu.create(directory / "disk.qcow2", SIZE, compat=compat, cluster_size=4096, **options)
    qemu.io(path, "write -P 1 0 1M", f"write -P 2 {SIZE - 512} 512", "write -z 64k 8k")
    qemu.take(path, "s")
    qemu.io(path, "write -P 3 0 3M")
    return path


def with_extra(path: Path, extra: bytes, l1_size: int | None = None) -> None:
    """The same snapshot in an entry with other extra data, or with fewer L1 entries."""
    s = qemu.snapshots(path)["s"]
    l1 = s.l1_size if l1_size is None else l1_size
    write_table(path, [Entry(b"1", b"s", s.l1_table_offset, l1, extra=extra)])


STATE, DISK, COUNT = bytes(8), struct.pack(">Q", SIZE), struct.pack(">Q", ICOUNT)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize(
    "extra",
    [b"", STATE, STATE + DISK, STATE + DISK + COUNT, STATE + DISK + COUNT + b"future" * 7],
    ids=len,
)
def test_extra_data_of_any_age(tmp_path: Path, compat: str, extra: bytes) -> None:
    path = make(tmp_path, compat)
    expected = qemu.content(path, "s")
    with_extra(path, extra)
    if compat == "0.10" or len(extra) >= 16:  # QEMU demands them of version 3
        assert qemu.content(path, "s") == expected
    with serve(file=path) as server:
        assert server.read("s") == expected


def test_an_entry_that_lost_its_size_has_the_active_disks(tmp_path: Path) -> None:
    path = make(tmp_path, "1.1")
    expected = qemu.content(path, "s")
    qemu.run("qemu-img", "resize", "-q", path, 5 * MiB)
    with_extra(path, b"")
    with serve(file=path) as server:
        assert server.read("s") == expected.ljust(5 * MiB, b"\0")


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}, {"compression_type": "zstd"}])
def test_snapshots_from_before_several_resizes(tmp_path: Path, options: dict[str, str]) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB, **options)
    sizes = [MiB, 40 * MiB + 512, 2 * MiB, 600 * MiB, 512]  # one L1 entry, and two
    for n, size in enumerate(sizes):
        qemu.run("qemu-img", "resize", "-q", "--shrink", path, size)
        qemu.io(path, f"write -P {n + 1} 0 512", f"write -P {n + 11} {size - 512} 512")
        qemu.take(path, f"s{n}")
    with serve(file=path) as server:
        for n, size in enumerate(sizes):
            expected = qemu.as_active(path, f"s{n}")
            assert server.extents(f"s{n}") == qemu.extents(expected)
            with server.connect(f"s{n}") as client:
                assert client.get_size() == size
                assert client.pread(512, 0) == bytes([n + 1 if size > 512 else n + 11]) * 512
                assert client.pread(512, size - 512) == bytes([n + 11]) * 512
            if size < 100 * MiB:
                assert server.read(f"s{n}") == qemu.content(expected)
