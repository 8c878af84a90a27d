"""The space that a snapshot takes alone is what qemu-img snapshot -d frees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest
from support import damage, qemu
from support.qemu import KiB, MiB, RandomImage
from support.refcounts import allocated
from support.vm import machine

from qcow2snap_core.image.image import Image
from qcow2snap_core.image.opener import open_image
from qcow2snap_core.tables.space import _Space, exclusive_sizes, freed_together

CLUSTER = 64 * KiB
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "v2": {"options": {"compat": "0.10"}},
    "512": {"options": {"cluster_size": 512}, "size": MiB + 512, "operations": 6},
    "compressed": {"compressed": True},
    "compressed-4k": {"compressed": True, "options": {"cluster_size": 4096}},
    "extended": {"options": {"extended_l2": "on"}},
    "extended-compressed": {"compressed": True, "options": {"extended_l2": "on"}},
    "wide": {"options": {"refcount_bits": 64, "cluster_size": 2048}},
}


def sizes(image: Image) -> dict[str, int | None]:
    snapshots = image.snapshots
    found = [freed and freed.size for freed in exclusive_sizes(image, snapshots)]
    return dict(zip([s.name for s in snapshots], found, strict=True))


def size_together(image: Image, names: tuple[str, ...]) -> int | None:
    snapshots = image.snapshots
    chosen = {s.identity for s in snapshots if s.name in names}
    freed = freed_together(image, snapshots, chosen)
    return freed and freed.size


def assert_freed(path: Path) -> None:
    """Every snapshot is deleted in a copy of its own, and pairs, and all; then all in turn."""
    with open_image(str(path)) as image:
        said = sizes(image)
        sets = [*islice(combinations(said, 2), 4), tuple(said)]
        together = {names: size_together(image, names) for names in sets}
    copy = path.with_name("copy.qcow2")
    for names, size in together.items():
        shutil.copyfile(path, copy)
        before = allocated(copy)
        for name in names:
            qemu.delete(copy, name)
        assert before - allocated(copy) == size, names
    for name, size in said.items():
        shutil.copyfile(path, copy)
        before = allocated(copy)
        qemu.delete(copy, name)
        assert before - allocated(copy) == size, name
    shutil.copyfile(path, copy)
    for name in said:
        with open_image(str(copy)) as image:
            size = sizes(image)[name]
        before = allocated(copy)
        qemu.delete(copy, name)
        assert before - allocated(copy) == size, name


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_qemu_frees(tmp_path: Path, shape: str, seed: int) -> None:
    keys = dict(SHAPES[shape])
    operations = keys.pop("operations", 12)
    image = RandomImage(tmp_path / "disk.qcow2", seed, **keys)
    image.make(["one", "two", "three"], operations)
    assert_freed(image.path)


def test_clusters_that_only_two_snapshots_share_are_nobodys_own(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 1 0 128k")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 0 64k")
    qemu.take(path, "two")
    qemu.io(path, "write -P 3 0 128k")
    with open_image(str(path)) as image:
        # An L1 and an L2 table each; of the data, the first cluster.
        assert sizes(image) == {"one": 3 * 64 * KiB, "two": 3 * 64 * KiB}
    assert_freed(path)


def test_zeroed_clusters_that_keep_their_allocation_are_still_shared(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 1 0 512k")
    qemu.take(path, "one")
    qemu.io(path, "write -z 0 256k")
    assert_freed(path)


def test_snapshots_of_several_sizes(tmp_path: Path) -> None:
    """The L1 tables are of different lengths."""
    path = qemu.create(tmp_path / "disk.qcow2", 100 * KiB, cluster_size=512)
    for n, size in enumerate(["300k", "40k", "2M"]):
        qemu.io(path, f"write -P {n + 1} 0 30k")
        qemu.take(path, str(n))
        qemu.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, size)
        qemu.io(path, f"write -P {n + 5} 20k 20k")
    assert_freed(path)


def test_the_snapshot_table_counts_where_it_shrinks(tmp_path: Path) -> None:
    """With the last snapshot goes the table; of seven, an entry may be what filled a cluster."""
    path = qemu.create(tmp_path / "disk.qcow2", 64 * KiB, cluster_size=512)
    for n in range(7):
        qemu.take(path, "n" * (20 * n + 1))
    assert_freed(path)


@pytest.mark.parametrize("snapshot", ["one", "two"])
def test_damage_leaves_open_what_depends_on_it(tmp_path: Path, snapshot: str) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("one", "two", "three"):
        qemu.io(path, "write -P 1 0 128k")
        qemu.take(path, name)
    damage.put64(path, damage.l1_entry(path, snapshot, 0), damage.END_OF_FILE)
    with open_image(str(path)) as image:
        assert sizes(image)[snapshot] is None


def clusters_of_vm_state(path: Path, name: str) -> int:
    """By qemu-img map of the disk that goes on over the state: data, and the L2 tables to it."""
    copy = qemu.as_active(path, name, vm_state=True)
    size = -(-qemu.snapshots(path)[name].disk_size // CLUSTER) * CLUSTER
    per_table = CLUSTER // 8 * CLUSTER
    base = -(-size // per_table) * per_table
    entries = json.loads(qemu.run("qemu-img", "map", "--output=json", copy))
    data = [e for e in entries if e["data"] and e["start"] + e["length"] > base]
    found = sum(-(-(e["start"] + e["length"] - max(base, e["start"])) // CLUSTER) for e in data)
    return found + len({at // per_table for e in data for at in (max(base, e["start"]),)})


def test_the_space_of_vm_states_is_told_apart(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 3 * MiB)
    qemu.io(path, "write -P 5 0 1M")
    with machine(path) as vm:
        vm.save("one")
        vm.save("two")
    qemu.io(path, "write -P 6 0 512k")
    with open_image(str(path)) as image:
        snapshots = image.snapshots
        for s, freed in zip(snapshots, exclusive_sizes(image, snapshots), strict=True):
            assert freed is not None
            assert freed.vm_state == clusters_of_vm_state(path, s.name) * CLUSTER > 0
        both = freed_together(image, snapshots, {s.identity for s in snapshots})
        assert both is not None
        assert both.vm_state == sum(clusters_of_vm_state(path, s.name) for s in snapshots) * CLUSTER
        assert both.disk > 512 * KiB
    assert_freed(path)


def test_what_is_not_stored_is_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`list` of 100 GiB in clusters of 512 bytes, nearly all of it empty, took 5 s for that."""
    path = qemu.create(tmp_path / "disk.qcow2", 256 * MiB, cluster_size=512)
    qemu.io(path, "write 0 64k", "write 200M 64k")
    qemu.take(path, "one")
    looked_into = []

    def watched(space: _Space, column: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        looked_into.append(column)
        return tables_of(space, column)

    tables_of = _Space._tables_of
    monkeypatch.setattr(_Space, "_tables_of", watched)
    with open_image(str(path)) as image:
        assert exclusive_sizes(image, image.snapshots) != [None]
    assert len(looked_into) == 2 * 64 * KiB // (64 * 512)


def test_a_cluster_past_the_end_of_the_file_frees_nothing(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("one", "two", "three"):
        qemu.io(path, "write -P 1 0 128k")
        qemu.take(path, name)
    before = {}
    with open_image(str(path)) as image:
        before = sizes(image)
    damage.put64(path, damage.l2_entry(path, "two", 64 * KiB), damage.END_OF_FILE)
    with open_image(str(path)) as image:
        assert sizes(image) == {**before, "two": None}
        assert size_together(image, ("one", "two")) is None
