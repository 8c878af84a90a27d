"""check finds nothing in images of every kind that QEMU makes, and what is wrong with bitmaps."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import damage, qemu
from support.qemu import KiB, MiB
from support.refcounts import set_refcount

from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.tables.check import check
from qcow2snap_core.tables.findings import BAD_TABLE, LEAK, NOT_COUNTED, OVERLAP, Finding

SECRET = ["--object", "secret,id=s,data=x"]
CLUSTER = 64 * KiB


def found(path: Path) -> list[Finding]:
    with open_image(str(path), Options(data=False, layers=False)) as image:
        return check(image)


def qemu_finds(path: Path) -> bool:
    """Whether qemu-img check sees anything, leaks too."""
    done = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, check=False)
    assert done.returncode in (0, 1, 2, 3), done
    return done.returncode != 0


# Options of qemu-img create, and what the driver needs to open it.
KINDS = {
    "LUKS": ("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", True),
    "AES": ("encrypt.format=aes,encrypt.key-secret=s", True),
    "data file": ("data_file={0}/data", False),
    "raw data file": ("data_file={0}/data,data_file_raw=on", False),
    "lazy refcounts": ("lazy_refcounts=on", False),
    "zstd": ("compression_type=zstd", False),
    "metadata preallocated": ("preallocation=metadata", False),
    "preallocated": ("preallocation=falloc", False),
    "no backing file there": ("backing_file=/nonexistent,backing_fmt=raw", False),
    "small refcounts": ("refcount_bits=2", False),
}


@pytest.mark.parametrize(("options", "secret"), KINDS.values(), ids=KINDS.keys())
def test_every_kind_is_clean(tmp_path: Path, options: str, secret: bool) -> None:
    path = tmp_path / "disk.qcow2"
    create = ["qemu-img", "create", "-q", "-u", *SECRET, "-f", "qcow2"]
    qemu.run(*create, "-o", options.format(tmp_path), path, 4 * MiB)
    opened = f"driver=qcow2,file.filename={path}" + ",encrypt.key-secret=s" * secret
    opened += ",backing=" * ("backing" in options)
    writes = ["-c", "write -P 1 0 256k", "-c", "write -z 128k 64k", "-c", "discard 192k 64k"]
    qemu.run("qemu-io", *SECRET, "--image-opts", *writes, opened)
    if "data_file" not in options:  # QEMU keeps no snapshots in those
        qemu.run("qemu-img", "snapshot", *SECRET, "-c", "one", "--image-opts", opened)
        qemu.run("qemu-io", *SECRET, "--image-opts", "-c", "write -P 2 64k 128k", opened)
    assert found(path) == []


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """With two bitmaps in use, of which one has bits in clusters of its own."""
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB, cluster_size=CLUSTER)
    qemu.io(path, "write -P 1 0 128k")
    qemu.take(path, "one")
    qemu.run("qemu-img", "bitmap", "--add", "-g", 512, path, "fine")
    qemu.io(path, "write -P 2 0 1M")
    qemu.run("qemu-img", "bitmap", "--add", path, "empty")
    return path


def test_bitmaps_are_clean(disk: Path) -> None:
    assert not qemu_finds(disk)
    assert found(disk) == []


def extension(path: Path) -> int:
    """The file offset of the bitmaps' header extension, behind its type and length."""
    return qemu.peek(path, 0, CLUSTER).index(bytes.fromhex("23852875")) + 8


def directory(path: Path) -> int:
    return qemu.field64(path, extension(path) + 16)


def table(path: Path) -> int:
    """Of the first bitmap."""
    return qemu.field64(path, directory(path))


def bits(path: Path) -> int:
    offset = qemu.field64(path, table(path)) & damage.OFFSET
    assert offset
    return offset


