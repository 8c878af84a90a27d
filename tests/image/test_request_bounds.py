"""What one request may cost in look-ups, decoding and memory: counted, not timed.

Each image makes one thing dear that the number of its pieces does not show.
"""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import damage, qemu
from support.devices import opened
from support.memory import bounded
from support.qemu import KiB, MiB
from support.streams import slow
from support.tables import Entry, write_table
from support.turns import Crowd, Watched

from qcow2snap_core._native import loaded
from qcow2snap_core.decode.codecs import Codec, Libdeflate, Zlib
from qcow2snap_core.decode.encryption import Encryption
from qcow2snap_core.errors import Error, ImageError
from qcow2snap_core.format import ondisk as q
from qcow2snap_core.image import clusters as module
from qcow2snap_core.image.clusters import Clusters, EncryptedClusters
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.extents import Extent
from qcow2snap_core.image.opener import open_image
from qcow2snap_core.tables.diff import changes
from qcow2snap_core.util.cache import OVERHEAD, BoundedCache

TOO_MUCH = "look-ups: ask for less at a time"


def count_extents(disk: Disk) -> int:
    """How far one answer goes."""
    return sum(extent.length for extent in disk.extents(0, disk.size))


# --- Look-ups ---


def alternating(directory: Path, layers: int, clusters: int) -> Path:
    """Overlays in which every other cluster is unallocated: as many runs as there can be."""
    path = None
    for n in range(layers):
        backing = None if path is None else (path.name, "qcow2")
        path = directory / f"{n}.qcow2"
        qemu.create(path, clusters * 512, cluster_size=512, backing=backing)
    assert path is not None
    qemu.io(path, *(f"write -P {n % 255 + 1} {n * 512} 512" for n in range(0, clusters, 2)))
    qemu.take(path, "s")
    return path


