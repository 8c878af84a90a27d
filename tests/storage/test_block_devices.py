"""Block devices are read past the page cache, at any offset and whatever their size."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest
from support.devices import loop_device, opened
from support.qemu import KiB, MiB

# A device's size is a multiple of 512, but not always of the 4096 that it is read in.
DEVICE_SIZES = [2 * MiB, 2 * MiB + 512, 2 * MiB + 3584]

RANGES = [(0, 512), (1, 1), (511, 1025), (4095, 8193), (64 * KiB, 64 * KiB), (7, 200_001)]
PAST_END = [(-1, 2, 1), (-512, 4096, 512), (0, 512, 0), (10_000, 512, 0), (-5000, 9000, 5000)]


@pytest.mark.parametrize("size", DEVICE_SIZES)
def test_a_device_gives_its_bytes_at_odd_offsets(tmp_path, size):
    content = random.Random(size).randbytes(size)
    with loop_device(tmp_path, content) as device, opened(device) as storage:
        assert storage.size() == size
        for offset, length in [
            *RANGES,
            (0, size),
            (4097, MiB + 1),
            (size - 1, 1),
            (size - 700, 700),
        ]:
            buffer = bytearray(length)
            assert storage.read_into(buffer, offset) == length
            assert buffer == content[offset : offset + length] == storage.read(length, offset)


@pytest.mark.parametrize("size", DEVICE_SIZES)
@pytest.mark.parametrize(("from_end", "length", "expected"), PAST_END)
def test_a_device_ends_where_it_ends(tmp_path, size, from_end, length, expected):
    content = random.Random(size).randbytes(size)
    with loop_device(tmp_path, content) as device, opened(device) as storage:
        buffer = bytearray(b"x" * length)
        assert storage.read_into(buffer, size + from_end) == expected
        assert buffer == content[size + from_end :] + b"x" * (length - expected)


def test_a_device_with_blocks_of_4096_is_read_too(tmp_path):
    content = random.Random(4).randbytes(MiB)
    with loop_device(tmp_path, content, block=4096) as device, opened(device) as storage:
        assert storage.read(1000, 4095) == content[4095:5095]


def test_a_device_is_read_past_the_page_cache(tmp_path):
    """QEMU's own O_DIRECT writes leave stale pages there."""
    with loop_device(tmp_path, bytes(MiB)) as device, opened(device) as storage:
        flags = [
            int(line.split()[1], 8)
            for fd in Path("/proc/self/fd").iterdir()
            if os.path.realpath(fd) == str(device)
            for line in Path("/proc/self/fdinfo", fd.name).read_text().splitlines()
            if line.startswith("flags:")
        ]
        assert [bool(f & os.O_DIRECT) for f in flags] == [True]
        assert list(storage.holes(0, MiB)) == [(0, MiB, False)]


def test_two_nodes_of_a_device_are_one_inode(tmp_path):
    with loop_device(tmp_path, bytes(MiB)) as device:
        other = tmp_path / "node"
        os.mknod(other, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
        with opened(device) as a, opened(other) as b:
            assert a.inode == b.inode