def uncount(place: Callable[[Path], int]) -> Callable[[Path], None]:
    return lambda path: set_refcount(path, place(path) // CLUSTER, 0)


def onto(place: Callable[[Path], int]) -> Callable[[Path], None]:
    """The snapshot's data is said to be there."""
    return lambda path: damage.put64(path, damage.l2_entry(path, "one", 0), place(path))


def put(place: Callable[[Path], int], more: int, form: str, value: int) -> Callable[[Path], None]:
    return lambda path: qemu.patch(path, place(path) + more, struct.pack(form, value))


# What is done; the kind of finding; words of it.
DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "directory freed": (uncount(directory), NOT_COUNTED, "the bitmap directory"),
    "table freed": (uncount(table), NOT_COUNTED, "the table of bitmap 'fine'"),
    "bits freed": (uncount(bits), NOT_COUNTED, "bitmap 'fine'"),
    "data on the directory": (onto(directory), OVERLAP, "the bitmap directory"),
    "data on a table": (onto(table), OVERLAP, "the table of bitmap 'fine'"),
    "data on bits": (onto(bits), OVERLAP, "bitmap 'fine'"),
    "table on the header": (put(directory, 0, ">Q", 0), OVERLAP, "the header"),
    "directory past the end": (
        put(extension, 16, ">Q", damage.END_OF_FILE),
        BAD_TABLE,
        "past the end",
    ),
    "directory nowhere": (put(extension, 16, ">Q", 1 << 63), BAD_TABLE, "past the end"),
    "directory unaligned": (put(extension, 23, ">B", 8), BAD_TABLE, "unaligned"),
    "too many bitmaps": (put(extension, 0, ">I", 3), BAD_TABLE, "ends before bitmap 3"),
    "too few bitmaps": (put(extension, 0, ">I", 1), BAD_TABLE, "goes on behind"),
    "no bitmaps": (put(extension, 0, ">I", 0), BAD_TABLE, "impossible"),
    "huge directory": (put(extension, 8, ">Q", 1 << 40), BAD_TABLE, "impossible"),
    "name too long": (put(directory, 18, ">H", 9999), BAD_TABLE, "ends inside bitmap 1"),
    "table past the end": (
        put(directory, 0, ">Q", damage.END_OF_FILE),
        BAD_TABLE,
        "past the end",
    ),
    "huge table": (put(directory, 8, ">I", 0xFFFFFFFF), BAD_TABLE, "past the end"),
    "reserved bits": (put(table, 0, ">B", 0x40), BAD_TABLE, "reserved bits"),
    "bits past the end": (put(table, 0, ">Q", damage.END_OF_FILE), BAD_TABLE, "past the end"),
    "extension too short": (put(extension, -4, ">I", 16), BAD_TABLE, "has 16 bytes"),
}


@pytest.mark.parametrize(("harm", "problem", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_to_bitmaps_is_found(
    disk: Path, harm: Callable[[Path], None], problem: str, words: str
) -> None:
    harm(disk)
    assert any(f.problem == problem and words in f.message for f in found(disk))


def test_bitmaps_that_somebody_left_behind_are_nobodys(disk: Path) -> None:
    """Written to by a program that knows none: the autoclear bit is gone."""
    qemu.patch(disk, 88, bytes(8))
    uncount(directory)(disk)
    [finding] = found(disk)
    assert (finding.problem, finding.clusters) == (LEAK, 3)


def test_a_bad_entry_of_an_image_with_a_data_file(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB, data_file=tmp_path / "data")
    qemu.io(path, "write 0 128k")
    table = qemu.field64(path, qemu.field64(path, 40)) & damage.OFFSET
    damage.put64(path, table + 8, qemu.field64(path, table + 8) | 0x200)
    [finding] = found(path)
    assert "guest offset 0x10000: an L2 entry holds the unaligned" in finding.message


def test_a_refcount_table_that_can_be_nowhere(disk: Path) -> None:
    damage.put64(disk, 48, 1 << 63)
    assert [f.problem for f in found(disk)] == [BAD_TABLE]
