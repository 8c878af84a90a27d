"""Backups: a full copy, then only what changed, restored, compared by hash; as the recipe says."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from support import command, devices, qemu
from support.qemu import KiB, MiB
from support.server import serve

SIZE = 8 * MiB
JUNK = b"\xaa"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A week of random changes, a longer disk and a shorter one at its end."""
    path = tmp_path_factory.mktemp("backup") / "disk.qcow2"
    qemu.RandomImage(path, seed=11, size=SIZE, compressed=True).make(["mon", "tue", "wed"], 20)
    for name, size in {"long": SIZE + MiB + 512, "short": SIZE // 2 + 512}.items():
        qemu.run("qemu-img", "resize", "-q", "--shrink", path, size)
        qemu.io(path, f"write -P 9 {size - 1024} 1024", "write -z -u 0 1M")
        qemu.take(path, name)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_full_by_nbdcopy_then_the_difference_then_restored(image: Path, tmp_path: Path) -> None:
    backup, restored = tmp_path / "backup.raw", tmp_path / "restored.qcow2"
    with serve(file=image) as server:
        qemu.run("nbdcopy", server.uri("mon"), backup)
    full = sha256(backup)
    command.qcow2snap("copy", image, "--since", "mon", "--trust-base", "tue", backup)
    assert sha256(backup) != full
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", backup, restored)
    expected = hashlib.sha256(qemu.snapshot_content(image, "tue")).hexdigest()
    assert hashlib.sha256(qemu.content(restored)).hexdigest() == expected


STEPS = [("mon", "tue"), ("tue", "wed"), ("wed", "long"), ("long", "short"), ("wed", "mon")]


@pytest.mark.parametrize("how", [[], ["--in-place"]], ids=["by a copy", "in place"])
@pytest.mark.parametrize(("old", "new"), STEPS)
def test_a_file_that_holds_old_becomes_new(
    image: Path, tmp_path: Path, old: str, new: str, how: list[str]
) -> None:
    out = tmp_path / "out.raw"
    out.write_bytes(qemu.snapshot_content(image, old))
    command.qcow2snap("copy", image, "--since", old, "--trust-base", *how, new, out)
    assert out.read_bytes() == qemu.snapshot_content(image, new)
    assert os.listdir(tmp_path) == ["out.raw"]


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    path, out = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "out.raw"
    qemu.io(path, f"write -P 1 0 {SIZE}")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 1M 64k", "write -z -u 2M 1M")
    qemu.take(path, "two")
    out.write_bytes(JUNK * SIZE)  # what is not written can be seen
    how = ["--in-place", "--trust-base"]
    said = command.qcow2snap("copy", path, "--since", "one", *how, "two", out)
    assert "64 KiB of data and 1 MiB of zeros" in said
    expected = bytearray(JUNK * SIZE)
    expected[MiB : MiB + 64 * KiB] = b"\2" * 64 * KiB
    expected[2 * MiB : 3 * MiB] = bytes(MiB)
    assert out.read_bytes() == expected
    record = 4 * KiB  # ext4 counts the block of the attributes
    assert out.stat().st_blocks * 512 <= SIZE - MiB + record, "zeros are punched"


def test_a_device_that_holds_old_becomes_new(image: Path, tmp_path: Path) -> None:
    with devices.loop_device(tmp_path, qemu.snapshot_content(image, "tue")) as device:
        command.qcow2snap("copy", image, "--since", "tue", "--trust-base", "wed", device)
        assert device.read_bytes() == qemu.snapshot_content(image, "wed")


def test_an_nbd_export_that_holds_old_becomes_new(image: Path, tmp_path: Path) -> None:
    """A qcow2 backup: qemu-nbd writes it."""
    backup, socket = tmp_path / "backup.qcow2", tmp_path / "socket"
    raw = tmp_path / "old.raw"
    raw.write_bytes(qemu.snapshot_content(image, "tue"))
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, backup)
    qemu.run("qemu-nbd", "--fork", "-f", "qcow2", "-e", "8", "-k", socket, backup)
    uri = f"nbd+unix:///?socket={socket}"
    command.qcow2snap("copy", image, "--since", "tue", "--trust-base", "wed", uri)
    done = subprocess.run(["qemu-img", "check", "-q", "-U", backup], check=False, timeout=60)
    assert done.returncode == 0
    assert qemu.content(backup) == qemu.snapshot_content(image, "wed")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "must hold the snapshot of --since"), (bytes(SIZE - 512), "is no copy of that")],
    ids=["absent", "another size"],
)
def test_a_file_that_cannot_hold_old_is_refused(
    image: Path, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    out = tmp_path / "out.raw"
    if content is not None:
        out.write_bytes(content)
    line = command.fails("copy", image, "--since", "mon", "--trust-base", "tue", out)
    assert expected in line
    assert content is None or out.read_bytes() == content
