"""The cases of QEMU's own tests of reading internal snapshots, for this server: iotests 058 (export
a snapshot by name or ID) and 029 (VM state, and L1 tables of different sizes)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support import damage, qemu
from support.qemu import KiB, MiB
from support.server import Server, refused, serve

TiB = 1 << 40


def io(server: Server, *commands: str, export: str = "") -> None:
    """qemu-io as the NBD client; its "read -P" compares."""
    steps = (x for c in commands for x in ("-c", c))
    said = qemu.run("qemu-io", "-r", "-f", "raw", *steps, server.uri(export))
    assert "failed" not in said, said


# --- 058: a snapshot, chosen by name or ID, keeps its content while the disk changes ---

OLD = ("read -P 0xa 0x1000 0x1000", "read -P 0xb 0x2000 0x1000", "read -P 0 0x3000 0x1000")
NEW = ("read -P 0xc 0x1000 0x1000", "read -P 0xd 0x2000 0x1000", "read -P 0 0x3000 0x1000")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", 64 * MiB)
    qemu.io(path, "write -P 0xa 0x1000 0x1000", "write -P 0xb 0x2000 0x1000")
    qemu.take(path, "sn1")
    qemu.io(path, "write -P 0xc 0x1000 0x1000", "write -P 0xd 0x2000 0x1000")
    qemu.run("qemu-img", "check", "-q", path)
    qemu.io(path, *NEW)
    return path


@pytest.mark.parametrize(
    "keys",
    [
        ["snapshot=sn1"],
        ["snapshot=1"],
        ["snapshot.name=sn1"],
        ["snapshot.id=1"],
        ["snapshot.id=1", "snapshot.name=sn1"],
    ],
    ids=",".join,
)
def test_058_the_exported_snapshot_holds_the_old_patterns(disk: Path, keys: list[str]) -> None:
    with serve(f"file={disk}", *keys) as server:
        io(server, *OLD)


@pytest.mark.parametrize(
    "keys",
    [
        ["snapshot=sn2"],
        ["snapshot.name=1"],
        ["snapshot.id=sn1"],
        ["snapshot.id=1", "snapshot.name=sn2"],
        ["snapshot.id=2", "snapshot.name=sn1"],
    ],
    ids=",".join,
)
def test_058_one_that_does_not_exist_is_not_exported(disk: Path, keys: list[str]) -> None:
    assert refused(f"file={disk}", *keys).endswith("it has 1 'sn1'")


def test_058_before_and_after_writes_to_the_disk(disk: Path) -> None:
    with serve(file=disk, snapshot="sn1") as server:
        io(server, *OLD)
        qemu.io(disk, "write -P 0xe 0 1M", "discard 0 64k")
        io(server, *OLD)
        qemu.take(disk, "sn2")
        io(server, *OLD)


@pytest.mark.parametrize("pick", ["sn1", "snapshot.name=sn1", "snapshot.id=1"])
def test_058_a_conversion_of_it_is_the_same(disk: Path, tmp_path: Path, pick: str) -> None:
    converted = tmp_path / "converted.qcow2"
    qemu.run("qemu-img", "convert", disk, "-l", pick, "-O", "qcow2", converted)
    qemu.io(converted, *OLD)
    with serve(f"file={disk}", "snapshot=sn1") as server:
        # It reports equality, or the first offset that differs.
        qemu.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", converted, server.uri())


# --- 029: snapshots whose L1 tables are not the active disk's ---


def set_vm_state_size(path: Path, snapshot: str, size: int) -> None:
    """qemu-img records none for the VM state that qemu-io writes."""
    entry = qemu.snapshots(path)[snapshot].entry_offset
    qemu.patch(path, entry + 32, struct.pack(">I", size & 0xFFFFFFFF))
    qemu.patch(path, entry + 40, struct.pack(">Q", size))


@pytest.mark.parametrize(
    ("cluster_size", "size", "state"), [(64 * KiB, 64 * MiB, 4 * KiB), (KiB, 16 * MiB, 4 * MiB)]
)
def test_029_an_l1_table_smaller_than_the_active_one(
    tmp_path: Path, cluster_size: int, size: int, state: int
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", size, cluster_size=cluster_size)
    qemu.take(path, "foo")
    qemu.io(path, f"write -b 0 {state}", f"write {size - MiB} 1M")
    active_l1_size = struct.unpack(">I", qemu.peek(path, 36, 4))[0]
    assert qemu.snapshots(path)["foo"].l1_size < active_l1_size
    with serve(file=path, snapshot="foo") as server:
        assert server.copy() == bytes(size)
        assert server.extents() == [(0, size, 3)]


def test_029_vm_state_lies_outside_the_disk(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 16 * MiB, cluster_size=KiB)
    qemu.io(path, "write -P 1 15M 1M", "write -b -P 0x22 0 4M", "write -b -P 0x33 1M 1k")
    qemu.take(path, "foo")
    set_vm_state_size(path, "foo", 4 * MiB - 100)
    with serve(file=path, snapshot="foo") as server:
        assert server.copy() == bytes(15 * MiB) + b"\1" * MiB
        assert server.copy("foo/vmstate") == (
            b"\x22" * MiB + b"\x33" * KiB + b"\x22" * (3 * MiB - KiB - 100)
        )


def test_029_a_huge_vm_state(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 64 * MiB)
    qemu.io(path, f"write -b -P 0x11 {TiB} 4k")
    qemu.take(path, "foo")
    set_vm_state_size(path, "foo", TiB + 4 * KiB)
    with serve(file=path) as server:
        assert server.copy("foo") == bytes(64 * MiB)
        with server.connect("foo/vmstate") as client:
            assert client.get_size() == TiB + 4 * KiB
            assert client.pread(4 * KiB, TiB) == b"\x11" * 4 * KiB
            assert client.pread(4 * KiB, TiB - 4 * KiB) == bytes(4 * KiB)
        # Beyond what was saved, QEMU's cluster goes on, but not the export.
        assert server.extents("foo/vmstate") == [(0, TiB, 3), (TiB, 4 * KiB, 0)]


def test_029_size_and_l1_size_are_the_snapshots_own(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 64 * MiB, cluster_size=512)
    qemu.io(path, "write -P 5 63M 1M")
    qemu.take(path, "foo")
    damage.put64(path, 24, 512)  # the active disk is now one sector,
    qemu.patch(path, 36, struct.pack(">I", 1))  # with one L1 entry
    with serve(file=path, snapshot="foo") as server:
        io(server, "read -P 0 0 63M", "read -P 5 63M 1M")
