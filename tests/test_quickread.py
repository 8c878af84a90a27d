"""Small reads that keep the GIL: the same bytes as by ``os.preadv``, or a refusal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2snap_core import quickread
from qcow2snap_core.quickread import read_cached, watch

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, 4096), (4095, 9000), (16000, 384)])
def test_what_is_cached_is_read(fd: int, offset: int, length: int) -> None:
    os.pread(fd, len(CONTENT), 0)
    buffer = bytearray(length)
    assert read_cached(fd, memoryview(buffer), offset) == length
    assert buffer == CONTENT[offset : offset + length]


def test_it_stops_at_the_end_of_the_file(fd: int) -> None:
    os.pread(fd, len(CONTENT), 0)
    assert read_cached(fd, bytearray(500), len(CONTENT) - 100) == 100
    assert read_cached(fd, bytearray(500), len(CONTENT) + 100) == 0


def test_a_part_of_a_buffer_is_all_that_is_written(fd: int) -> None:
    os.pread(fd, len(CONTENT), 0)
    buffer = bytearray(b"-" * 30)
    assert read_cached(fd, memoryview(buffer)[10:20], 100) == 10
    assert buffer == b"-" * 10 + CONTENT[100:110] + b"-" * 10


def test_a_failure_is_left_to_the_ordinary_way(fd: int, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    assert read_cached(directory, bytearray(10), 0) == -1
    os.close(directory)


def test_a_c_library_without_it(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickread, "_preadv2", None)
    assert read_cached(fd, bytearray(10), 0) == -1


@pytest.mark.parametrize(
    ("offset", "change", "same"),
    [(5, b"\xff", True), (10, b"\xff", False), (13, b"\xff", False), (14, b"\xff", True),
     (103, b"\xff", False), (104, b"\xff", True)],
)  # fmt: skip
def test_a_watch_sees_its_places_and_nothing_else(
    fd: int, path: Path, offset: int, change: bytes, same: bool
) -> None:
    unchanged = watch(fd, [(10, CONTENT[10:14]), (100, CONTENT[100:104])])
    assert unchanged()
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(change)
    assert unchanged() is same


def test_a_place_that_the_file_lost_is_a_change(fd: int, path: Path) -> None:
    """Though the memory that is read into still holds what was there before."""
    unchanged = watch(fd, [(10, CONTENT[10:14]), (8000, CONTENT[8000:8010])])
    assert unchanged()
    os.truncate(path, 8005)
    assert not unchanged()
    os.truncate(path, 0)
    assert not unchanged()
