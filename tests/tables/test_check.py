"""check finds what qemu-img check finds, field by field, and says whose it is."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import damage, qemu
from support.qemu import KiB, MiB, RandomImage
from support.refcounts import set_refcount
from support.tables import Entry, write_table

from qcow2snap_core.image.opener import open_image
from qcow2snap_core.tables.check import check
from qcow2snap_core.tables.findings import (
    BAD_ENTRY,
    BAD_TABLE,
    IN_PLACE,
    LEAK,
    NOT_COUNTED,
    OVERLAP,
    Finding,
)
from qcow2snap_core.tables.tally import Uses

CLUSTER = 4 * KiB
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "v2": {"options": {"compat": "0.10"}},
    "512": {"options": {"cluster_size": 512}, "size": MiB + 512},
    "compressed": {"compressed": True},
    "extended": {"options": {"extended_l2": "on"}, "compressed": True},
    "refcounts-4": {"options": {"refcount_bits": 4}},
    "refcounts-8": {"options": {"refcount_bits": 8}, "compressed": True},
    "refcounts-32": {"options": {"refcount_bits": 32}},
    "refcounts-64": {"options": {"refcount_bits": 64, "cluster_size": 512}, "size": MiB},
}


def found(path: Path, snapshot: str | None = None) -> list[Finding]:
    with open_image(str(path)) as image:
        chosen = next((s for s in image.snapshots if s.name == snapshot), None)
        return check(image, chosen)


def qemu_finds(path: Path) -> bool:
    """Whether qemu-img check sees damage beyond leaks."""
    done = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, check=False)
    assert done.returncode in (0, 1, 2, 3), done
    return done.returncode in (1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_qemu_made_is_clean(tmp_path: Path, shape: str) -> None:
    image = RandomImage(tmp_path / "disk.qcow2", 4, **SHAPES[shape])
    for name in image.make():
        assert found(image.path, name) == []
    assert found(image.path) == []
    qemu.delete(image.path, "two")
    assert found(image.path) == []
    assert not qemu_finds(image.path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB, cluster_size=CLUSTER)
    qemu.io(path, "write -P 1 0 64k", "write -c -P 2 64k 4k", "write -P 3 2M 64k")
    qemu.take(path, "one")
    qemu.io(path, "write -P 4 0 64k")
    qemu.take(path, "two")
    return path


def host(path: Path, snapshot: str, guest: int) -> int:
    return qemu.field64(path, damage.l2_entry(path, snapshot, guest)) & damage.OFFSET


def l2(change: Callable[[int], int]) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        at = damage.l2_entry(path, "one", 8 * KiB)
        damage.put64(path, at, change(qemu.field64(path, at)))

    return patch


def l1(value: int) -> Callable[[Path], None]:
    return lambda path: damage.put64(path, damage.l1_entry(path, "one", 0), value)


def onto_table(path: Path) -> None:
    """A data cluster that is an L2 table of the other snapshot."""
    at = damage.l2_entry(path, "one", 8 * KiB)
    damage.put64(path, at, damage.l2_table(path, "two", 0))


def stream_past_end(path: Path) -> None:
    at = damage.l2_entry(path, "one", 64 * KiB)
    damage.put64(path, at, 1 << 62 | damage.END_OF_FILE)


def two_on_one_cluster(guest: int) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        at = damage.l2_entry(path, "one", guest)
        damage.put64(path, at, qemu.field64(path, at + 8))

    return patch


def uncount(guest: int) -> Callable[[Path], None]:
    return lambda path: set_refcount(path, host(path, "one", guest) // CLUSTER, 0)


def undercount(path: Path) -> None:
    set_refcount(path, host(path, "one", 2 * MiB) // CLUSTER, 2)


def lost_block(path: Path) -> None:
    damage.put64(path, qemu.field64(path, 48), damage.END_OF_FILE)


def no_block(path: Path) -> None:
    damage.put64(path, qemu.field64(path, 48), 0)


def block_is_header(path: Path) -> None:
    damage.put64(path, qemu.field64(path, 48), 0x200)


ONE, BOTH, ALL = {"1"}, {"1", "2"}, {"1", "2", "@active"}

# What is done; the kind of finding; whose it is.
DAMAGES: dict[str, tuple[Callable[[Path], None], str, set[str]]] = {
    "unaligned": (l2(lambda e: e | 0x200), BAD_ENTRY, ONE),
    "reserved bit": (l2(lambda e: e | 2), BAD_ENTRY, ONE),
    "past the end": (l2(lambda e: damage.END_OF_FILE), BAD_ENTRY, ONE),
    "stream past the end": (stream_past_end, BAD_ENTRY, ONE),
    "data on a table": (onto_table, OVERLAP, ALL),
    "two guest clusters on one": (two_on_one_cluster(8 * KiB), NOT_COUNTED, ONE),
    "two on one that all share": (two_on_one_cluster(2 * MiB), NOT_COUNTED, ALL),
    "data on the header": (l2(lambda e: 1 << 63), "", set()),  # offset 0 is no data
    "table unaligned": (l1(0x10200), BAD_ENTRY, ONE),
    "table past the end": (l1(damage.END_OF_FILE), BAD_TABLE, ONE),
    "freed": (uncount(0), NOT_COUNTED, ONE),
    "shared and freed": (uncount(2 * MiB), NOT_COUNTED, ALL),
    "counted too little": (undercount, NOT_COUNTED, ALL),
    "refcount block past the end": (lost_block, BAD_TABLE, set()),
    "no refcount block": (no_block, NOT_COUNTED, ALL),
    "refcount block unaligned": (block_is_header, BAD_TABLE, set()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_whose_it_is(disk: Path, name: str) -> None:
    harm, problem, owners = DAMAGES[name]
    harm(disk)
    findings = [f for f in found(disk) if f.is_damage]
    if problem:
        assert qemu_finds(disk)
        assert problem in {f.problem for f in findings}
        assert {o for f in findings if f.problem == problem for o in f.snapshots} == owners
    else:
        assert not findings
    for snapshot, id_ in (("one", "1"), ("two", "2")):
        its = [f for f in findings if id_ in f.snapshots or not f.snapshots]
        assert places(found(disk, snapshot)) == places(its)


def places(findings: list[Finding]) -> set[tuple[str, int | None, frozenset[str]]]:
    return {(f.problem, f.host, frozenset(f.snapshots)) for f in findings}


def test_shared_clusters_that_may_be_written_in_place(disk: Path) -> None:
    qemu.io(disk, "write -P 5 0 4k")  # the active disk gets a table of its own
    active = qemu.field64(disk, 40)
    at = (qemu.field64(disk, active) & damage.OFFSET) + 8 * 5
    damage.put64(disk, at, qemu.field64(disk, at) | 1 << 63)
    assert qemu_finds(disk)
    (finding,) = found(disk)
    assert (finding.problem, finding.snapshots) == (IN_PLACE, ("2", "@active"))
    assert found(disk, "two") == [finding._replace(message=found(disk, "two")[0].message)]
    assert found(disk, "one") == []


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64])
def test_every_width_of_refcounts(tmp_path: Path, width: int) -> None:
    """Clusters at odd places are freed, and only those are told."""
    path = qemu.create(
        tmp_path / "disk.qcow2",
        MiB,
        cluster_size=CLUSTER,
        refcount_bits=width,
        lazy_refcounts="off",
    )
    qemu.io(path, "write -P 1 0 256k")
    assert found(path) == []
    active = struct.unpack(">Q", qemu.peek(path, 40, 8))[0]
    table = qemu.field64(path, active) & damage.OFFSET
    lost = [qemu.field64(path, table + 8 * n) & damage.OFFSET for n in (3, 10, 21, 40)]
    for offset in lost:
        set_refcount(path, offset // CLUSTER, 0)
    findings = found(path)
    assert sorted(f.host for f in findings) == sorted(lost)
    assert {f.problem for f in findings} == {NOT_COUNTED}
    assert qemu_finds(path)


def qemu_leaks(path: Path) -> int:
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", path], capture_output=True, check=False
    )
    return int(json.loads(done.stdout).get("leaks", 0))


@pytest.mark.parametrize(("shape", "leaked"), [("plain", 9), ("512", 40), ("refcounts-64", 4)])
def test_leaks_are_counted_as_qemu_counts_them(tmp_path: Path, shape: str, leaked: int) -> None:
    """Some of clusters in use, some behind them where nothing is in use for long."""
    image = RandomImage(tmp_path / "disk.qcow2", 4, **SHAPES[shape])
    image.make()
    cluster = struct.unpack(">I", qemu.peek(image.path, 20, 4))[0]
    used = image.path.stat().st_size >> cluster
    for n in range(leaked):
        set_refcount(image.path, used - 5 + n, 7)
    with open(image.path, "r+b") as f:
        f.truncate(used - 3 + leaked << cluster)
    [finding] = found(image.path)
    assert (finding.problem, finding.is_damage) == (LEAK, False)
    assert finding.clusters == qemu_leaks(image.path) >= leaked - 2
    assert found(image.path, "two") == []


def test_what_is_behind_damage_is_no_leak(disk: Path) -> None:
    l1(damage.END_OF_FILE)(disk)
    assert qemu_leaks(disk)
    assert all(f.is_damage for f in found(disk))


def test_tables_on_one_another(disk: Path) -> None:
    """The snapshot's L1 table is said to be where the refcount table is."""
    snapshot = qemu.snapshots(disk)["two"]
    damage.put64(disk, snapshot.entry_offset, qemu.field64(disk, 48))
    findings = found(disk)
    assert OVERLAP in {f.problem for f in findings}


