"""Whatever makes no sense is refused when it is given, and by the name of the argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import qemu, secret
from support.qemu import KiB, MiB

import qcow2snap_core
from qcow2snap_core import Disk, Image, UsageError

SIZE = MiB + 512


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a snapshot and a backing file, which nothing here writes to."""
    here = tmp_path_factory.mktemp("images")
    base = qemu.create(here / "base.qcow2", SIZE)
    path = qemu.create(here / "disk.qcow2", SIZE, backing=(base.name, "qcow2"))
    qemu.io(path, "write -P 7 0 64k")
    qemu.take(path, "s")
    return here


@pytest.fixture
def image(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Image]:
    monkeypatch.chdir(directory)
    with qcow2snap_core.open("disk.qcow2") as opened:
        yield opened


@pytest.fixture
def disk(image: Image) -> Disk:
    return image.open("s")


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"path": 7}, TypeError, "path is an int: give a str or a path object"),
    ({"path": b"disk.qcow2"}, TypeError, "path is a bytes: "),
    ({"path": "a\0b"}, ValueError, r"path is 'a\x00b': no path holds a NUL"),
    ({"allow_dirs": "/tmp"}, TypeError, "allow_dirs is a str: give a list of paths"),
    ({"allow_dirs": Path("/tmp")}, TypeError, "allow_dirs is a PosixPath: give a list"),
    ({"allow_dirs": 7}, TypeError, "allow_dirs is an int: give a list"),
    ({"allow_dirs": ["/tmp", 7]}, TypeError, "allow_dirs[1] is an int: give a str or a path"),
    ({"allow_files": "/tmp/a"}, TypeError, "allow_files is a str: give a list of paths"),
    ({"allow_files": [b"a"]}, TypeError, "allow_files[0] is a bytes: "),
    ({"backing_format": "vmdk"}, ValueError, "backing_format is 'vmdk': give 'raw' or 'qcow2'"),
    ({"backing_format": ""}, ValueError, "backing_format is ''"),
    ({"backing_format": 2}, TypeError, "backing_format is an int: give a str"),
    ({"l2_cache_size": -1}, ValueError, "l2_cache_size is -1: give 0 or more"),
    ({"l2_cache_size": "32M"}, TypeError, "l2_cache_size is a str: give an int"),
    ({"cluster_cache_size": -1}, ValueError, "cluster_cache_size is -1"),
    ({"cluster_cache_size": 1.5}, TypeError, "cluster_cache_size is a float"),
    ({"cluster_cache_size": None}, TypeError, "cluster_cache_size is a NoneType"),
    ({"remote_timeout": "30"}, TypeError, "remote_timeout is a str: give a number of seconds"),
    ({"remote_timeout": True}, TypeError, "remote_timeout is a bool: give a number of seconds"),
    ({"remote_timeout": 0}, ValueError, "remote_timeout is 0: give seconds, more than 0"),
    ({"remote_timeout": float("inf")}, ValueError, "remote_timeout is inf: give seconds"),
    ({"passphrase": 1234}, TypeError, "passphrase is an int: give the secret itself"),
    ({"passphrase": {0: None}}, TypeError, "passphrase[0] is a NoneType: "),
    ({"passphrase": {-1: "a"}}, ValueError, "a layer of passphrase is -1"),
    ({"passphrase": {"0": "a"}}, TypeError, "a layer of passphrase is a str: give an int"),
    ({"alow_dirs": []}, TypeError, "alow_dirs"),
]


@pytest.mark.parametrize(("given", "kind", "said"), OPTIONS)
def test_options_of_open(
    image: Image, given: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=re.escape(said)) as caught:
        qcow2snap_core.open(**{"path": "disk.qcow2", **given})
    assert type(caught.value) is kind
    assert "1234" not in str(caught.value)  # nobody wants a passphrase in a log


@pytest.mark.parametrize(
    "given",
    [
        {"path": Path("disk.qcow2")},
        {"allow_dirs": (d for d in ["/"])},
        {"allow_dirs": [Path("/")], "allow_files": {Path("base.qcow2")}},
        {"l2_cache_size": 0, "cluster_cache_size": 0},
        {"remote_timeout": 0.5},
        {"backing_format": "raw"},  # it is for images that record none
    ],
)
def test_what_does_make_sense(image: Image, given: dict[str, Any]) -> None:
    with qcow2snap_core.open(**{"path": "disk.qcow2", **given}) as opened:
        assert opened.open("s").pread(1, 64 * KiB - 1) == b"\7"


def test_what_may_not_be_opened_is_a_usage_error(image: Image) -> None:
    for given in ({"path": "none.qcow2"}, {"path": "."}, {"allow_dirs": ["none"]}):
        with pytest.raises(UsageError):
            qcow2snap_core.open(**{"path": "disk.qcow2", **given})


