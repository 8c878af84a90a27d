"""copy --salvage: the copy, its map as ddrescuelog reads it, and what is refused."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support import command, damage, qemu, running
from support.badsectors import SECTOR, bad_sectors
from support.devices import loop_device
from support.qemu import KiB, MiB
from support.remote import remote
from support.server import ROOT, serve

BAD = 5 * 64 * KiB  # a cluster of the guest that is damaged


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB)
    qemu.io(path, "write -P 1 0 1M", "write -P 2 1M 1M")
    qemu.take(path, "one")
    return path


@pytest.fixture
def harmed(disk: Path) -> Path:
    """Without one cluster."""
    damage.put64(disk, damage.l2_entry(disk, "one", BAD), damage.END_OF_FILE)
    return disk


def content(lost: range = range(0)) -> bytes:
    data = bytearray((b"\1" * MiB + b"\2" * MiB).ljust(4 * MiB, b"\0"))
    data[lost.start : lost.stop] = bytes(len(lost))
    return bytes(data)


LOST = range(BAD, BAD + 64 * KiB)


def ddrescuelog(*arguments: object) -> str:
    return qemu.run("ddrescuelog", *arguments)


def test_a_damaged_snapshot_with_its_map(harmed: Path, tmp_path: Path) -> None:
    out, map_ = tmp_path / "out.raw", tmp_path / "map"
    assert "past the end" in command.fails("copy", harmed, "one", out)
    done = command.run("copy", "--salvage", map_, harmed, "one", out)
    assert done.returncode == 1
    assert re.fullmatch(rf"{out}: 1.94 MiB of data and 2.06 MiB of zeros in .* s\n", done.stdout)
    assert done.stderr == (
        f"qcow2snap: 64 KiB in 1 range could not be read and are zeros in '{out}': "
        f"'{map_}' lists them\n"
    )
    assert out.read_bytes() == content(LOST)
    said = ddrescuelog("--show-status", map_)
    assert re.search(r"rescued: +4128 kB, +in +2 area", said), said
    assert re.search(r"bad-sector: +65536 B, +in +1 area", said), said
    bad = ddrescuelog("--list-blocks=-", map_).split()
    assert bad == [str(n) for n in range(LOST.start // SECTOR, LOST.stop // SECTOR)]
    lines = map_.read_text().splitlines()
    [reason] = [before for before, line in pairwise(lines) if line[-1] == "-"]
    assert reason.startswith("# snapshot 'one' (ID 1) of ")
    assert reason.endswith("lies past the end of the file")
    # It is no copy of the snapshot, and does not say that it is.
    said = command.fails("copy", "--since", "one", harmed, "one", out)
    assert "has no record of what it holds" in said


def test_a_snapshot_that_is_whole_is_copied_whole(disk: Path, tmp_path: Path) -> None:
    out, map_ = tmp_path / "out.raw", tmp_path / "map"
    command.qcow2snap("copy", "--salvage", map_, disk, "one", out)
    assert out.read_bytes() == content()
    assert out.stat().st_blocks * 512 < 3 * MiB, "its holes are holes"
    assert not ddrescuelog("--list-blocks=-?*/", map_)
    qemu.io(disk, "write -P 3 0 64k")
    qemu.take(disk, "two")
    command.qcow2snap("copy", "--since", "one", disk, "two", out)
    assert out.read_bytes() == qemu.content(disk, "two")


def test_bad_sectors_below_an_nbd_server(disk: Path, tmp_path: Path) -> None:
    out, map_ = tmp_path / "out.raw", tmp_path / "map"
    host = qemu.field64(disk, damage.l2_entry(disk, "one", BAD)) & damage.OFFSET
    with bad_sectors(disk, [(host + 3 * SECTOR, 2 * SECTOR)]) as server:
        done = command.run("copy", "--salvage", map_, server.uri, "one", out)
    assert done.returncode == 1
    assert done.stderr.startswith("qcow2snap: 1 KiB in 1 range could not be read")
    start = BAD + 3 * SECTOR
    assert out.read_bytes() == content(range(start, start + 2 * SECTOR))
    bad = ddrescuelog("--list-blocks=-", map_).split()
    assert bad == [str(start // SECTOR), str(start // SECTOR + 1)]


def blocks(mapfile: Path) -> list[str]:
    """The lines of a mapfile behind its status line."""
    lines = [line.lower() for line in mapfile.read_text().splitlines() if line[0] != "#"]
    return lines[1:]


def test_ddrescue_makes_the_same_copy_and_map_of_the_disk_that_is_served(
    harmed: Path, tmp_path: Path
) -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE here")
    for guest in (0, MiB + 64 * KiB, 2 * MiB - 64 * KiB):
        damage.put64(harmed, damage.l2_entry(harmed, "one", guest), 0x200)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    command.run("copy", "--salvage", ours, harmed, "one", ours.with_suffix(".raw"))
    (tmp_path / "view").mkdir()
    with serve(file=harmed, snapshot="one") as server:
        line = ["nbdfuse", "-r", tmp_path / "view" / "disk", server.uri()]
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as shown:
            try:
                running.eventually((tmp_path / "view" / "disk").exists)
                disk = tmp_path / "view" / "disk"
                qemu.run("ddrescue", "-q", disk, theirs.with_suffix(".raw"), theirs)
            finally:
                qemu.run("fusermount3", "-u", tmp_path / "view")
                shown.wait(20)
    assert blocks(ours) == blocks(theirs)
    assert ours.with_suffix(".raw").read_bytes() == theirs.with_suffix(".raw").read_bytes()


REFUSED = {
    "a map that is there": (("--salvage", "there", "one", "out.raw"), 1, "no map is replaced"),
    "though forced": (("--force", "--salvage", "there", "one", "there"), 1, "no map is replaced"),
    "its own name": (("--salvage", "./out.raw", "one", "out.raw"), 1, "is the copy's name"),
    "a target that is there": (("--salvage", "map", "one", "there"), 1, "add --force to replace"),
    "no folder": (("--salvage", "no/map", "one", "out.raw"), 1, "there is no directory 'no'"),
    "qcow2": (("--salvage", "map", "one", "out.qcow2"), 2, "makes a raw file"),
    "standard output": (("--salvage", "map", "one", "-"), 2, "makes a raw file"),
    "compressed": (("--salvage", "map", "--compress", "one", "o"), 2, "goes with --format qcow2"),
    "an update": (("--salvage", "map", "--since", "one", "one", "o"), 2, "leave out --since"),
    "a map to standard output": (("--salvage", "-", "one", "o"), 2, "the map to a file"),
    "the same by its path": (("--salvage", "/dev/stdout", "one", "o"), 2, "the map to a file"),
    "no comparison": (("--salvage", "map", "--no-verify", "one", "o"), 2, "leave out --no-verify"),
    "a server": (("--salvage", "map", "one", "nbd://localhost"), 1, "is remote: give a file"),
    "no such snapshot": (("--salvage", "map", "three", "out.raw"), 1, "no snapshot 'three'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing(disk: Path, tmp_path: Path, case: str) -> None:
    words, status, said = REFUSED[case]
    (tmp_path / "there").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    line = [sys.executable, "-m", "qcow2snap_core", "copy", "disk.qcow2", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == status
    [error] = done.stderr.splitlines()
    assert said in error
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "there").read_text() == "mine"


def test_a_device_is_refused(disk: Path, tmp_path: Path) -> None:
    with loop_device(tmp_path, bytes(4 * MiB)) as device:
        said = command.fails("copy", "--salvage", tmp_path / "map", disk, "one", device)
    assert "is a block device: give a file" in said


def test_a_copy_is_replaced_with_force_and_never_its_map(harmed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    out.write_bytes(b"old")
    for number in range(2):
        map_ = tmp_path / f"map{number}"
        done = command.run("copy", "--force", "--salvage", map_, harmed, "one", out)
        assert done.returncode == 1
        assert out.read_bytes() == content(LOST)
    assert (tmp_path / "map0").read_bytes() == (tmp_path / "map1").read_bytes()


def test_an_interrupted_copy_leaves_neither(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "copies" / "out.raw"
    out.parent.mkdir()
    with remote("--filter=delay", "file", disk, "rdelay=50ms") as server:
        copying = ("copy", "--salvage", out.with_name("map"), server.uri, "one", out)
        with running.started(*copying) as process:
            running.until(lambda: os.listdir(out.parent), process)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
    assert os.listdir(out.parent) == []


def test_a_target_that_fails_is_not_a_loss(disk: Path, tmp_path: Path) -> None:
    """The file may have no more than 1 MiB, and writing beyond is an error."""
    out = tmp_path / "copies" / "out.raw"
    out.parent.mkdir()
    line = ["prlimit", f"--fsize={MiB}", sys.executable, "-m", "qcow2snap_core", "copy"]
    line += ["--salvage", str(out.with_name("map")), str(disk), "one", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert os.strerror(errno.EFBIG).lower() in done.stderr.lower()
    assert os.listdir(out.parent) == []


def test_no_map_is_left_of_a_copy_that_got_no_name(disk: Path, tmp_path: Path) -> None:
    """Somebody else takes the copy's name meanwhile."""
    out = tmp_path / "copies" / "out.raw"
    out.parent.mkdir()
    with remote("--filter=delay", "file", disk, "rdelay=50ms") as server:
        copying = ("copy", "--salvage", out.with_name("map"), server.uri, "one", out)
        with running.started(*copying) as process:
            running.until(lambda: os.listdir(out.parent), process)
            out.write_text("another's")
            _, said = process.communicate(timeout=60)
            assert process.returncode == 1
    assert "was made by somebody else meanwhile" in said
    assert os.listdir(out.parent) == ["out.raw"]
    assert out.read_text() == "another's"


def test_a_map_stays_with_a_copy_that_has_its_name(
    harmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory cannot be brought to the disk any more once both are in it."""
    out = tmp_path / "copies" / "out.raw"
    out.parent.mkdir()
    synced = os.fsync

    def fsync(fd: int) -> None:
        if os.fstat(fd).st_ino == out.parent.stat().st_ino and out.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    copying = ("copy", "--salvage", out.with_name("map"), harmed, "one", out)
    assert "input/output error" in command.fails_here(*copying)
    assert sorted(os.listdir(out.parent)) == ["map", "out.raw"]
    assert out.read_bytes() == content(LOST)