# --- The entries of the snapshot table ---

SIZES = struct.pack(">QQQ", 0, 4 * MiB, 2**64 - 1)

# Which fields are changed in the entry of "two"; words of the finding; whether QEMU sees it.
ODD_ENTRIES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "nothing odd": ({}, "", False),
    "all that version 3 needs": ({"extra": SIZES[:16]}, "", False),
    "no disk size": ({"extra": SIZES[:15]}, "has 15 bytes of extra data, too few", True),
    "no extra data": ({"extra": b""}, "has 0 bytes of extra data, too few", True),
    "an empty ID": ({"id": b""}, "has an empty ID", False),
    "another's ID": ({"id": b"1"}, "has the same ID as 1 other", False),
    "an empty name": ({"name": b""}, "", False),
    "no L1 table": ({"l1_table_offset": 0, "l1_size": 0}, "has no L1 table for its disk", False),
    "neither L1 table nor disk": (
        {"l1_table_offset": 0, "l1_size": 0, "extra": bytes(24)},
        "",
        False,
    ),
    "a short L1 table": (
        {"extra": struct.pack(">QQ", 0, 1 << 40)},
        "has an L1 table that ends at 4194304 of the 1099511627776 bytes of its disk",
        False,
    ),
}


@pytest.mark.parametrize("name", ODD_ENTRIES)
def test_an_entry_that_no_qemu_writes(disk: Path, name: str) -> None:
    changes, words, qemu_sees = ODD_ENTRIES[name]
    one, two = (
        Entry(s.id.encode(), s.name.encode(), s.l1_table_offset, s.l1_size, extra=SIZES)
        for s in qemu.snapshots(disk).values()
    )
    table = one.pack() + Entry(**{**vars(two), **changes}).pack()
    qemu.patch(disk, qemu.snapshots(disk)["one"].entry_offset, table)
    findings = found(disk)
    if words:
        assert {f.problem for f in findings} == {BAD_TABLE}
        assert all(words in f.message for f in findings)
        assert [f.message for f in findings if "entry 2 of the snapshot table" in f.message]
    else:
        assert not [f for f in findings if f.is_damage]
    assert qemu_finds(disk) == qemu_sees
    # What concerns one of them is told when that is asked for.
    with open_image(str(disk)) as image:
        for s in image.snapshots:
            its = [f.message for f in findings if s.name[:3] in f.message]
            assert [f.message for f in check(image, s)] == its


