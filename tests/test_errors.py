"""What goes into an error line stays on that line."""

from __future__ import annotations

import errno
import os

import pytest

from qcow2snap_core import Error, ImageError, SnapshotGone, StorageError, UsageError
from qcow2snap_core.errors import MOST_SHOWN, reason, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nightly", "'nightly'"),
        ("", "''"),
        ("zwölf 日本", "'zwölf 日本'"),
        ("a\nnbdkit: error: forged", r"'a\nnbdkit: error: forged'"),
        ("\r\t\0", r"'\r\t\x00'"),
        ("\x1b[31mred", r"'\x1b[31mred'"),
        ("\u2028line\u202eright-to-left", r"'\u2028line\u202eright-to-left'"),
        ("\U000e0001", r"'\U000e0001'"),
        (b"caf\xe9", r"'caf\xe9'"),
        (b"caf\xc3\xa9", "'café'"),
        (os.fsdecode(b"\xff\xfe"), r"'\xff\xfe'"),
    ],
)
def test_names_are_shown_in_quotes_on_one_line(text, expected):
    assert shown(text) == expected
    assert shown(text).isprintable()


@pytest.mark.parametrize("kind", [UsageError, ImageError, StorageError, SnapshotGone])
def test_every_kind_is_an_error_of_this_package(kind):
    assert issubclass(kind, Error)


def test_a_deleted_snapshot_is_an_error_of_the_image():
    assert issubclass(SnapshotGone, ImageError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), "no such file or directory"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/disk"), "input/output error"),
        (OSError("Something else"), "something else"),
    ],
)
def test_the_systems_reason_reads_on_in_a_line(error, expected):
    assert reason(error) == expected


def test_the_longest_name_does_not_make_a_line_of_its_length():
    assert len(shown("x" * 65535)) == MOST_SHOWN + len("'…'")
    assert shown("x" * MOST_SHOWN) == f"'{'x' * MOST_SHOWN}'"
