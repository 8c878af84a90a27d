"""A cluster's bytes: what may lie past the end of the file, and what is decoded only once."""

from __future__ import annotations

import random
import threading
import zlib

import pytest
from support.devices import opened
from support.qemu import KiB, MiB, content, create, io, run, take

import qcow2snap_core
from qcow2snap_core.cache import BoundedCache
from qcow2snap_core.clusters import Clusters, fill_zeros
from qcow2snap_core.codecs import Zlib
from qcow2snap_core.errors import ImageError

BITS = 16
SIZE = 1 << BITS
NOISE = random.Random(2).randbytes(4 * SIZE)


def clusters(storage, codec=None, cache=1 << 20):
    return Clusters(storage, storage, BITS, codec or Zlib(), BoundedCache(cache))


@pytest.fixture
def file(tmp_path):
    """A function that makes a file of this content and length."""

    def make(data, length=None):
        path = tmp_path / "disk"
        path.write_bytes(data[:length])
        return path

    return make


# --- Standard clusters ---


@pytest.mark.parametrize("length", [3 * SIZE, 2 * SIZE + 1, 2 * SIZE + 512, 3 * SIZE - 1])
@pytest.mark.parametrize(
    ("host", "n"),
    [(2 * SIZE, SIZE), (2 * SIZE + 5, 600), (SIZE, 2 * SIZE), (3 * SIZE - 9, 9), (0, 9)],
)
def test_the_rest_of_the_files_own_last_cluster_is_zeros(file, length, host, n):
    with opened(file(NOISE, length)) as storage:
        buffer = bytearray(b"x" * n)
        clusters(storage).read(buffer, host, guest=0)
        assert buffer == NOISE[host : min(host + n, length)].ljust(n, b"\0")
        assert clusters(storage).locate(False, host, n) == host


@pytest.mark.parametrize("length", [2 * SIZE, SIZE + 1, 2 * SIZE - 1])
@pytest.mark.parametrize(
    ("host", "n"),
    [
        *[(2 * SIZE, SIZE), (2 * SIZE, 1), (2 * SIZE - 1, 2), (1 << 55, SIZE), (0, 4 * SIZE)],
        *[(2 * SIZE + 512, 512), (3 * SIZE - 1, 1), ((1 << 55) + 9, 9)],
    ],
)
def test_a_cluster_wholly_past_the_end_is_an_error(file, length, host, n):
    with opened(file(NOISE, length)) as storage:
        message = rf"data cluster at host offset 0x\w+ lies past the end of the file \({length} by"
        with pytest.raises(ImageError, match=message):
            clusters(storage).read(bytearray(n), host, guest=0)
        with pytest.raises(ImageError, match=message):
            clusters(storage).locate(False, host, n)


@pytest.mark.parametrize("kept", [0, 1, 5000])
def test_qemu_too_reads_zeros_where_its_last_cluster_was_not_written_out(tmp_path, kept):
    """A raw file's bytes are moved to the end of the image, as a backup tool might leave it."""
    path = create(tmp_path / "disk.qcow2", MiB)
    io(path, "write -P 9 0 64k")
    take(path, "s")
    with qcow2snap_core.open(str(path)) as image:
        host = next(image.snapshot("s").pieces(0, 512)).host
    data, whole = b"\x09" * kept, path.read_bytes()
    end = -(-len(whole) // SIZE) * SIZE
    l2_entry = (1 << 63 | host).to_bytes(8, "big"), end.to_bytes(8, "big")
    moved = whole.replace(*l2_entry).replace(l2_entry[0][1:], l2_entry[1][1:])
    path.write_bytes(moved.ljust(end, b"\0") + data)
    with qcow2snap_core.open(str(path)) as image:
        disk = image.snapshot("s")
        if kept:
            assert disk.pread(MiB, 0) == content(path, "s") == data.ljust(MiB, b"\0")
        else:
            with pytest.raises(ImageError, match="past the end"):
                disk.pread(512, 512)


# --- Compressed clusters ---


def deflate(data):
    coder = zlib.compressobj(wbits=-12)
    return coder.compress(data) + coder.flush()


def descriptor(offset, length):
    """The L2 entry of a stream: bit 62, the sectors after its first, its offset."""
    sectors = (offset + length - 1) // 512 - offset // 512
    return 1 << 62 | sectors << 62 - (BITS - 8) | offset


HALF = NOISE[: SIZE // 2] + bytes(SIZE // 2)  # compresses to half a cluster
STREAM = deflate(HALF)


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, SIZE + 511, 3 * SIZE - 700])
@pytest.mark.parametrize("tail", [0, 1, 511, SIZE])
def test_a_stream_may_begin_anywhere_and_end_inside_the_last_sector(file, offset, tail):
    with opened(file(bytes(offset) + STREAM + b"\xff" * tail)) as storage:
        c, entry = clusters(storage), descriptor(offset, len(STREAM))
        assert c.load(entry, 0, 0) == HALF
        assert c.locate(True, entry, SIZE) == offset