def test_passphrases_are_by_layer(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    secret.create(base, MiB, ("below",), **{"encrypt.format": "luks"})
    secret.create(top, MiB, (), backing=(base.name, "qcow2"))
    with qcow2snap_core.open(top, passphrase={1: "below"}) as image:
        assert image.active().pread(4, 0) == bytes(4)
    with pytest.raises(UsageError, match="passphrase"):
        qcow2snap_core.open(top, passphrase={0: "below", 1: b"above"})


OUTSIDE = [(1, -1), (-1, 0), (1, SIZE), (SIZE + 1, 0), (2, SIZE - 1), (0, SIZE + 1), (1 << 70, 0)]


@pytest.mark.parametrize(("length", "offset"), OUTSIDE)
def test_a_range_outside_of_the_disk(disk: Disk, length: int, offset: int) -> None:
    said = f"{length} bytes at {offset} are outside the disk of {SIZE}"
    with pytest.raises(ValueError, match=said):
        disk.pread(length, offset)
    with pytest.raises(ValueError, match=said):
        disk.extents(offset, length)  # and not at the first next()
    if 0 <= length <= 2 * MiB:
        with pytest.raises(ValueError, match=said):
            disk.pread_into(bytearray(length), offset)


def test_a_range_up_to_the_end(disk: Disk) -> None:
    for read in (disk.pread, lambda n, at: list(disk.extents(at, n))):
        assert len(read(0, SIZE)) == len(read(0, 0)) == 0
        assert read(1, SIZE - 1)
    assert [e.offset + e.length for e in disk.extents(SIZE - 1)] == [SIZE]
    assert list(disk.extents(SIZE)) == []


CALLS: dict[str, tuple[Callable[[Image, Disk], object], type[Exception]]] = {
    "offset is a float: give an int": (lambda i, d: d.pread(1, 0.0), TypeError),
    "length is a str: give an int": (lambda i, d: d.pread("1", 0), TypeError),
    "offset is a str": (lambda i, d: d.extents("0"), TypeError),
    "offset is a NoneType": (lambda i, d: d.pread_into(bytearray(1), None), TypeError),
    "buffer is a list: give a bytearray": (lambda i, d: d.pread_into([0], 0), TypeError),
    "buffer is read-only": (lambda i, d: d.pread_into(b"1", 0), TypeError),
    "or has gaps": (lambda i, d: d.pread_into(memoryview(bytearray(4))[::2], 0), TypeError),
    "outside the disk": (lambda i, d: d.extents(SIZE + 1), ValueError),
    "name is an int: give a str": (lambda i, d: i.find(1), TypeError),
    "name is a NoneType": (lambda i, d: i.snapshot(None), TypeError),
    "snapshot is an int: give a qcow2snap_core.Snapshot": (lambda i, d: i.open(1), TypeError),
    "snapshot is a Disk": (lambda i, d: i.open(d), TypeError),
    "vm_state is a str": (lambda i, d: i.open("s", vm_state="no"), TypeError),
    "Image.open() takes 2 positional arguments": (lambda i, d: i.open("s", True), TypeError),
    "old is a str: give a qcow2snap_core.Disk": (
        lambda i, d: qcow2snap_core.changes("s", d),
        TypeError,
    ),
    "new is a Snapshot: ": (lambda i, d: qcow2snap_core.changes(d, d.snapshot), TypeError),
    "old is a VM state: ": (
        lambda i, d: qcow2snap_core.changes(i.open("s", vm_state=True), d),
        ValueError,
    ),
    "old and new are of two images: ": (
        lambda i, d: qcow2snap_core.changes(qcow2snap_core.open(i.path).open("s"), d),
        ValueError,
    ),
    "image is a str": (lambda i, d: qcow2snap_core.exclusive_sizes("disk"), TypeError),
    "image is a Disk": (lambda i, d: qcow2snap_core.check(d), TypeError),
    "snapshot is an int": (lambda i, d: qcow2snap_core.check(i, 1), TypeError),
    "new is a str": (lambda i, d: qcow2snap_core.copy("s", "out"), TypeError),
    "new is a VM state: copy it": (
        lambda i, d: qcow2snap_core.copy(i.open("s", vm_state=True), "out"),
        ValueError,
    ),
    "target is an int": (lambda i, d: qcow2snap_core.copy(d, 1), TypeError),
    "base is 'none': give 'recorded' or 'compared' or 'trusted'": (
        lambda i, d: qcow2snap_core.copy(d, "out", base="none"),
        ValueError,
    ),
    "in_place and base go with since": (
        lambda i, d: qcow2snap_core.copy(d, "out", base="trusted"),
        ValueError,
    ),
    "compress goes with format='qcow2'": (
        lambda i, d: qcow2snap_core.copy(d, "out", compress="zlib"),
        ValueError,
    ),
    "leave out replace": (
        lambda i, d: qcow2snap_core.copy(d, "out", since=d, replace=True),
        ValueError,
    ),
    "in_place is a str": (
        lambda i, d: qcow2snap_core.copy(d, "out", in_place="x"),
        TypeError,
    ),
    "copy() takes 2 positional arguments": (
        lambda i, d: qcow2snap_core.copy(d, "out", d),
        TypeError,
    ),
    "directory is a Disk": (lambda i, d: qcow2snap_core.split(i, d), TypeError),
    "verify is an int": (lambda i, d: qcow2snap_core.split(i, "out", verify=0), TypeError),
    "top is a str": (lambda i, d: qcow2snap_core.join("disk.qcow2", "out"), TypeError),
}


@pytest.mark.parametrize("said", CALLS)
def test_calls(image: Image, disk: Disk, said: str) -> None:
    call, kind = CALLS[said]
    with pytest.raises(kind, match=re.escape(said)):
        call(image, disk)
    assert not Path("out").exists()
