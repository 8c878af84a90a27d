"""Partition tables by sfdisk, and what a guest may write over them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB

from qcow2snap_core.errors import ImageError
from qcow2snap_core.files.partitions import partitions
from qcow2snap_core.files.window import Window

GPT = "label: gpt\nd1: size=4M,type=L\nd7: size=8M,type=V\n"
MBR = (
    "label: dos\nd1: size=4M,type=83\nd2: start=10240,size=40M,type=5\n"
    "d3: start=92160,size=4M,type=7\nd5: size=4M,type=83\nd6: size=8M,type=82\n"
)
SIZE = 64 * MiB


def table(raw: Path, script: str) -> Path:
    with open(raw, "wb") as f:
        f.truncate(SIZE)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    qemu.run("sfdisk", "-q", raw, input=script, env=environment)
    return raw


def found(raw: Path, size: int = SIZE) -> list[tuple[int, int, int, str]]:
    with io.FileIO(raw) as file:
        return [tuple(p) for p in partitions(Window(file, 0, size))]


def test_numbers_and_places_are_those_of_sfdisk(tmp_path: Path) -> None:
    assert found(table(tmp_path / "gpt", GPT)) == [
        (1, MiB, 4 * MiB, "Linux"),
        (7, 5 * MiB, 8 * MiB, "Linux LVM"),
    ]
    assert found(table(tmp_path / "mbr", MBR)) == [
        (1, MiB, 4 * MiB, "Linux"),
        (3, 45 * MiB, 4 * MiB, "NTFS or exFAT"),
        (5, 6 * MiB, 4 * MiB, "Linux"),
        (6, 11 * MiB, 8 * MiB, "Linux swap"),
    ]


def test_without_a_table_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(MiB))
    assert found(tmp_path / "raw", MiB) == []


SECOND = 5 * MiB  # the extended partition: the boot record of number 5
ONWARDS = bytes([5]) * 4 + b"\1\0\0\0\1\0\0\0"
DAMAGE = {
    "GPT header": (GPT, 512 + 40, b"\1", "header's checksum"),
    "GPT size of the header": (GPT, 512 + 12, b"\xff\xff\xff\xff", "header's checksum"),
    "GPT entries": (GPT, 1024 + 40, b"\1", "entries' checksum"),
    "MBR past the end": (MBR, 446 + 12, struct.pack("<I", 1 << 31), "partition 1 ends behind"),
    # The next logical partition is the first one again.
    "MBR circle": (MBR, SECOND + 446 + 16 + 8, struct.pack("<I", 0), ""),
    "MBR circle of two": (
        MBR,
        10 * MiB + 446 + 16 + 4,
        bytes([5]) * 4 + b"\1\0\0\0\1\0\0\0",
        "chain",
    ),
    "MBR chain that breaks": (MBR, 10 * MiB + 510, b"\0\0", "chain of logical partitions"),
}


@pytest.mark.parametrize(("script", "offset", "data", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damage_has_an_end_and_says_what(
    tmp_path: Path, script: str, offset: int, data: bytes, expected: str
) -> None:
    raw = table(tmp_path / "raw", script)
    qemu.patch(raw, offset, data)
    if not expected:
        assert [p[0] for p in found(raw)] == [1, 3, 5]
        return
    with pytest.raises(ImageError, match=expected):
        found(raw)


def test_a_disk_that_was_cut(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="partition 7 ends behind the end of the disk"):
        found(table(tmp_path / "raw", GPT), 12 * MiB)


def test_a_table_that_was_cut(tmp_path: Path) -> None:
    """Its checksums may be those of what there still is."""
    disk = bytearray(table(tmp_path / "raw", GPT).read_bytes()[: 1024 + 200])
    struct.pack_into("<I", disk, 512 + 88, zlib.crc32(disk[1024:]))
    struct.pack_into("<I", disk, 512 + 16, 0)
    struct.pack_into("<I", disk, 512 + 16, zlib.crc32(disk[512 : 512 + 92]))
    (tmp_path / "raw").write_bytes(disk)
    with pytest.raises(ImageError, match="it lies behind the end"):
        found(tmp_path / "raw", len(disk))
    with pytest.raises(ImageError, match="ends inside the 92 bytes of metadata"):
        found(tmp_path / "raw", 512 + 50)
