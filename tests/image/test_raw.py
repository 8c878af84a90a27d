"""A snapshot as a Python file object, on its own and under io.BufferedReader."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil

import pytest
from support.qemu import KiB, MiB, RandomImage, content, create, delete, patch, take

from qcow2snap_core import ImageError, SnapshotGone
from qcow2snap_core.image.opener import open_image

SIZE = 2 * MiB + 512


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "disk.qcow2"
    RandomImage(path, seed=3, size=SIZE).make(["one"])
    return path


@pytest.fixture(scope="module")
def expected(path):
    return content(path, "one")


@pytest.fixture
def file(path):
    with open_image(str(path)) as image, image.snapshot("one").raw() as file:
        yield file


def test_it_is_a_readable_seekable_raw_file(file):
    assert isinstance(file, io.RawIOBase)
    assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
    assert not file.closed
    assert not file.isatty()


def test_all_of_it(file, expected):
    assert file.read() == expected
    assert file.read() == b""
    assert file.tell() == SIZE


def test_reads_go_on_where_the_last_one_ended(file, expected):
    rng, at = random.Random(1), 0
    while at < SIZE:
        n = rng.randrange(1, 200_000)
        assert file.read(n) == expected[at : at + n]
        at = min(SIZE, at + n)
        assert file.tell() == at


@pytest.mark.parametrize(
    ("offset", "whence", "position"),
    [
        (0, os.SEEK_SET, 0),
        (1000, os.SEEK_SET, 1000),
        (SIZE + 9, os.SEEK_SET, SIZE + 9),
        (0, os.SEEK_CUR, 512),
        (-512, os.SEEK_CUR, 0),
        (0, os.SEEK_END, SIZE),
        (-100, os.SEEK_END, SIZE - 100),
        (100, os.SEEK_END, SIZE + 100),
    ],
)
def test_seeking(file, expected, offset, whence, position):
    file.seek(512)
    assert file.seek(offset, whence) == file.tell() == position
    assert file.read(1000) == expected[position : position + 1000]
    assert file.tell() == max(position, min(SIZE, position + 1000))


@pytest.mark.parametrize(("offset", "whence"), [(-1, 0), (-513, 1), (-SIZE - 1, 2), (0, 3), (0, 9)])
def test_seeking_where_there_is_nothing_changes_nothing(file, offset, whence):
    file.seek(512)
    with pytest.raises(ValueError):
        file.seek(offset, whence)
    assert file.tell() == 512


@pytest.mark.parametrize("make", [bytearray, lambda n: memoryview(bytearray(n))])
def test_readinto_fills_what_it_says(file, expected, make):
    buffer = make(1000)
    file.seek(SIZE - 300)
    assert file.readinto(buffer) == 300
    assert bytes(buffer) == expected[-300:] + bytes(700)
    assert file.readinto(buffer) == 0


def test_readinto_takes_a_buffer_of_larger_items(file, expected):
    words = memoryview(bytearray(800)).cast("Q")
    assert file.readinto(words) == 800
    assert words.tobytes() == expected[:800]


@pytest.mark.parametrize(
    "use",
    [
        lambda f: f.write(b"x"),
        lambda f: f.truncate(0),
        lambda f: f.fileno(),
        lambda f: io.BufferedWriter(f),
    ],
)
def test_what_it_cannot_do_is_unsupported(file, use):
    with pytest.raises(OSError):  # io.UnsupportedOperation is one
        use(file)


@pytest.mark.parametrize(
    "use",
    [
        lambda f: f.read(1),
        lambda f: f.read(),
        lambda f: f.readinto(bytearray(1)),
        lambda f: f.seek(0),
        lambda f: f.tell(),
    ],
)
def test_a_closed_file_refuses(file, use):
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        use(file)


def test_two_file_objects_have_positions_of_their_own(path, expected):
    with open_image(str(path)) as image:
        disk = image.snapshot("one")
        a, b = disk.raw(), disk.raw()
        a.seek(100)
        assert b.read(10) == expected[:10]
        assert a.read(10) == expected[100:110]


def test_a_buffered_reader_reads_ahead_and_back(file, expected):
    with io.BufferedReader(file, 4 * KiB) as reader:
        rng = random.Random(2)
        for _ in range(300):
            at, n = rng.randrange(SIZE), rng.randrange(10_000)
            reader.seek(at)
            assert reader.peek(1)[:1] == expected[at : at + 1]
            assert reader.read(n) == expected[at : at + n]


def test_programs_that_take_files_take_it(file, expected, tmp_path):
    with open(tmp_path / "copy", "wb") as copy:
        shutil.copyfileobj(file, copy)
    assert (tmp_path / "copy").read_bytes() == expected
    file.seek(0)
    assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(expected).digest()


# --- Errors ---


@pytest.fixture
def empty(tmp_path):
    """An image with an empty snapshot "s"."""
    path = create(tmp_path / "disk.qcow2", 256 * KiB)
    take(path, "s")
    return path


def test_the_end_is_the_end_whatever_the_start_is(empty):
    """An end of file costs no look-up in the tables."""
    with open_image(str(empty)) as image:
        file = image.snapshot("s").raw()
        patch(empty, image.snapshots[0].l1_table_offset, (1 << 62 | 1).to_bytes(8, "big"))
        with pytest.raises(ImageError, match="L1 entry 0"):
            image.snapshot("s").raw().read(512)
        file.seek(0, os.SEEK_END)
        assert file.read(512) == b""


@pytest.mark.parametrize("position", [0, 256 * KiB])
def test_a_deleted_snapshot_is_gone_to_the_last_byte(empty, position):
    with open_image(str(empty)) as image:
        file = image.snapshot("s").raw()
        file.seek(position)
        delete(empty, "s")
        with pytest.raises(SnapshotGone):
            file.read(512)