def test_zeros_that_are_counted_as_entries(disk: Path) -> None:
    damage.put_table(disk, 2, damage.table_entry(disk, qemu.snapshots(disk)["one"].entry_offset))
    messages = [f.message for f in found(disk) if f.problem == BAD_TABLE]
    assert [m.split("(ID ), ")[1] for m in messages] == [
        "has an empty ID",
        "has 0 bytes of extra data, too few to record its disk's size, which version 3 requires",
        "has no L1 table for its disk of 4194304 bytes",
    ]
    assert qemu_finds(disk)


@pytest.mark.parametrize("extra", [0, 8, 16])
def test_old_entries_of_version_2(tmp_path: Path, extra: int) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB, compat="0.10")
    qemu.take(path, "old")
    (old,) = qemu.snapshots(path).values()
    entry = Entry(
        b"1", b"old", old.l1_table_offset, old.l1_size, extra=struct.pack(">QQ", 0, MiB)[:extra]
    )
    qemu.patch(path, old.entry_offset, entry.pack())
    assert found(path) == []
    assert not qemu_finds(path)


# --- Limits ---


def test_more_uses_than_32_bits_can_count(tmp_path: Path) -> None:
    """1,100 snapshots share 16 tables, whose 262,144 entries all lead to one cluster."""
    cluster, snapshots, shared = 2 * MiB, 1100, 16
    path = qemu.create(tmp_path / "disk.qcow2", cluster, cluster_size=cluster)
    end = path.stat().st_size // cluster + 1
    data, l1, l2 = (n * cluster for n in (end, end + 1, end + 1 + snapshots))
    with open(path, "r+b") as f:
        for n in range(shared):
            f.seek(l2 + n * cluster)
            f.write(struct.pack(">Q", data) * (cluster // 8))
        for n in range(snapshots):
            f.seek(l1 + n * cluster)
            f.write(struct.pack(f">{shared}Q", *range(l2, l2 + shared * cluster, cluster)))
    size = struct.pack(">QQ", 0, cluster)
    write_table(
        path,
        [
            Entry(b"%d" % n, b"%d" % n, l1 + n * cluster, shared, extra=size)
            for n in range(snapshots)
        ],
    )
    findings = found(path)
    assert len(findings) == 1000
    uses = snapshots * shared * (cluster // 8)
    assert uses > 1 << 32
    [of_data] = [f for f in findings if f.host == data]
    assert f"(data) is in use {uses} times and counted 0" in of_data.message
    assert len(of_data.snapshots) == snapshots


def test_uses_are_counted_past_32_bits() -> None:
    uses = Uses()
    for cluster, times in [(5, 2**32 - 1), (5, 1), (6, 7), (5, 2**40), (4096, 1)]:
        uses.add(cluster, times)
    uses.add_all([6, 4096, 4096, 7, 6], 2**31)
    counted = {5: 2**32 + 2**40, 6: 7 + 2**32, 7: 2**31, 4096: 1 + 2**32}
    assert {cluster: uses.of(cluster) for cluster in counted} == counted
    told = {
        first + n: times
        for first, part in uses.stretches(64)
        for n, times in enumerate(part)
        if times
    }
    assert told == counted


def test_there_is_an_end_to_what_is_told(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB, cluster_size=512)
    qemu.io(path, "write -P 1 0 4M")
    table = qemu.field64(path, 48)
    qemu.patch(path, table + 8, bytes(8 * 20))
    assert len(found(path)) == 1000
