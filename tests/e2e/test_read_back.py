"""What was written is compared with what was asked for before it gets its name: a byte that a
server gets wrong makes the command fail, and nothing is left."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support import command, qemu
from support.qemu import KiB, MiB
from support.remote import remote

from qcow2snap_core.transfer.newimage import NewImage

SIZE = 8 * MiB
WRONG = 5 * MiB + 4321  # where a byte gets another value


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.io(path, f"write -P 1 0 {SIZE}")
    qemu.take(path, "first")
    qemu.io(path, "write -P 2 1M 1M", "write -z -u 2M 1M")
    qemu.take(path, "second")
    return path


@pytest.fixture
def chain(image: Path, tmp_path: Path) -> Path:
    command.qcow2snap("split", image, tmp_path / "chain")
    return tmp_path / "chain"


@pytest.fixture
def wrong_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that keeps another byte than it was given."""
    real, large = NewImage.write, 2 * MiB
    met = 0

    def write(self: NewImage, data: bytes, offset: int) -> None:
        nonlocal met
        met += len(data) == large
        if met == WRONG // large + 1 and len(data) == large:
            changed = bytearray(data)
            changed[WRONG % large] = 99
            data = bytes(changed)
        real(self, data, offset)

    monkeypatch.setattr(NewImage, "write", write)


def test_join_with_a_wrong_byte_leaves_nothing(
    chain: Path, tmp_path: Path, wrong_disk: None
) -> None:
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "out.qcow2"
    line = command.fails_here("join", chain / "active.qcow2", out)
    assert line.startswith(f"qcow2snap: snapshot 'first' of '{out}' differs from its source ")
    assert f"guest offset {WRONG:#x}" in line
    assert sorted(os.listdir(tmp_path)) == before


def test_split_with_a_wrong_byte_leaves_nothing(
    image: Path, tmp_path: Path, wrong_disk: None
) -> None:
    before = sorted(os.listdir(tmp_path))
    line = command.fails_here("split", image, tmp_path / "chain")
    assert f"'{tmp_path}/chain/first.qcow2' differs from its source at guest " in line
    assert f"offset {WRONG:#x}" in line
    assert sorted(os.listdir(tmp_path)) == before


def test_no_verify_leaves_the_comparison_out(image: Path, tmp_path: Path, wrong_disk: None) -> None:
    chain, out = tmp_path / "chain", tmp_path / "out.qcow2"
    command.here("split", "--no-verify", image, chain)
    expected = bytearray(qemu.content(image, "first"))
    expected[WRONG] = 99
    assert qemu.content(chain / "first.qcow2") == expected
    command.qcow2snap("join", "--no-verify", chain / "active.qcow2", out)
    assert qemu.content(out, "first") == expected


@pytest.mark.parametrize("lie", ["flip", "lose zeros"])
def test_an_export_that_is_written_wrong_is_an_error(image: Path, tmp_path: Path, lie: str) -> None:
    """A server that changes a byte of what it is given, and one that forgets zeros."""
    script = tmp_path / "wrong.py"
    script.write_text(
        f"""
API_VERSION = 2
disk = bytearray(b"j" * {SIZE})

def open(readonly):
    return 1

def get_size(h):
    return len(disk)

def pread(h, buf, offset, flags):
    buf[:] = disk[offset : offset + len(buf)]

def pwrite(h, buf, offset, flags):
    disk[offset : offset + len(buf)] = buf
    if {lie == "flip"} and offset <= {WRONG} < offset + len(buf):
        disk[{WRONG}] ^= 1

def zero(h, count, offset, flags):
    if {lie == "flip"}:
        disk[offset : offset + count] = bytes(count)
"""
    )
    where = WRONG if lie == "flip" else 2 * MiB
    with remote("python", script) as server:
        line = command.fails("copy", image, "second", server.uri)
        assert f"differs from its source at guest offset {where:#x}" in line
        assert "is partly written: repeat the copy" in line
        command.qcow2snap("copy", "--no-verify", image, "second", server.uri)


@pytest.mark.parametrize("filters", [[], ["--filter=noextents"]], ids=["extents", "no extents"])
def test_zeros_that_an_export_knows_of_are_not_read(tmp_path: Path, filters: list[str]) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 64 * MiB)
    qemu.io(path, "write -P 1 8M 64k")
    qemu.take(path, "one")
    log = tmp_path / "log"
    with remote("--filter=log", *filters, "memory", "64M", f"logfile={log}") as server:
        command.qcow2snap("copy", path, "one", server.uri)
        command.qcow2snap("copy", path, "--no-verify", "one", server.uri)
    counts = re.findall(r" Read id=\d+ offset=\S+ count=(0x[0-9a-f]+)", log.read_text())
    assert sum(int(n, 16) for n in counts) == (64 * MiB if filters else 64 * KiB)


def test_a_chain_too_long_to_be_compared_is_refused_before_the_work(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in range(200):
        qemu.take(path, f"s{name}")
    line = command.fails("split", path, tmp_path / "chain")
    assert "201 files, more than the 200" in line
    assert "--no-verify" in line
    assert os.listdir(tmp_path) == ["disk.qcow2"]