def test_a_read_of_too_many_pieces_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = alternating(tmp_path, layers=5, clusters=200)
    monkeypatch.setattr(q, "MAX_LOOKUPS", 500)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        with pytest.raises(ImageError, match="takes more than 500 look-ups: ask for less"):
            disk.pread(disk.size, 0)
        half = disk.pread(disk.size // 4, 0) + disk.pread(disk.size // 4, disk.size // 4)
    assert half == qemu.content(path, "s")[: len(half)]


def test_extents_of_too_many_pieces_are_told_in_part(tmp_path: Path, monkeypatch) -> None:
    path = alternating(tmp_path, layers=5, clusters=200)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        whole = list(disk.extents(0, disk.size))
        monkeypatch.setattr(q, "MAX_EXTENT_LOOKUPS", 100)
        part, at = [], 0
        while at < disk.size:
            some = list(disk.extents(at, disk.size - at))
            assert len(some) < 50
            part += some
            at = part[-1].offset + part[-1].length
    assert part == whole


def test_the_first_extent_does_not_wait_for_the_others(tmp_path: Path) -> None:
    path = alternating(tmp_path, layers=1, clusters=2000)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        whole = list(disk.extents(0, disk.size))
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert next(disk.extents(0, disk.size)) == whole[0]
        assert image._chain.tables.used < 3 * (512 + OVERHEAD), "more than one L2 table was read"


def test_alternating_zero_clusters_are_bounded_too(tmp_path: Path, monkeypatch) -> None:
    """They merge into one extent, so that counting extents would not see them."""
    path = qemu.create(tmp_path / "z.qcow2", 200 * 512, cluster_size=512)
    qemu.io(path, *(f"write -P 1 {n * 512} 512" for n in range(0, 200, 2)))
    qemu.io(path, f"write -z 0 {200 * 512}")
    qemu.take(path, "s")
    monkeypatch.setattr(q, "MAX_EXTENT_LOOKUPS", 50)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        (extent,) = disk.extents(0, disk.size)
        assert extent.length < disk.size


def test_an_empty_disk_of_exabytes_is_walked_at_once(tmp_path: Path) -> None:
    """Of a snapshot that goes by the active disk's size: past its L1 table there is nothing."""
    path = qemu.create(tmp_path / "huge.qcow2", 1 << 46, cluster_size=64 * 1024)
    qemu.take(path, "s")
    s = qemu.snapshots(path)["s"]
    write_table(path, [Entry(b"1", b"s", s.l1_table_offset, s.l1_size)])
    qemu.patch(path, 24, struct.pack(">Q", 2**63 - 512))
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert disk.size == 2**63 - 512
        assert len(list(disk.ranges(0, disk.size))) == 1
        assert list(disk.extents(disk.size - 512, 512)) == [(disk.size - 512, 512, 3)]
        assert list(changes(disk, disk)) == []


def test_a_size_of_exabytes_that_no_table_covers_is_an_error_at_once(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "huge.qcow2", 1 << 46, cluster_size=64 * 1024)
    qemu.take(path, "s")
    entry = qemu.snapshots(path)["s"].entry_offset
    qemu.patch(path, entry + 48, struct.pack(">Q", 2**63 - 512))
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert list(disk.extents(0, 1 << 46)) == [(0, 1 << 46, 3)]
        for find in (disk.extents(0, disk.size), disk.own(), changes(disk, disk)):
            with pytest.raises(ImageError, match="guest offset 0x400000000000: its L1 table of "):
                list(find)


# --- Streams that are slow to decode ---


@pytest.mark.parametrize("decoder", [Zlib, Libdeflate])
def test_the_slow_stream_is_a_good_one(decoder: type[Codec]) -> None:
    content = bytes(range(256)) * 16
    assert decoder().decode(slow(content, 8000), len(content)) == content


def packed(directory: Path, clusters: int, stream: bytes) -> Path:
    """Clusters of 4 KiB that are all the same compressed one."""
    path = qemu.create(directory / "packed.qcow2", clusters * 4 * KiB, cluster_size=4 * KiB)
    qemu.io(path, f"write 0 {clusters * 4}k")
    qemu.take(path, "s")
    at = -(-path.stat().st_size // 512) * 512
    qemu.patch(path, at, stream.ljust(16 * 512, b"\0"))
    entry = 1 << 62 | 15 << 58 | at
    table = damage.l2_table(path, "s", 0)
    qemu.patch(path, table, struct.pack(">Q", entry) * clusters)
    return path


@pytest.mark.parametrize("is_slow", [False, True])
def test_slow_streams_end_a_read(tmp_path: Path, monkeypatch, is_slow: bool) -> None:
    monkeypatch.setattr(q, "MAX_LOOKUPS", 4000)
    monkeypatch.setattr(loaded, "ENGINE", None)  # which has a bound of its own, and it is larger
    content = bytes(4 * KiB)
    path = packed(tmp_path, 100, slow(content, 8000 if is_slow else 30))
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert disk.pread(4 * KiB, 0) == content
        if is_slow:
            with pytest.raises(ImageError, match=TOO_MUCH):
                disk.pread(disk.size, 0)
        else:
            assert disk.pread(disk.size, 0) == bytes(disk.size)


class Counting(Zlib):
    """Counts what it decodes."""

    decoded = 0

    def decode_into(self, stream: bytes, target: memoryview) -> None:
        self.decoded += 1
        super().decode_into(stream, target)


def test_slow_streams_end_a_prefetch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("qcow2snap_core.image.disk._MOST_PREFETCHED_LOOKUPS", 1000)
    codec = Counting()
    monkeypatch.setattr("qcow2snap_core.image.opener.deflate", lambda: codec)
    path = packed(tmp_path, 100, slow(bytes(4 * KiB), 8000))
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        disk.prefetch(0, disk.size)
    assert 0 < codec.decoded < 90


# --- Tables ---


def test_fetching_tables_counts_for_more_than_looking_into_them(
    tmp_path: Path, monkeypatch
) -> None:
    """Tables of zero clusters are one extent and one piece, and each has to be read."""
    path = qemu.create(tmp_path / "z.qcow2", 256 * 32 * KiB, cluster_size=512)
    qemu.io(path, f"write -z 0 {256 * 32}k")
    qemu.take(path, "s")
    monkeypatch.setattr(q, "MAX_EXTENT_LOOKUPS", 256)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        first = count_extents(disk)
        assert first <= 256 // 5 * 32 * KiB
        assert first < count_extents(disk)  # what was fetched need not be fetched again


def deep_chain(directory: Path, layers: int, writes: int) -> Path:
    """Empty overlays on a layer in which every other cluster is allocated."""
    base = qemu.create(directory / "0.qcow2", 256 * 512, cluster_size=512)
    qemu.io(base, *(f"write -P 1 {n * 1024} 512" for n in range(writes)))
    for n in range(1, layers):
        backing = (f"{n - 1}.qcow2", "qcow2")
        qemu.create(directory / f"{n}.qcow2", 256 * 512, cluster_size=512, backing=backing)
    path = directory / f"{layers - 1}.qcow2"
    qemu.take(path, "s")
    return path


def test_a_piece_from_far_below_counts_in_every_layer(tmp_path: Path, monkeypatch) -> None:
    path = deep_chain(tmp_path, 20, 128)
    monkeypatch.setattr(q, "MAX_EXTENT_LOOKUPS", 1000)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        found: list[Extent] = []
        at = 0
        while at < disk.size:
            some = list(disk.extents(at, disk.size - at))
            assert len(some) <= 1000 // 20
            found += some
            at = some[-1].offset + some[-1].length
    # Neighbours that two answers share are one extent.
    assert [e.type for e in found if e.length == 512 and e.type == 0] == [0] * 128
    assert sum(e.length for e in found) == disk.size


# --- What an error costs ---


def test_an_error_from_far_below_names_two_layers(tmp_path: Path) -> None:
    path = deep_chain(tmp_path, 20, 1)
    base = tmp_path / "0.qcow2"
    l1 = qemu.field64(base, 40)
    table = qemu.field64(base, l1) & damage.OFFSET
    damage.put64(base, table, damage.END_OF_FILE)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        with pytest.raises(Error, match="lies past the end") as caught:
            disk.pread(512, 0)
        said = str(caught.value)
        assert said.count("guest offset 0x0: ") == 2
        assert "19.qcow2" in said
        assert "/0.qcow2" in said
        with pytest.raises(Error, match="/0.qcow2.*lies past the end"):
            list(disk.extents(0, 512))


# --- Memory ---


class Crowded(Zlib):
    """Decodes when everybody has come or waits."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd

    def decode_into(self, stream: bytes, target: memoryview) -> None:
        self._crowd.go_in()
        super().decode_into(stream, target)


@pytest.mark.parametrize(("size", "at_once"), [(2 * MiB, 3), (64 * KiB, 6)])
@pytest.mark.parametrize("length", [1, None])
def test_few_large_clusters_are_decoded_at_once(
    tmp_path: Path, monkeypatch, size: int, at_once: int, length: int | None
) -> None:
    crowd = Crowd(6)
    monkeypatch.setattr(module, "_LARGE_TURNS", Watched(module._LARGE_TURNS, crowd.wait))
    path = tmp_path / "file"
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    path.write_bytes(bytes(size) + packer.compress(b"x" * size) + packer.flush() + bytes(4 * KiB))
    sectors = (path.stat().st_size - size) // 512 - 1
    bits = size.bit_length() - 1
    entry = 1 << 62 | sectors << 62 - (bits - 8) | size
    with opened(path) as storage:
        clusters = Clusters(storage, storage, bits, Crowded(crowd), BoundedCache(0))

        def read(number: int) -> None:
            buffer = memoryview(bytearray(length or size))
            clusters.read_compressed(buffer, entry, number, 0, 0)
            assert bytes(buffer) == b"x" * len(buffer)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(read, range(6)))
    assert crowd.most == at_once


@pytest.mark.parametrize("offset", [0, 1, 511])
def test_an_odd_read_of_an_encrypted_disk_takes_no_second_buffer(
    tmp_path: Path, offset: int
) -> None:
    ciphers = pytest.importorskip("qcow2snap_core.decode.ciphers")
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * MiB))
    whole = bytearray(8 * MiB)
    cipher = ciphers.CbcSectors(bytes(32), ciphers.Plain(64))
    for at in range(0, len(whole), MiB):
        cipher.decrypt(memoryview(whole)[at : at + MiB], at // 512)
    buffer = bytearray(8 * MiB - offset - 3)
    with opened(path) as storage:
        parts = storage, storage, 16, Zlib(), BoundedCache(0)
        clusters = EncryptedClusters(Encryption(cipher, True), *parts)
        with bounded(7 * MiB):
            clusters.read(buffer, offset, offset)
    assert buffer == whole[offset : offset + len(buffer)]


def test_deciphering_a_large_read_takes_small_buffers(tmp_path: Path) -> None:
    ciphers = pytest.importorskip("qcow2snap_core.decode.ciphers")
    path = tmp_path / "data"
    path.write_bytes(bytes(16 * MiB))
    cipher = ciphers.CbcSectors(bytes(32), ciphers.Plain(64))
    buffer = bytearray(16 * MiB)
    with opened(path) as storage:
        parts = storage, storage, 16, Zlib(), BoundedCache(MiB)
        with bounded(12 * MiB):
            EncryptedClusters(Encryption(cipher, True), *parts).read(buffer, 0, 0)
    expected = bytearray(MiB)
    cipher.decrypt(memoryview(expected), 15 * MiB // 512)
    assert buffer[15 * MiB :] == expected
