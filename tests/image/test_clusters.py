"""A cluster's bytes: what may lie past the end of the file, and what is decoded only once."""

from __future__ import annotations

import random
import threading
import zlib

import pytest
from support import damage
from support.devices import opened
from support.qemu import KiB, MiB, content, create, io, patch, peek, run, take
from support.refcounts import set_refcount

from qcow2snap_core.decode.codecs import Zlib, Zstd
from qcow2snap_core.errors import ImageError
from qcow2snap_core.image.clusters import Clusters, fill_zeros
from qcow2snap_core.image.opener import open_image
from qcow2snap_core.tables.check import check
from qcow2snap_core.tables.findings import BAD_ENTRY
from qcow2snap_core.util.cache import BoundedCache

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
def test_up_to_the_end_of_the_file_and_no_further(file, length, host, n):
    with opened(file(NOISE, length)) as storage:
        buffer = bytearray(b"x" * n)
        if host + n <= length:
            clusters(storage).read(buffer, host, guest=0)
            assert buffer == NOISE[host : host + n]
            assert clusters(storage).locate(False, host, n) == host
            return
        message = (
            rf"data cluster at host offset 0x20000 is cut off at the end .* \({length} bytes\)"
        )
        with pytest.raises(ImageError, match=message):
            clusters(storage).read(buffer, host, guest=0)
        with pytest.raises(ImageError, match=message):
            clusters(storage).locate(False, host, n)


@pytest.mark.parametrize("length", [2 * SIZE, SIZE + 1, 2 * SIZE - 1])
@pytest.mark.parametrize(
    ("host", "n"),
    [
        *[(2 * SIZE, SIZE), (2 * SIZE, 1), (2 * SIZE - 1, 2), (1 << 55, SIZE), (0, 4 * SIZE)],
        *[(2 * SIZE + 512, 512), (3 * SIZE - 1, 1), ((1 << 55) + 9, 9)],
    ],
)
def test_past_the_end_is_an_error(file, length, host, n):
    with opened(file(NOISE, length)) as storage:
        message = (
            r"data cluster at host offset 0x\w+ (lies past|is cut off at) "
            rf"the end of the file \({length} by"
        )
        with pytest.raises(ImageError, match=message):
            clusters(storage).read(bytearray(n), host, guest=0)
        with pytest.raises(ImageError, match=message):
            clusters(storage).locate(False, host, n)


@pytest.mark.parametrize("kept", [0, 1, 5000, SIZE - 1, SIZE])
def test_what_is_cut_off_is_lost_though_qemu_reads_zeros(tmp_path, kept):
    """The last cluster is moved to the end of the image, as a copy that broke off leaves it."""
    path = create(tmp_path / "disk.qcow2", MiB)
    io(path, "write -P 9 0 64k")
    take(path, "s")
    end = to_the_end(path, kept)
    data = b"\x09" * kept
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert content(path, "s") == data.ljust(MiB, b"\0")
        assert disk.pread(kept, 0) == data
        assert list(disk.extents(0, kept)) == ([(0, kept, 0)] if kept else [])
        assert disk.pread(MiB - SIZE, SIZE) == bytes(MiB - SIZE)
        if kept == SIZE:
            assert not any(f.is_damage for f in check(image))
            return
        how = "is cut off at" if kept else "lies past"
        said = f"guest offset 0x0: .* host offset {end:#x} {how} the end of the file"
        for ask in (disk.pread, lambda n, at: list(disk.extents(at, n))):
            with pytest.raises(ImageError, match=said):
                ask(kept + 1, 0)
            with pytest.raises(ImageError, match="the end of the file"):
                ask(1, kept)
        if kept:
            found = [f for f in check(image) if f.problem == BAD_ENTRY]
            assert [f.snapshots for f in found] == [("1", "@active")]
            assert "is cut off at the end of the file" in found[0].message


