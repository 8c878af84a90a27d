"""A disk's range checks, and layers below that are not what they were."""

from __future__ import annotations

import os

import pytest
from support.qemu import KiB, MiB, create, io, take

import qcow2snap_core
from qcow2snap_core import Error, ImageError


@pytest.fixture
def disk(tmp_path):
    path = create(tmp_path / "disk.qcow2", 128 * KiB)
    io(path, "write -P 7 64k 64k")
    take(path, "s")
    with qcow2snap_core.open(str(path)) as image:
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


@pytest.fixture
def over_raw(tmp_path):
    """A snapshot of an empty image over a raw file of 192 KiB, and that file."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 192 * KiB)
    path = create(tmp_path / "disk.qcow2", 256 * KiB, backing=("base.raw", "raw"))
    take(path, "s")
    with qcow2snap_core.open(str(path)) as image:
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
    with qcow2snap_core.open(str(path)) as image:
        last = next(image.snapshot("s").pieces(192 * KiB, 512)).host
    entry = (1 << 63 | last).to_bytes(8, "big")[1:]
    path.write_bytes(path.read_bytes().replace(entry, (last | 2).to_bytes(8, "big")[1:]))
    with qcow2snap_core.open(str(path)) as image:
        disk = image.snapshot("s")
        for use in (lambda: disk.pread(256 * KiB, 0), lambda: list(disk.extents(0, 256 * KiB))):
            with pytest.raises(ImageError, match="guest offset 0x30000: the L2 entry .* reserved"):
                use()
