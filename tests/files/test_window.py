"""A library may swallow an exception of the file that it reads: the window does not forget it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from qcow2snap_core.errors import ImageError, StorageError
from qcow2snap_core.files.window import Window, judged


class Failing(io.FileIO):
    """A file that cannot be read from some offset on, as a disk with a bad sector."""

    def readinto(self, buffer: object) -> int | None:
        if self.tell() >= 4096:
            raise StorageError("the disk failed")
        return super().readinto(buffer)


@pytest.fixture
def window(tmp_path: Path) -> Window:
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 32)
    return Window(Failing(tmp_path / "raw"), 100, 8000)


def test_it_is_a_range(window: Window) -> None:
    assert window.pread(0, 3) == bytes([100, 101, 102])
    assert window.pread(8000, 3) == b""
    assert window.seek(-10, 2) == 7990


def test_a_failure_is_for_ever(window: Window) -> None:
    with pytest.raises(StorageError):
        window.pread(5000, 10)
    for again in (window.check, lambda: window.pread(0, 1)):
        with pytest.raises(StorageError, match="the disk failed"):
            again()


def test_the_window_of_a_window_fails_with_it(window: Window) -> None:
    inner = Window(window, 4000, 4000)
    with pytest.raises(StorageError):
        inner.pread(1000, 1)
    with pytest.raises(StorageError):
        window.check()


def swallowing(window: Window) -> None:
    """What libtsk does."""
    with judged(window, "a file"):
        try:
            window.pread(5000, 10)
        except StorageError as e:
            raise RuntimeError("not a directory") from e


def test_what_a_library_swallows_is_raised_in_the_end(window: Window) -> None:
    with pytest.raises(StorageError, match="the disk failed"):
        swallowing(window)
    with pytest.raises(StorageError), judged(window, "another file"):
        pass


def test_other_exceptions_are_damage(window: Window) -> None:
    with pytest.raises(ImageError, match="a file cannot be read: 7"), judged(window, "a file"):
        raise KeyError(7)


def test_blocks_of_a_journal_lie_over_it(window: Window) -> None:
    window.overlay(16, {1: b"x" * 16, 3: b"y" * 16})
    whole = bytes((100 + i) % 256 for i in range(120))
    expected = whole[:16] + b"x" * 16 + whole[32:48] + b"y" * 16 + whole[64:]
    for start in range(80):
        for length in (1, 7, 20, 40):
            assert window.pread(start, length) == expected[start : start + length]
