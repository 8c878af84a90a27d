"""External data files: QEMU takes no internal snapshots there, and says so; but it reads one made
by hand, and so do we; as a backing layer see also test_matrix.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import qemu
from support.qemu import KiB, MiB
from support.server import refused, serve
from support.tables import Entry, write_table


@pytest.fixture(params=["off", "on"], ids=["", "raw-external"])
def disk(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # QEMU takes a relative data file from where it runs
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 2 * MiB, data_file="disk.data", data_file_raw=request.param)
    # Guest offset 0 lies at host offset 0 in a data file: not to be mistaken for "nowhere".
    qemu.io(path, "write -P 7 0 100k", "write -P 8 1M 64k", "write -z 128k 64k")
    return path


def add_snapshot(path: Path) -> None:
    """An entry for a copy of the active L1 table."""
    l1_size = int.from_bytes(qemu.peek(path, 36, 4), "big")
    l1 = qemu.peek(path, qemu.field64(path, 40), 8 * l1_size)
    at = -(-path.stat().st_size // (64 * KiB)) * 64 * KiB
    qemu.patch(path, at, l1.ljust(64 * KiB, b"\0"))
    extra = bytes(8) + (2 * MiB).to_bytes(8, "big")
    write_table(path, [Entry(b"1", b"s", at, l1_size, extra=extra)])


def test_qemu_takes_no_snapshot_there(disk: Path) -> None:
    with pytest.raises(AssertionError, match="Operation not supported"):
        qemu.take(disk, "s")


def test_a_snapshot_that_is_asked_for_is_not_there(disk: Path) -> None:
    line = refused(file=disk, snapshot="s")
    assert "no snapshot 's'" in line
    assert "QEMU keeps none in an image with an external data file" in line


def test_the_image_is_served_without_exports(disk: Path) -> None:
    with serve(file=disk) as server:
        assert qemu.run("nbdinfo", "--list", "--json", server.uri()).count("export-name") == 0


def test_a_snapshot_made_by_hand_reads_as_in_qemu(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_snapshot(disk)
    content, extents = qemu.content(disk, "s"), qemu.extents(qemu.as_active(disk, "s"))
    monkeypatch.chdir("/")  # we take it from where the image is
    with serve(file=disk) as server:
        assert server.copy("s") == content
        assert server.extents("s") == extents


def test_it_must_lie_where_files_are_trusted(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    images.mkdir()
    elsewhere.mkdir()
    path = images / "disk.qcow2"
    qemu.create(path, 2 * MiB, data_file=elsewhere / "disk.data")
    qemu.io(path, "write -P 7 0 100k")
    add_snapshot(path)
    line = refused(file=path)
    assert f"add allow-dir={elsewhere}" in line
    assert "the data file of" in line
    with serve(file=path, allow_dir=elsewhere) as server:
        assert server.read("s") == qemu.content(path, "s")


@pytest.mark.parametrize("make", ["missing", "fifo"])
def test_it_must_be_a_file(disk: Path, make: str) -> None:
    data = disk.with_name("disk.data")
    data.unlink()
    if make == "fifo":
        qemu.run("mkfifo", data)
    assert "the data file of" in refused(file=disk)
