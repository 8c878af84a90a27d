"""A disk's range checks, and layers below that are not what they were."""

from __future__ import annotations

import os
import random
from array import array

import pytest
from support.devices import opened
from support.qemu import KiB, MiB, content, create, delete, io, take

from qcow2snap_core import Error, ImageError
from qcow2snap_core.errors import SnapshotGone
from qcow2snap_core.image.layers import RawLayer
from qcow2snap_core.image.opener import open_image


@pytest.fixture
def disk(tmp_path):
    path = create(tmp_path / "disk.qcow2", 128 * KiB)
    io(path, "write -P 7 64k 64k")
    take(path, "s")
    with open_image(str(path)) as image:
        yield image.snapshot("s")


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (128 * KiB, 1), (128 * KiB - 1, 2), (1 << 70, 1), (0, MiB)]
)
def test_a_range_outside_the_disk_is_the_callers_mistake(disk, offset, length):
    with pytest.raises(ValueError, match="outside the disk of 131072"):
        disk.pread(length, offset)
    with pytest.raises(ValueError, match="outside the disk of 131072"):
        list(disk.extents(offset, length))


@pytest.mark.parametrize("offset", [0, 1, 128 * KiB])
def test_nothing_can_be_read_anywhere_up_to_the_end(disk, offset):
    assert disk.pread(0, offset) == b""
    assert list(disk.extents(offset, 0)) == []


def test_nothing_can_be_read_at_the_end_of_an_l1_table(tmp_path):
    path = create(tmp_path / "disk.qcow2", 2 * MiB, cluster_size=4 * KiB)
    take(path, "s")
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert disk.reach == disk.size == 2 * MiB
        for _ in range(2):  # without and with a proof that it is still there
            assert disk.pread(0, 2 * MiB) == b""
            assert disk.pread(0, 5) == b""


@pytest.mark.parametrize("kind", ["B", "b", "H", "Q"])
@pytest.mark.parametrize("way", ["data", "zeros", "compressed", "several"])
def test_a_buffer_of_any_kind_is_filled_with_its_bytes(tmp_path, kind, way):
    """Its length is not that in bytes."""
    noise = random.Random(3).randbytes(32 * KiB).hex().encode()
    (tmp_path / "noise").write_bytes(noise)
    path = create(tmp_path / "disk.qcow2", 192 * KiB)
    write = {"zeros": "write -z 0 64k", "compressed": f"write -c -s {tmp_path}/noise 0 64k"}
    io(path, write.get(way, f"write -s {tmp_path}/noise 0 64k"), "write -P 9 128k 64k")
    take(path, "s")
    expected = content(path, "s")
    at, length = (100, 800) if way != "several" else (64 * KiB - 400, 65 * KiB + 400)
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        for _ in range(2):
            buffer = array(kind, b"x" * length)
            disk.pread_into(buffer, at)
            assert buffer.tobytes() == expected[at : at + length]
            with pytest.raises(ValueError, match="outside the disk"):
                disk.pread_into(buffer, 192 * KiB - length + 1)


def test_a_plan_from_the_tables_is_of_a_snapshot_that_is_there(tmp_path):
    """What deleting it freed may hold anything by now: also zero clusters, which nobody reads."""
    path = create(tmp_path / "disk.qcow2", MiB)
    io(path, "write -P 7 64k 64k")
    take(path, "s")
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        assert list(disk.own()) == [(64 * KiB, 64 * KiB, 0)]
        delete(path, "s")
        with pytest.raises(SnapshotGone):
            list(disk.own())


@pytest.fixture
def over_raw(tmp_path):
    """A snapshot of an empty image over a raw file of 192 KiB, and that file."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 192 * KiB)
    path = create(tmp_path / "disk.qcow2", 256 * KiB, backing=("base.raw", "raw"))
    take(path, "s")
    with open_image(str(path)) as image:
        yield image.snapshot("s"), base


def test_a_shorter_layer_below_ends_in_zeros(over_raw):
    disk, _ = over_raw
    assert disk.pread(256 * KiB, 0) == b"b" * 192 * KiB + bytes(64 * KiB)
    assert list(disk.extents(0, 256 * KiB)) == [(0, 192 * KiB, 0), (192 * KiB, 64 * KiB, 3)]


def test_where_a_raw_layer_was_truncated_there_is_an_error_and_no_hole(over_raw):
    """An extent of zeros would be copied as zeros, without a read that could fail."""
    disk, base = over_raw
    os.truncate(base, 64 * KiB)
    assert disk.pread(64 * KiB, 0) == b"b" * 64 * KiB
    assert list(disk.extents(0, 64 * KiB)) == [(0, 64 * KiB, 0)]
    for offset, length in [(64 * KiB, 512), (64 * KiB - 1, 2), (0, 256 * KiB)]:
        message = "base.raw' has only 65536 bytes left of 196608"
        with pytest.raises(Error, match=message):
            disk.pread(length, offset)
        with pytest.raises(Error, match=message):
            list(disk.extents(offset, length))


def test_the_error_names_the_damaged_cluster_and_not_the_start_of_the_request(tmp_path):
    path = create(tmp_path / "disk.qcow2", MiB)
    io(path, "write -P 7 0 256k")
    take(path, "s")
    with open_image(str(path)) as image:
        last = next(image.snapshot("s").ranges(192 * KiB, 512)).host
    entry = (1 << 63 | last).to_bytes(8, "big")[1:]
    path.write_bytes(path.read_bytes().replace(entry, (last | 2).to_bytes(8, "big")[1:]))
    with open_image(str(path)) as image:
        disk = image.snapshot("s")
        for use in (lambda: disk.pread(256 * KiB, 0), lambda: list(disk.extents(0, 256 * KiB))):
            with pytest.raises(ImageError, match="guest offset 0x30000: the L2 entry .* reserved"):
                use()


def test_what_is_truncated_while_its_holes_are_looked_for_is_no_hole(tmp_path):
    path = tmp_path / "base.raw"
    with open(path, "wb") as base:
        for at in (0, 4 * MiB):
            base.seek(at)
            base.write(b"b" * 64 * KiB)
    with opened(path) as storage:
        layer = RawLayer(storage)
        assert [piece.type for piece in layer.ranges(0, layer.size)] == [0, 3, 0]
        pieces = layer.ranges(0, layer.size)
        assert next(pieces)[:3] == (0, 64 * KiB, 0)
        os.truncate(path, MiB)
        with pytest.raises(Error, match="has only 1048576 bytes left of"):
            next(pieces)