def to_the_end(path, kept):
    """Move the data of the first guest cluster behind all else, so many bytes of it; where to."""
    with open_image(str(path)) as image:
        host = next(image.snapshot("s").ranges(0, 512)).host
    whole = path.read_bytes()
    end = -(-len(whole) // SIZE) * SIZE
    l2_entry = (1 << 63 | host).to_bytes(8, "big"), end.to_bytes(8, "big")
    moved = whole.replace(*l2_entry).replace(l2_entry[0][1:], l2_entry[1][1:])
    path.write_bytes(moved.ljust(end, b"\0") + whole[host : host + kept])
    set_refcount(path, end // SIZE, 2)
    return end


@pytest.mark.parametrize("unaligned", [512, SIZE - 512])
@pytest.mark.parametrize(
    "options",
    [
        *[{"preallocation": "metadata"}, {"preallocation": "falloc"}, {"compat": "0.10"}],
        *[{"extended_l2": "on"}, {"preallocation": "metadata", "extended_l2": "on"}, {}],
    ],
    ids=str,
)
def test_qemu_writes_the_whole_of_its_last_cluster(tmp_path, options, unaligned):
    """Of a disk that ends inside it, and that then grows: docs/validation.md has more."""
    path = create(tmp_path / "disk.qcow2", MiB + unaligned, **options)
    io(path, f"write -P 9 {MiB} {unaligned}")
    run("qemu-img", "resize", "-q", path, 2 * MiB)
    io(path, "discard 0 1M")  # so that the snapshot's tables have room before that cluster
    take(path, "s")
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert disk.pread(2 * MiB, 0) == content(path, "s")
        assert not any(f.is_damage for f in check(image))


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


PADDED = -(-len(STREAM) // 512) * 512  # what the descriptor says of a stream at a sector's start


@pytest.mark.parametrize("kept", [len(STREAM), len(STREAM) + 1])
@pytest.mark.parametrize("more", [1, 2, 60])
def test_a_whole_stream_may_be_said_to_have_more_sectors_than_the_file(file, kept, more):
    """As QEMU, which decodes what there is."""
    with opened(file((bytes(SIZE) + STREAM).ljust(SIZE + kept, b"\xff"))) as storage:
        c, entry = clusters(storage), descriptor(SIZE, PADDED + more * 512)
        assert c.load(entry, 0, 0) == HALF
        view = memoryview(bytearray(SIZE))
        c.read_compressed(view, entry, 1, 0, 0)
        assert view == HALF
        assert c.locate(True, entry, SIZE) == SIZE


@pytest.mark.parametrize("missing", [1, 9, 513, 1000, len(STREAM) - 1])
def test_a_stream_that_is_cut_short_is_an_error(file, missing):
    """Not of extents: only who decodes it can tell."""
    end = SIZE + len(STREAM) - missing
    with opened(file(bytes(SIZE) + STREAM, end)) as storage:
        c, entry = clusters(storage), descriptor(SIZE, len(STREAM))
        with pytest.raises(ImageError) as failed:
            c.load(entry, 0, 0)
        assert str(failed.value).startswith("the compressed cluster at host offset 0x10000: its ")
        cut = f"(cut off at the end of the file, {end} bytes)"
        assert (cut in str(failed.value)) == (PADDED - len(STREAM) + missing >= 512)
        assert c.locate(True, entry, SIZE) == SIZE


@pytest.mark.parametrize("end", [SIZE, SIZE - 1, 512])
def test_a_stream_that_begins_past_the_end_is_an_error(file, end):
    with opened(file(bytes(SIZE) + STREAM, end)) as storage:
        c, entry = clusters(storage), descriptor(SIZE, len(STREAM))
        message = rf"compressed cluster at host offset 0x10000 lies past the end .*\({end} bytes\)"
        with pytest.raises(ImageError, match=message):
            c.load(entry, 0, 0)
        with pytest.raises(ImageError, match=message):
            c.locate(True, entry, SIZE)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_the_end_of_the_last_stream(tmp_path, compression):
    """QEMU as the judge, however much of the file is left: what it reads is what we read, but for
    a deflate stream without its last bits, and where QEMU takes what is missing for zeros."""
    noise = tmp_path / "noise"
    noise.write_bytes(NOISE[:SIZE].hex().encode())
    path = create(tmp_path / "disk.qcow2", MiB, compression_type=compression)
    io(path, f"write -c -s {noise} 64k 64k", "write -P 1 0 64k", f"write -c -s {noise} 128k 64k")
    take(path, "s")
    expected = content(path, "s")
    offset, end = stream_to_the_end(path, 128 * KiB)
    whole = path.read_bytes()
    served = set()
    for size in (end, end + 1, end - 1, end - 2, end - 3, end - 4, offset + 1, offset):
        path.write_bytes(whole[:size].ljust(size, b"\0"))
        with open_image(str(path)) as image:
            disk = image.snapshot("s")
            assert disk.pread(128 * KiB, 0) == expected[: 128 * KiB]
            if size > offset:
                assert list(disk.extents(64 * KiB, 128 * KiB)) == [(64 * KiB, 128 * KiB, 0)]
            else:
                with pytest.raises(ImageError, match="past the end"):
                    list(disk.extents(64 * KiB, 128 * KiB))
            try:
                found = disk.pread(64 * KiB, 128 * KiB)
            except ImageError:
                continue
        served.add(size)
        assert found == expected[128 * KiB : 192 * KiB]
        assert content(path, "s") == expected
    assert served == {end, end + 1}
    path.write_bytes(whole)
    with open_image(str(path)) as image:
        found = [f for f in check(image) if f.problem == BAD_ENTRY]
        assert [(f.snapshots, "cut off" in f.message) for f in found] == [(("1", "@active"), True)]


def stream_to_the_end(path, guest):
    """Move a stream behind all else, in front of sectors that are not there; (offset, end)."""
    at = damage.l2_entry(path, "s", guest)
    offset, sectors = damage.stream(path, "s", guest)
    stream = peek(path, offset, (sectors + 1) * 512 - offset % 512)
    codec = Zlib() if peek(path, 104, 1) == b"\0" else Zstd()
    length = min(n for n in range(len(stream) + 1) if decodes(codec, stream[:n]))
    start = -(-path.stat().st_size // SIZE) * SIZE
    patch(path, start, stream[:length])
    damage.put64(path, at, descriptor(start, length + 5 * 512))
    set_refcount(path, start // SIZE, 2)
    return start, start + length


def decodes(codec, stream):
    try:
        codec.decode(stream, SIZE)
    except ImageError:
        return False
    return True


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
    with open_image(str(path)) as image:
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