@pytest.mark.parametrize("missing", [513, 1000, len(STREAM), len(STREAM) + 1000])
def test_a_stream_that_goes_on_past_the_files_last_sector_is_an_error(file, missing):
    end = SIZE + len(STREAM) - missing
    with opened(file(bytes(SIZE) + STREAM, end)) as storage:
        c, entry = clusters(storage), descriptor(SIZE, len(STREAM))
        message = rf"compressed cluster at host offset 0x10000 lies past the end .*\({end} bytes\)"
        with pytest.raises(ImageError, match=message):
            c.load(entry, 0, 0)
        with pytest.raises(ImageError, match=message):
            c.locate(True, entry, SIZE)


def test_a_stream_cut_short_inside_its_last_sector_is_an_error_all_the_same(file):
    path = file(bytes(SIZE) + STREAM, SIZE + len(STREAM) - 9)
    message = "cluster at host offset 0x10000: its compressed stream ends after"
    with opened(path) as storage, pytest.raises(ImageError, match=message):
        clusters(storage).load(descriptor(SIZE, len(STREAM)), 0, 0)


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_streams_are_where_qemu_put_them(tmp_path, bits):
    """The descriptor's layout depends on the cluster size."""
    size = 1 << bits
    raw = tmp_path / "disk.raw"
    text = b"".join(b"%d " % n for n in range(size))
    raw.write_bytes(b"".join((text[n:] * 2)[:size] for n in range(5)))
    path = tmp_path / "disk.qcow2"
    form = ["-c", "-O", "qcow2", "-o", f"cluster_size={size}"]
    run("qemu-img", "convert", "-f", "raw", *form, raw, path)
    take(path, "s")
    with qcow2snap_core.open(str(path)) as image:
        disk = image.snapshot("s")
        assert disk.pread(5 * size, 0) == raw.read_bytes()
        assert disk.pread(300, size - 150) == raw.read_bytes()[size - 150 : size + 150]


FIRST = bytes(SIZE)  # the header's cluster, where no data can be


def test_any_part_of_a_compressed_cluster(file):
    with opened(file(FIRST + STREAM)) as storage:
        c, entry = clusters(storage), descriptor(SIZE, len(STREAM))
        for within, n in [(0, SIZE), (1, 1), (SIZE // 2 - 7, 14), (SIZE - 1, 1)]:
            view = memoryview(bytearray(n))
            c.read_compressed(view, entry, 0, 0, within)
            assert view == HALF[within : within + n]


# --- How often they are decoded ---


class Counting(Zlib):
    """The real decoder, counting, and waiting until the test lets it go."""

    def __init__(self):
        self.calls = 0
        self.go = threading.Event()
        self.go.set()

    def decode_into(self, stream, target):
        self.calls += 1
        assert self.go.wait(60)
        super().decode_into(stream, target)


def test_many_threads_decode_a_cluster_once(file):
    with opened(file(FIRST + STREAM)) as storage:
        codec = Counting()
        c, entry = clusters(storage, codec), descriptor(SIZE, len(STREAM))
        codec.go.clear()
        views = [memoryview(bytearray(64)) for _ in range(16)]
        threads = [
            threading.Thread(target=c.read_compressed, args=(view, entry, 0, 0, 64 * n))
            for n, view in enumerate(views)
        ]
        for thread in threads:
            thread.start()
        codec.go.set()
        for thread in threads:
            thread.join()
        assert b"".join(views) == HALF[: 16 * 64]
        assert codec.calls == 1


@pytest.mark.parametrize(("cache", "decoded"), [(SIZE, 1), (0, 2), (SIZE - 1, 2)])
def test_a_decoded_cluster_is_kept_as_far_as_the_cache_goes(file, cache, decoded):
    with opened(file(FIRST + STREAM)) as storage:
        codec = Counting()
        c, entry = clusters(storage, codec, cache), descriptor(SIZE, len(STREAM))
        assert c.load(entry, 0, 0) == c.load(entry, 0, 0) == HALF
        assert codec.calls == decoded


def test_clusters_of_different_mappings_and_places_are_not_mixed_up(file):
    other = deflate(bytes(SIZE))
    with opened(file(FIRST + STREAM.ljust(SIZE, b"\0") + other)) as storage:
        c = clusters(storage)
        assert c.load(descriptor(SIZE, len(STREAM)), 1, 0) == HALF
        assert c.load(descriptor(2 * SIZE, len(other)), 2, 0) == bytes(SIZE)
        assert c.load(descriptor(2 * SIZE, len(other)), 1, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("length", [0, 1, MiB - 1, MiB, MiB + 1, 3 * MiB + 64 * KiB])
def test_zeros_fill_a_buffer_of_any_length(length):
    buffer = bytearray(b"x" * (length + 2))
    fill_zeros(memoryview(buffer)[1:-1])
    assert buffer == b"x" + bytes(length) + b"x"
