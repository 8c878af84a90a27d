"""qcow2snap check: lines or JSON, and the status that scripts ask for."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support import damage, qemu
from support.command import qcow2snap, qcow2snap_json, run
from support.qemu import KiB, MiB
from support.refcounts import set_refcount
from support.tables import Entry, write_table


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("weekly", "nightly"):
        qemu.io(path, "write -P 1 0 128k")
        qemu.take(path, name)
    return path


def test_clean(disk: Path) -> None:
    assert qcow2snap("check", disk) == "no damage found\n"
    assert qcow2snap("check", disk, "2") == "no damage found that concerns 'nightly'\n"
    assert qcow2snap_json("check", disk, "nightly") == []


def test_a_snapshot_whose_cluster_was_freed(disk: Path) -> None:
    host = qemu.field64(disk, damage.l2_entry(disk, "weekly", 64 * KiB)) & damage.OFFSET
    set_refcount(disk, host // (64 * KiB), 0)
    message = (
        f"the cluster at host offset {host:#x} (data) is in use 1 times and counted 0: "
        f"it can be overwritten"
    )
    assert qcow2snap("check", disk, status=3) == f"refcount: {message} [1]\n"
    assert qcow2snap_json("check", disk, "weekly", status=3) == [
        {"problem": "refcount", "message": message, "snapshots": ["1"], "host": host}
    ]
    assert qcow2snap("check", disk, "nightly") == "no damage found that concerns 'nightly'\n"


def test_leaks_are_told_and_are_no_damage(disk: Path) -> None:
    host = qemu.field64(disk, damage.l2_entry(disk, "weekly", 64 * KiB)) & damage.OFFSET
    set_refcount(disk, host // (64 * KiB), 9)
    leak, clean = qcow2snap("check", disk).splitlines()
    assert leak.startswith("leak: 1 cluster (64 KiB) counted more often than used")
    assert clean == "no damage found"
    [found] = qcow2snap_json("check", disk)
    assert (found["problem"], found["clusters"], found["snapshots"]) == ("leak", 1, [])
    qemu.run("qemu-img", "check", "-q", "-r", "leaks", disk)  # as it says
    assert qcow2snap_json("check", disk) == []


def test_it_could_not_check(disk: Path, tmp_path: Path) -> None:
    assert run("check", tmp_path / "none").returncode == 1
    assert "no snapshot 'monthly'" in run("check", disk, "monthly").stderr
    qemu.patch(disk, damage.INCOMPATIBLE + 7, b"\x02")  # QEMU says that it is corrupt
    assert run("check", disk).returncode == 1


def test_refcounts_that_are_known_to_be_stale_are_not_compared(disk: Path) -> None:
    qemu.patch(disk, damage.INCOMPATIBLE + 7, b"\x01")
    host = qemu.field64(disk, damage.l2_entry(disk, "weekly", 0)) & damage.OFFSET
    set_refcount(disk, host // (64 * KiB), 0)
    done = run("check", disk)
    assert (done.returncode, done.stdout) == (0, "no damage found\n")
    assert "is marked dirty" in done.stderr


def test_a_line_names_no_more_than_fifty(disk: Path) -> None:
    s = qemu.snapshots(disk)["weekly"]
    size = struct.pack(">QQ", 0, MiB)
    write_table(
        disk,
        [Entry(b"%d" % n, b"", s.l1_table_offset, s.l1_size, extra=size) for n in range(60)],
    )
    host = damage.l2_table(disk, "", 0)
    [line] = [
        x for x in qcow2snap("check", disk, status=3).splitlines() if f"offset {host:#x} (" in x
    ]
    assert line.endswith(", 48, 49, and 10 more]")
    [finding] = [
        f
        for f in qcow2snap_json("check", disk, status=3)
        if (f["problem"], f.get("host")) == ("refcount", host)
    ]
    assert finding["snapshots"] == [*map(str, range(60))]
