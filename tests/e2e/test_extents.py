"""base:allocation says what the manual page says, and what qemu-img map says of a copy of
the image whose active disk is the snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbd
import pytest
from support import qemu
from support.qemu import KiB, MiB, RandomImage
from support.server import block_status, serve

K64 = 64 * KiB
ALLOCATED, HOLE_ZERO = 0, 3

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "v2": {"options": {"compat": "0.10"}},
    "512": {"options": {"cluster_size": 512}, "size": MiB + 512},
    "compressed": {"compressed": True},
    "2M": {"options": {"cluster_size": 2 * MiB}, "size": 12 * MiB},
}
LAYERS: dict[str, list[tuple[str, int]]] = {
    "alone": [],
    "on-raw": [("raw", 4 * MiB)],
    "on-shorter-raw": [("raw", 2 * MiB + 512)],
    "on-longer-qcow2": [("qcow2", 6 * MiB)],
    "on-both": [("raw", 5 * MiB), ("qcow2", 3 * MiB)],
}


def as_qemu_maps(path: Path, snapshot: str) -> list[tuple[int, int, int]]:
    copy = qemu.as_active(path, snapshot)
    return qemu.extents(copy)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_in_qemu(tmp_path: Path, shape: str, layers: str) -> None:
    backing = None
    for number, (fmt, size) in enumerate(LAYERS[layers]):
        below = RandomImage(tmp_path / f"{number}.{fmt}", 5, size, fmt=fmt, backing=backing)
        below.make([], 20)
        backing = (below.path.name, fmt)
    image = RandomImage(tmp_path / "disk.qcow2", 6, backing=backing, **SHAPES[shape])
    names = image.make(["one", "two"])
    with serve(file=image.path) as server:
        for name in names:
            assert server.extents(name) == as_qemu_maps(image.path, name)


# Kind of cluster; how QEMU makes it; its type alone, and over a layer that has data there.
CASES = [
    ("data", ["write -P 1 0 64k"], ALLOCATED, ALLOCATED),
    ("compressed data", ["write -c -P 1 0 64k"], ALLOCATED, ALLOCATED),
    ("data that is zeros", ["write -P 0 0 64k"], ALLOCATED, ALLOCATED),
    ("nothing", [], HOLE_ZERO, ALLOCATED),
    ("a zero cluster", ["write -z -u 0 64k"], HOLE_ZERO, HOLE_ZERO),
    ("a zero cluster with an allocation", ["write -P 1 0 64k", "write -z 0 64k"], 3, 3),
    ("what was discarded", ["write -P 1 0 64k", "discard 0 64k"], HOLE_ZERO, HOLE_ZERO),
]


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize(("name", "commands", "alone", "over"), CASES, ids=[c[0] for c in CASES])
def test_each_kind_of_cluster(
    tmp_path: Path, name: str, commands: list[str], alone: int, over: int, backed: bool
) -> None:
    base = qemu.create(tmp_path / "base.qcow2", K64)
    qemu.io(base, "write -P 9 0 64k")
    backing = (base.name, "qcow2") if backed else None
    path = qemu.create(tmp_path / "disk.qcow2", K64, backing=backing)
    if commands:
        qemu.io(path, *commands)
    qemu.take(path, "s")
    with serve(file=path) as server:
        assert server.extents("s") == [(0, K64, over if backed else alone)]


def test_holes_of_a_raw_backing_file_are_holes(tmp_path: Path) -> None:
    raw = tmp_path / "base.raw"
    with open(raw, "wb") as f:
        f.truncate(4 * MiB)
        f.seek(MiB)
        f.write(b"x" * K64)
    path = qemu.create(tmp_path / "disk.qcow2", 6 * MiB, backing=(raw.name, "raw"))
    qemu.take(path, "s")
    with serve(file=path) as server:
        assert server.extents("s") == [
            (0, MiB, HOLE_ZERO),
            (MiB, K64, ALLOCATED),
            (MiB + K64, 5 * MiB - K64, HOLE_ZERO),
        ]


def replies(client: nbd.NBD, offset: int, length: int, flags: int = 0) -> list[list[int]]:
    """The (length, type) pairs of one reply, as they were on the wire."""
    found: list[list[int]] = []

    def collect(context: str, start: int, entries: list[int], error: object) -> None:
        found.extend(map(list, zip(entries[::2], entries[1::2], strict=True)))

    client.block_status(length, offset, collect, flags)
    return found


@pytest.fixture
def striped(tmp_path: Path) -> Path:
    """Clusters of three kinds of data in a row, then three kinds of zeros, and data again."""
    path = qemu.create(tmp_path / "disk.qcow2", 10 * K64)
    qemu.io(
        path,
        f"write -P 2 {2 * K64} {K64}",  # not in the order of the guest: not contiguous in the file
        f"write -P 1 0 {K64}",
        f"write -c -P 3 {K64} {K64}",
        f"write -z -u {4 * K64} {K64}",
        f"write -P 5 {5 * K64} {K64}",
        f"write -z {5 * K64} {K64}",
        f"write -P 6 {6 * K64} {2 * K64}",
    )
    qemu.take(path, "s")
    return path


def test_neighbours_of_one_type_are_one_extent(striped: Path) -> None:
    with serve(file=striped) as server, server.connect("s", extents=True) as client:
        assert replies(client, 0, 10 * K64) == [
            [3 * K64, ALLOCATED],
            [3 * K64, HOLE_ZERO],
            [2 * K64, ALLOCATED],
            [2 * K64, HOLE_ZERO],
        ]


def test_a_request_may_start_and_end_anywhere(striped: Path) -> None:
    with serve(file=striped) as server, server.connect("s", extents=True) as client:
        assert block_status(client, 3 * K64 - 700, 1500) == [
            (3 * K64 - 700, 700, ALLOCATED),
            (3 * K64, 800, HOLE_ZERO),
        ]


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 10 * K64, [3 * K64, ALLOCATED]),
        (K64 + 1, 10 * K64 - K64 - 1, [2 * K64 - 1, ALLOCATED]),
        (4 * K64, 5 * K64, [2 * K64, HOLE_ZERO]),
        (0, K64, [K64, ALLOCATED]),
    ],
)
def test_a_client_that_asks_for_one_extent_gets_one(
    striped: Path, offset: int, length: int, expected: list[int]
) -> None:
    with serve(file=striped) as server, server.connect("s", extents=True) as client:
        assert replies(client, offset, length, nbd.CMD_FLAG_REQ_ONE) == [expected]


def test_nbdinfo_map_agrees_with_the_table(striped: Path) -> None:
    with serve(file=striped, snapshot="s") as server:
        said = qemu.run("nbdinfo", "--map", server.uri())
    rows = [line.split()[:3] for line in said.splitlines()]
    assert [[int(x) for x in row] for row in rows] == [
        [0, 3 * K64, 0],
        [3 * K64, 3 * K64, 3],
        [6 * K64, 2 * K64, 0],
        [8 * K64, 2 * K64, 3],
    ]


def test_a_huge_hole_is_told_in_few_requests(tmp_path: Path) -> None:
    size = 16 << 40
    path = qemu.create(tmp_path / "disk.qcow2", size, cluster_size=2 * MiB)
    qemu.take(path, "s")
    with serve(file=path) as server, server.connect("s", extents=True) as client:
        (length, kind), *_ = replies(client, 0, 0xFFFFFFFF)
        # All that was asked for; since 1.44 nbdkit rounds it down to 64 KiB.
        assert kind == HOLE_ZERO
        assert 0xFFFF0000 <= length <= 0xFFFFFFFF
