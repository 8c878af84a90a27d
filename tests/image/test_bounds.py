"""No snapshot table, and nothing that is kept of an image, takes more memory or time than limits
in ondisk.py allow: counted, so that nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.devices import opened
from support.memory import bounded
from support.qemu import MiB
from support.tables import Entry, write_table
from support.turns import Watched

from qcow2snap_core.decode.codecs import Zstd
from qcow2snap_core.format import ondisk as q
from qcow2snap_core.format.snapshot_table import read_table, read_table_once
from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.image.guard import SnapshotGuard
from qcow2snap_core.image.image import Image
from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.serve.exports import exports_of
from qcow2snap_core.tables.check import check
from qcow2snap_core.tables.sharing import picture
from qcow2snap_core.tables.space import exclusive_sizes


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.take(path, "real")
    return path


def fill_table(path: Path, count: int, name: Callable[[int], bytes], extra: bytes = b"") -> None:
    real = next(iter(qemu.snapshots(path).values()))
    place = real.l1_table_offset, real.l1_size
    write_table(path, [Entry(b"%d" % n, name(n), *place, extra=extra) for n in range(count)])


# --- The snapshot table ---

EXTRA = struct.pack(">QQQ", 0, MiB, 2**64 - 1)
TABLES = {
    "most-entries": (65536, lambda n: b"nightly-%d" % n, EXTRA, 65536),
    "largest-extra": (10000, lambda n: b"%d" % n, EXTRA + bytes(1000), 10000),
    # One character of four bytes makes Python keep four bytes for each of the others.
    "longest-names": (1000, lambda n: "😀".encode() + b"x" * 65000 + b"%d" % n, EXTRA, 64),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_large_snapshot_table(disk: Path, kind: str) -> None:
    count, name, extra, kept = TABLES[kind]
    fill_table(disk, count, name, extra)
    with opened(disk) as storage, bounded():
        table = read_table(storage)
        assert len(table.snapshots) == kept
        if kept < count:
            assert table.damage is not None
            assert "too long" in table.damage
        assert exports_of(table.snapshots)


def test_a_guard_of_a_late_entry_keeps_little_of_the_table(disk: Path) -> None:
    fill_table(disk, 20000, lambda n: b"x" * 100 + b"%d" % n, EXTRA)
    with opened(disk) as storage:
        last = read_table(storage).snapshots[-1]
        guard = SnapshotGuard(storage, last)
        with bounded(MiB):
            guard.confirm()
            guard.confirm()
        fingerprint = read_table_once(storage, frozenset({last.identity})).fingerprint
        assert fingerprint is not None
        assert fingerprint.holds(storage)
        qemu.patch(disk, last.entry_offset - 8, b"!")  # of the entry before
        with opened(disk) as other:
            assert read_table(other).snapshots[-1] == last
        assert not fingerprint.holds(storage)


def test_a_damaged_table_is_not_believed_in_for_long(disk: Path) -> None:
    """Each try costs all the entries before the damage, and each client tries."""
    fill_table(disk, 30000, lambda n: b"%d" % n, EXTRA)
    last = last_entry(disk)
    qemu.patch(disk, last.entry_offset + 36, b"\xff" * 4)
    with opened(disk) as storage:
        reads = count_reads(storage)
        table = read_table(storage)
        assert len(table.snapshots) == 29999
        first = len(reads)
        read_table(storage, (table.fields, table.damage))
        assert len(reads) - first <= first // 2
    assert q.MAX_TABLE_SECONDS < 1


def last_entry(path: Path) -> Snapshot:
    with opened(path) as storage:
        return read_table(storage).snapshots[-1]


def count_reads(storage: object) -> list[int]:
    """The offsets of all reads from now on."""
    offsets: list[int] = []
    read = storage.read  # type: ignore[attr-defined]

    def counted(length: int, offset: int) -> bytes:
        offsets.append(offset)
        return read(length, offset)

    storage.read = counted  # type: ignore[attr-defined]
    return offsets


ASKED_OF_ALL: dict[str, Callable[[Image], object]] = {
    "list": lambda image: exclusive_sizes(image, image.snapshots),
    "list --tree": lambda image: picture(image, image.snapshots, 70),
    "check": check,
}


@pytest.mark.parametrize("kind", ASKED_OF_ALL)
def test_the_table_is_not_read_again_for_each_of_its_snapshots(disk: Path, kind: str) -> None:
    looks = []
    for count in (10, 1000):
        fill_table(disk, count, lambda n: b"nightly-%d" % n, EXTRA)
        with open_image(str(disk)) as image:
            offsets = count_reads(image.storage)
            ASKED_OF_ALL[kind](image)
        looks.append(offsets.count(q.SNAPSHOT_FIELDS_OFFSET))
    assert looks[0] == looks[1]


# --- Caches and decoders ---


def test_small_clusters_weigh_what_they_take(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "small.qcow2", 4 * MiB, cluster_size=512)
    qemu.io(path, f"write -P 1 0 {4 * MiB}")
    qemu.take(path, "s")
    options = Options(l2_cache_size=MiB // 4, cluster_cache_size=MiB // 4)
    with open_image(str(path), options) as image:
        disk = image.snapshot("s")
        disk.pread(512, 0)
        with bounded(MiB // 2):
            for at in range(0, disk.size, 32 * 1024):
                disk.pread(512, at)


def test_a_chain_shares_its_decoders(tmp_path: Path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr("qcow2snap_core.image.opener.Zstd", lambda: made.append(Zstd()) or made[-1])
    for n, backing in enumerate([None, ("0", "qcow2"), ("1", "qcow2")]):
        qemu.create(tmp_path / str(n), MiB, backing=backing, compression_type="zstd")
    with open_image(str(tmp_path / "2")):
        assert len(made) == 1


def test_wide_zstd_windows_are_for_one_at_a_time() -> None:
    zstandard = pytest.importorskip("zstandard")
    data = bytes(range(256)) * 256
    parameters = zstandard.ZstdCompressionParameters(window_log=23, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(data) + compressor.flush()
    codec = Zstd()
    it_waits = threading.Event()
    codec._one_large = Watched(codec._one_large, it_waits.set)
    with codec._one_large:
        waiting = threading.Thread(target=codec.decode, args=(frame, len(data)))
        waiting.start()
        assert it_waits.wait(60)
        assert codec.decode(zstandard.ZstdCompressor().compress(data), len(data)) == data
    waiting.join()
    assert codec.decode(frame, len(data)) == data
