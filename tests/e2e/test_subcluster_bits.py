"""Subclusters in every combination of allocation and zero bits, made by qemu-io and, where it
does not make them, patched into the tables; bytes and extents as in QEMU."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.qemu import KiB, MiB
from support.server import serve

OFFSET = 0x00FF_FFFF_FFFF_FE00
BELOW = ("none", "raw", "shorter qcow2", "extended qcow2")


def base(directory: Path, below: str) -> tuple[str, str] | None:
    path = directory / "below"
    if below == "raw":
        path.write_bytes(bytes(range(1, 256)) * 9000)
        return path.name, "raw"
    if below == "none":
        return None
    extended = {"extended_l2": "on"} if below == "extended qcow2" else {}
    qemu.create(path, 700 * KiB if "short" in below else 3 * MiB, cluster_size=32 * KiB, **extended)
    spots = range(0, 660 * KiB, 40 * KiB)
    qemu.io(path, *(f"write -P {1 + at // KiB % 254} {at} 17k" for at in spots))
    qemu.io(path, *(f"write -z {at + 18 * KiB} 3k" for at in spots))
    return path.name, "qcow2"


def check(path: Path) -> None:
    """The snapshot 's' is QEMU's: all bytes, single sectors, all extents."""
    expected = qemu.content(path, "s")
    copy = qemu.as_active(path, "s")
    with serve(file=path) as server:
        assert server.copy("s") == expected
        assert server.extents("s") == qemu.extents(copy)
        rng = random.Random(1)
        with server.connect("s") as client:
            for _ in range(100):
                at = rng.randrange(len(expected))
                n = min(len(expected) - at, rng.choice((1, 512, 2048, 9000)))
                assert client.pread(n, at) == expected[at : at + n]


@pytest.mark.parametrize("cluster", [16 * KiB, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("below", BELOW)
def test_written_by_qemu(tmp_path: Path, below: str, cluster: int) -> None:
    """Each pair of neighbours: untouched, data, zeros with and without their old cluster,
    discarded; in clusters that were whole before and in ones that were not there."""
    path = tmp_path / "disk.qcow2"
    options = {"extended_l2": "on", "cluster_size": cluster}
    qemu.create(path, max(2 * MiB, 3 * cluster), backing=base(tmp_path, below), **options)
    sub = cluster // 32
    kinds = ["", "write -P {n}", "write -z", "write -z -u", "discard"]
    commands = [f"write -P 200 {cluster} {cluster}"]
    for whole in (0, 1):
        pairs = [(a, b) for a in kinds for b in kinds]
        at = whole * cluster
        for n, pair in enumerate(pairs if cluster == 16 * KiB else pairs[:16]):
            for kind in pair:
                if kind and at < (whole + 1) * cluster:
                    commands.append(f"{kind.format(n=n + 1)} {at} {sub}")
                at += sub
    commands.append(f"write -z -u {2 * cluster} {cluster}")
    commands.append(f"write -P 9 {2 * cluster + 5 * sub} {sub}")
    qemu.io(path, *commands)
    qemu.take(path, "s")
    check(path)


def l2_table(path: Path) -> int:
    snapshot = qemu.snapshots(path)["s"]
    return qemu.field64(path, snapshot.l1_table_offset) & OFFSET


def patched(path: Path, bitmaps: list[int], *, free: tuple[int, ...] = ()) -> None:
    """Give the first clusters these bitmaps; those in ``free`` lose their host offset."""
    table = l2_table(path)
    for n, bitmap in enumerate(bitmaps):
        entry = qemu.field64(path, table + 16 * n)
        assert entry, "every cluster was written before"
        entry = 0 if n in free else entry
        qemu.patch(path, table + 16 * n, struct.pack(">QQ", entry, bitmap))


@pytest.mark.parametrize("below", BELOW)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bitmaps_that_qemu_io_does_not_make(tmp_path: Path, below: str, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    options = {"extended_l2": "on", "cluster_size": 32 * KiB}
    qemu.create(path, MiB, backing=base(tmp_path, below), **options)
    qemu.io(path, *(f"write -P {n + 1} {n * 32}k 32k" for n in range(32)))
    qemu.take(path, "s")
    bitmaps = []
    for _ in range(32):
        alloc = rng.choice((0, 2**32 - 1, rng.getrandbits(32), 0x55555555, 1, 1 << 31))
        zero = rng.choice((0, 2**32 - 1, rng.getrandbits(32), 1, 1 << 31)) & ~alloc
        bitmaps.append(zero << 32 | alloc)
    # Without a host offset only zero bits make sense.
    free = tuple(n for n, bitmap in enumerate(bitmaps) if not bitmap & 0xFFFFFFFF)[::2]
    patched(path, bitmaps, free=free)
    check(path)


@pytest.mark.parametrize(
    ("bitmap", "free", "said"),
    [
        (1 << 40 | 1 << 8, (), "both data and zero"),
        (1 << 8, (1,), "without a host offset"),
    ],
)
def test_what_the_spec_forbids_is_an_error(
    tmp_path: Path, bitmap: int, free: tuple[int, ...], said: str
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB, extended_l2="on", cluster_size=32 * KiB)
    qemu.io(path, "write -P 7 0 1M")
    qemu.take(path, "s")
    patched(path, [2**32 - 1, bitmap], free=free)
    with serve(file=path) as server, server.connect("s", extents=True) as client:
        with pytest.raises(nbd.Error):
            client.pread(512, 32 * KiB)
        with pytest.raises(nbd.Error):
            client.block_status(512, 32 * KiB, lambda *found: 0)
        assert said in server.log
        assert client.pread(32 * KiB, 0) == b"\7" * 32 * KiB
        assert client.pread(32 * KiB, 64 * KiB) == b"\7" * 32 * KiB
