"""qcow2snap map: nbdinfo's extents, and the host offsets that qemu-img map gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import damage, qemu
from support.command import fails, qcow2snap, qcow2snap_json, run
from support.qemu import KiB, MiB, RandomImage
from support.server import serve

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "512": {"options": {"cluster_size": 512}, "size": MiB + 512},
    "extended": {"options": {"extended_l2": "on"}},
}


def merged(path: Path) -> list[tuple[int, int, int, int | None]]:
    """qemu-img map, neighbours of one type that are neighbours in the file put together."""
    found: list[tuple[int, int, int, int | None]] = []
    for e in json.loads(qemu.run("qemu-img", "map", "--output=json", path)):
        kind = qemu.allocation(e)
        host = None if kind or e["depth"] else e["offset"]
        if found:
            start, length, last, before = found[-1]
            if last == kind and host == (None if before is None else before + length):
                found[-1] = (start, length + e["length"], kind, before)
                continue
        found.append((e["start"], e["length"], kind, host))
    return found


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_qemu_maps_it(tmp_path: Path, shape: str, backed: bool) -> None:
    backing = None
    if backed:
        below = RandomImage(tmp_path / "below.raw", 1, fmt="raw")
        below.make([], 20)
        backing = (below.path.name, "raw")
    image = RandomImage(tmp_path / "disk.qcow2", 2, backing=backing, **SHAPES[shape])
    for name in image.make(["one", "two"]):
        found = qcow2snap_json("map", image.path, name)
        ours = [(e["offset"], e["length"], e["type"], e.get("host")) for e in found]
        assert ours == merged(qemu.as_active(image.path, name))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 1 0 192k", "write -c -P 2 256k 64k", "write -c -P 3 320k 64k")
    qemu.take(path, "s")
    return path


def test_without_the_host_offsets_it_is_nbdinfos(disk: Path) -> None:
    with serve(file=disk, snapshot="s") as server:
        text = qemu.run("nbdinfo", "--map", server.uri())
        objects = json.loads(qemu.run("nbdinfo", "--map", "--json", server.uri()))
    *head, last = qcow2snap_json("map", disk, "s")
    assert last == objects[-1]
    assert [list(e) for e in head if e["type"] == 0] == [[*objects[0], "host"]] * 3
    lines = qcow2snap("map", disk, "s").splitlines()
    assert lines[-1] == text.splitlines()[-1]
    assert lines[0].rsplit(maxsplit=1)[0].rstrip() == text.splitlines()[0]


def test_each_compressed_cluster_is_where_its_stream_is(disk: Path) -> None:
    found = [e for e in qcow2snap_json("map", disk, "s") if e["offset"] in (256 * KiB, 320 * KiB)]
    assert [e["length"] for e in found] == [64 * KiB] * 2
    assert [e["host"] for e in found] == [
        damage.stream(disk, "s", at)[0] for at in (256 * KiB, 320 * KiB)
    ]


def test_without_a_snapshot_it_says_which_there_are(disk: Path) -> None:
    done = run("map", disk)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qcow2snap: name a SNAPSHOT, or @active for the active disk: it has 1 's'\n"
    )
    assert "no such file" in fails("map", disk.with_name("none"))


def test_a_damaged_table_is_an_error(disk: Path) -> None:
    damage.put64(disk, damage.l1_entry(disk, "s", 0), damage.END_OF_FILE)
    assert "past the end of the file" in fails("map", disk, "s")
