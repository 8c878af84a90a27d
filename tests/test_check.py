"""check finds what qemu-img check finds, field by field, and says whose it is."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import damage, qemu
from support.qemu import KiB, MiB, RandomImage
from support.refcounts import set_refcount

import qcow2snap_core
from qcow2snap_core.check import check
from qcow2snap_core.findings import (
    BAD_ENTRY,
    BAD_TABLE,
    IN_PLACE,
    NOT_COUNTED,
    OVERLAP,
    Finding,
)

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
    with qcow2snap_core.open(str(path)) as image:
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
    "data on a table": (onto_table, OVERLAP, ONE),
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
    findings = found(disk)
    if problem:
        assert qemu_finds(disk)
        assert problem in {f.problem for f in findings}
        assert {o for f in findings if f.problem == problem for o in f.snapshots} == owners
    else:
        assert not findings
    if owners == ONE:
        assert found(disk, "two") == []
    if "1" in owners and name != "counted too little":  # two are enough for one snapshot's one use
        assert found(disk, "one")


def test_shared_clusters_that_may_be_written_in_place(disk: Path) -> None:
    qemu.io(disk, "write -P 5 0 4k")  # the active disk gets a table of its own
    active = qemu.field64(disk, 40)
    at = (qemu.field64(disk, active) & damage.OFFSET) + 8 * 5
    damage.put64(disk, at, qemu.field64(disk, at) | 1 << 63)
    assert qemu_finds(disk)
    (finding,) = found(disk)
    assert (finding.problem, finding.snapshots) == (IN_PLACE, ("@active",))


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


def test_leaks_are_no_damage(disk: Path) -> None:
    set_refcount(disk, host(disk, "one", 0) // CLUSTER, 5)
    assert found(disk) == []


def test_tables_on_one_another(disk: Path) -> None:
    """The snapshot's L1 table is said to be where the refcount table is."""
    snapshot = qemu.snapshots(disk)["two"]
    damage.put64(disk, snapshot.entry_offset, qemu.field64(disk, 48))
    findings = found(disk)
    assert OVERLAP in {f.problem for f in findings}


def test_there_is_an_end_to_what_is_told(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB, cluster_size=512)
    qemu.io(path, "write -P 1 0 4M")
    table = qemu.field64(path, 48)
    qemu.patch(path, table + 8, bytes(8 * 20))
    assert len(found(path)) == 1000
