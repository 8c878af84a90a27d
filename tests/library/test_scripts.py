"""The programs in examples/ do what they say, with images that QEMU's tools made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import qemu
from support.qemu import KiB, MiB
from support.server import ROOT

EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
JPEG, ELF, PDF = b"\xff\xd8\xff\xe0 a picture", b"\x7fELF a program", b"%PDF-1.7 a letter"


def run(name: str, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, ROOT / "examples" / name, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(x) for x in line], env=environment, capture_output=True, check=False)
    assert done.returncode == status, done
    return done


def write(path: Path, offset: int, content: bytes) -> None:
    """Into the image's active disk, in whole clusters as a filesystem's blocks are."""
    source = path.with_name("source")
    source.write_bytes(content.ljust(64 * KiB, b"\0"))
    qemu.io(path, f"write -s {source} {offset} 64k")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two snapshots; the second is larger, has lost a picture and part of a program, and has kept
    a letter."""
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB)
    for offset, content in {0: PDF, MiB: JPEG, 2 * MiB: ELF}.items():
        write(path, offset, content)
    qemu.take(path, "monday")
    qemu.run("qemu-img", "resize", "-q", path, 5 * MiB)
    qemu.io(path, "write -z 1M 64k", "write -P 7 2M 64k", "write -P 8 4M 192k")
    qemu.take(path, "tuesday")
    return path


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_says_how_it_is_used(name: str) -> None:
    (usage,) = run(name, status=1).stderr.decode().splitlines()
    assert usage.startswith(f"usage: {name} IMAGE ")
    assert f"\n{usage}\n" in (ROOT / "examples" / name).read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_is_one_line(image: Path, name: str) -> None:
    (line,) = run(name, image, "friday", "friday", status=1).stderr.decode().splitlines()
    assert line.startswith(f"{name}: no snapshot 'friday' in ")


def test_the_backup_becomes_each_snapshot(image: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.raw"
    said = {}
    for name in ("monday", "tuesday", "monday"):
        said[name] = run("backup.py", image, name, backup).stdout
        assert backup.read_bytes() == qemu.snapshot_content(image, name), name
    assert said["tuesday"] == b"262144 bytes of data, since monday\n"


def test_the_backup_starts_anew_where_the_snapshot_is_another(image: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.raw"
    run("backup.py", image, "tuesday", backup)
    qemu.delete(image, "tuesday")
    qemu.io(image, "write -P 9 3M 64k")
    qemu.take(image, "tuesday")
    assert b"all of it" in run("backup.py", image, "tuesday", backup).stdout
    assert backup.read_bytes() == qemu.snapshot_content(image, "tuesday")


def test_the_carver_finds_what_was_lost_and_no_more(image: Path, tmp_path: Path) -> None:
    found = run("carve.py", image, "monday", "tuesday", tmp_path).stdout.decode().split()
    assert found == [str(MiB), "jpg", str(2 * MiB), "elf"]
    for name, content in {f"{MiB}.jpg": JPEG, f"{2 * MiB}.elf": ELF}.items():
        assert (tmp_path / name).read_bytes() == content.ljust(64 * KiB, b"\0")


@pytest.mark.parametrize("start", [0, MiB])
def test_the_extractor_finds_the_file(tmp_path: Path, start: int) -> None:
    """On the whole disk, or in a partition."""
    pytest.importorskip("pytsk3")
    content = os.urandom(3 * MiB + 17)
    (tmp_path / "files/home").mkdir(parents=True)
    (tmp_path / "files/home/letter").write_bytes(content)
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(start + 16 * MiB)
    place = ["-E", f"offset={start}"]
    qemu.run("/usr/sbin/mke2fs", "-q", "-t", "ext4", *place, "-d", tmp_path / "files", raw, "16M")
    if start:
        entry = bytes(4) + b"\x83" + bytes(3) + (start // 512).to_bytes(4, "little")
        qemu.patch(raw, 446, entry + (16 * MiB // 512).to_bytes(4, "little"))
        qemu.patch(raw, 510, b"\x55\xaa")
    path = tmp_path / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, "nightly")
    qemu.io(path, f"write -z 0 {start + 16 * MiB}")
    assert run("extract.py", path, "nightly", "/home/letter").stdout == content
    (line,) = run("extract.py", path, "nightly", "/nothing", status=1).stderr.splitlines()
    assert line == b"extract.py: no filesystem in the snapshot has /nothing"
