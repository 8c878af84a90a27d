"""Regular files are read, holes and all; what is no file or block device is never opened."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
from pathlib import Path

import pytest
from support.devices import opened
from support.qemu import KiB, MiB, run

from qcow2snap_core.errors import StorageError, UsageError
from qcow2snap_core.storage.local import inode, open_storage


@pytest.fixture
def data():
    return random.Random(1).randbytes(256 * KiB + 512)


@pytest.fixture
def file(tmp_path, data):
    path = tmp_path / "disk.raw"
    path.write_bytes(data)
    return path


# --- What is opened ---


def make_fifo(path):
    os.mkfifo(path)  # to open it for reading would wait for a writer, for ever


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def make_device_without_driver(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(0, 0))  # to open it would be ENXIO
    except PermissionError:
        pytest.skip("making a device node takes root")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "directory"),
        (make_fifo, "FIFO"),
        (make_socket, "socket"),
        (make_device_without_driver, "character device"),
    ],
)
@pytest.mark.parametrize("symlink", [False, True])
def test_another_kind_of_file_is_refused_unopened(tmp_path, make, kind, symlink):
    path = tmp_path / "odd"
    make(path)
    if symlink:
        path = tmp_path / "link"
        path.symlink_to("odd")
    with pytest.raises(UsageError, match=f"'{path}' is a {kind}: give a regular file or a block"):
        open_storage(str(path))


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_the_systems_character_devices_are_refused(path):
    with pytest.raises(UsageError, match="is a character device"):
        open_storage(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file or directory"),
        ("disk.raw/inside", "not a directory"),
        ("loop", "too many levels of symbolic links"),
        ("nul\0byte", "embedded null byte"),
        ("x" * 300, "file name too long"),
    ],
)
def test_what_cannot_be_opened_is_named_with_the_reason(tmp_path, file, name, reason):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=f"cannot open '.*': {reason}"):
        open_storage(f"{tmp_path}/{name}")


def test_a_file_that_may_not_be_read_is_named_with_the_reason(file):
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root may read anything")
    with pytest.raises(UsageError, match="permission denied"):
        open_storage(str(file))


def test_an_image_behind_symlinks_lies_where_the_last_one_leads(tmp_path, file):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").symlink_to("../disk.raw")
    (tmp_path / "two").symlink_to("a/one")
    asked = []
    with opened(tmp_path / "two", lambda *what: asked.append(what)) as storage:
        assert asked == [(str(file), inode(os.stat(file)))]
        assert storage.directory == str(tmp_path)
        assert storage.path == str(tmp_path / "two")


def test_one_file_under_two_names_is_one_inode(tmp_path, file):
    os.link(file, tmp_path / "other")
    (tmp_path / "copy").write_bytes(b"")
    with (
        opened(file) as a,
        opened(tmp_path / "other") as b,
        opened(tmp_path / "copy") as c,
    ):
        assert a.inode == b.inode != c.inode


def test_a_refusal_is_passed_on(file):
    def permit(real, which):
        raise UsageError("not this one")

    with pytest.raises(UsageError, match="^not this one$"):
        open_storage(str(file), permit)


def test_what_was_permitted_is_what_is_opened(tmp_path, file, data):
    """Somebody exchanges the file at the very last moment."""

    def permit(real, which):
        (tmp_path / "other").write_bytes(b"secret")
        os.replace(tmp_path / "other", real)

    with opened(file, permit) as storage:
        assert storage.read(512, 0) == data[:512]


def test_no_descriptor_is_left_behind(tmp_path, file):
    def refuse(real, which):
        raise UsageError("no")

    before = os.listdir("/proc/self/fd")
    for path in (tmp_path, tmp_path / "missing", file):
        with pytest.raises(UsageError):
            open_storage(str(path), refuse)
    open_storage(str(file)).close()
    assert os.listdir("/proc/self/fd") == before


# --- Regular files ---

RANGES = [(0, 512), (1, 1), (511, 1025), (4095, 8193), (65536, 65536), (262_000, 656), (7, 200_001)]


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_file_gives_its_bytes(file, data, offset, length):
    with opened(file) as storage:
        buffer = bytearray(length)
        assert storage.read_into(buffer, offset) == length
        assert buffer == data[offset : offset + length] == storage.read(length, offset)


PAST_END = [
    (-1, 1, 1),
    (-1, 2, 1),
    (-512, 4096, 512),
    (0, 512, 0),
    (10_000, 512, 0),
    (-5000, 9000, 5000),
    (2**63, 512, 0),  # more than the kernel's offsets hold
    (2**64 - 512, 512, 0),
]


@pytest.mark.parametrize(("from_end", "length", "expected"), PAST_END)
def test_a_read_is_short_only_where_the_file_ends(file, data, from_end, length, expected):
    offset = len(data) + from_end
    with opened(file) as storage:
        buffer = bytearray(b"x" * length)
        assert storage.read_into(buffer, offset) == expected
        assert buffer == data[offset:] + b"x" * (length - expected)
        assert storage.read(length, offset) == data[offset:]


def test_a_read_that_the_kernel_cuts_short_goes_on():
    """The kernel gives this file a page at a time, and it has megabytes."""
    path = Path("/proc/kallsyms")
    if not path.exists() or len(path.read_bytes()) < MiB:
        pytest.skip("no large file under /proc")
    expected = path.read_bytes()[:MiB]
    with opened(path) as storage:
        buffer = bytearray(MiB)
        assert storage.read_into(buffer, 0) == MiB
        assert buffer == expected == storage.read(MiB, 0)


def test_the_size_is_the_present_one(file, data):
    with opened(file) as storage:
        assert storage.size() == len(data)
        os.truncate(file, 1000)
        assert storage.size() == 1000
        assert storage.read(512, 600) == data[600:1000]


@pytest.mark.parametrize("method", ["read", "read_into"])
def test_a_failing_read_names_file_and_offset(file, method):
    with opened(file) as storage:
        what = 512 if method == "read" else bytearray(512)
        with pytest.raises(StorageError, match="512 bytes of '.*disk.raw' at host offset -0x1000"):
            getattr(storage, method)(what, -4096)


def qemu_holes(path):
    said = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", path))
    return [(e["start"], e["length"], not e["data"]) for e in said]


@pytest.mark.parametrize(
    ("size", "written"),
    [
        (MiB, []),
        (MiB, [0]),
        (MiB, [64, 256, 320]),
        (MiB, [960]),
        (MiB + 512, [1024]),
        (MiB - 512, [0, 128]),
    ],
)
def test_holes_are_where_qemu_sees_them(tmp_path, size, written):
    path = tmp_path / "sparse.raw"
    with open(path, "wb") as f:
        f.truncate(size)
        for at in written:
            f.seek(at * KiB)
            f.write(bytes(b"x" * min(64 * KiB, size - at * KiB)))
    with opened(path) as storage:
        assert list(storage.holes(0, size)) == qemu_holes(path)


def test_holes_of_a_range_stay_inside_it(tmp_path):
    path = tmp_path / "sparse.raw"
    with open(path, "wb") as f:
        f.truncate(192 * KiB)
        f.seek(64 * KiB)
        f.write(b"x" * 64 * KiB)
    with opened(path) as storage:
        assert list(storage.holes(1, 2)) == [(1, 2, True)]
        assert list(storage.holes(65 * KiB, 7)) == [(65 * KiB, 7, False)]
        assert list(storage.holes(100 * KiB, 40 * KiB)) == [
            (100 * KiB, 28 * KiB, False),
            (128 * KiB, 12 * KiB, True),
        ]
