"""A copy knows what it holds, and an update of anything else is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support import command, damage, devices, qemu
from support.qemu import MiB
from support.remote import remote

SIZE = 8 * MiB
ATTRIBUTE = "user.qcow2snap.copy"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Three snapshots, the last of which is longer."""
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.take(path, "empty")
    qemu.io(path, "write -P 1 0 2M")
    qemu.take(path, "mon")
    qemu.io(path, "write -P 2 1M 2M")
    qemu.take(path, "tue")
    qemu.run("qemu-img", "resize", "-q", path, SIZE + MiB)
    qemu.io(path, f"write -P 3 {SIZE} 1M")
    qemu.take(path, "long")
    return path


@pytest.fixture
def backup(image: Path, tmp_path: Path) -> Path:
    """A copy of ``mon``; nothing else."""
    path = tmp_path / "backups" / "disk.raw"
    path.parent.mkdir()
    command.qcow2snap("copy", image, "mon", path)
    return path


@pytest.fixture
def without_attributes(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that has no extended attributes for users."""
    directory = tmp_path / "ramfs"
    directory.mkdir()
    line = ["mount", "-t", "ramfs", "none", directory]
    if subprocess.run(line, capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("no ramfs can be mounted")
    yield directory
    subprocess.run(["umount", directory], timeout=60, check=True)


def record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.getxattr(path, ATTRIBUTE))
    return found


def refused(image: Path, old: str, new: str, path: Path, *how: str) -> str:
    """The line that says why, after nothing has changed."""
    before = path.read_bytes(), path.stat(), sorted(os.listdir(path.parent))
    line = command.fails("copy", image, "--since", old, *how, new, path)
    after = path.read_bytes(), path.stat(), sorted(os.listdir(path.parent))
    assert before[0] == after[0]
    assert before[1].st_mtime_ns == after[1].st_mtime_ns
    assert before[2] == after[2]
    return line


HOW = [(), ("--in-place",)]


@pytest.mark.parametrize("how", HOW, ids=["by a copy", "in place"])
def test_from_one_to_the_next_and_back(image: Path, backup: Path, how: tuple[str, ...]) -> None:
    names = ["mon", "tue", "long", "empty", "mon"]
    for old, new in pairwise(names):
        command.qcow2snap("copy", image, "--since", old, *how, new, backup)
        assert backup.read_bytes() == qemu.snapshot_content(image, new)
        assert record(backup)["holds"]["name"] == new
        assert record(backup)["state"] == "whole"
    assert os.listdir(backup.parent) == ["disk.raw"]


@pytest.mark.parametrize("how", HOW, ids=["by a copy", "in place"])
def test_a_copy_of_another_snapshot_is_refused_and_named(
    image: Path, backup: Path, how: tuple[str, ...]
) -> None:
    line = refused(image, "tue", "long", backup, *how)
    assert f"'{backup}' holds snapshot 'mon' (ID 2, 20" in line
    assert "not snapshot 'tue' (ID 3, 20" in line
    command.qcow2snap("copy", image, "--since", "mon", *how, "tue", backup)
    assert "holds snapshot 'tue'" in refused(image, "mon", "tue", backup, *how)


def test_a_snapshot_taken_again_under_the_same_name_is_another(image: Path, backup: Path) -> None:
    qemu.delete(image, "mon")
    qemu.take(image, "mon")
    assert "holds snapshot 'mon' (ID 2, 20" in refused(image, "mon", "tue", backup)


def test_the_image_may_move(image: Path, backup: Path, tmp_path: Path) -> None:
    moved = shutil.copyfile(image, tmp_path / "moved.qcow2")
    image.unlink()
    command.qcow2snap("copy", moved, "--since", "mon", "tue", backup)
    assert backup.read_bytes() == qemu.snapshot_content(moved, "tue")


def test_two_disks_of_one_machine_are_told_apart(image: Path, tmp_path: Path) -> None:
    """Their snapshots have the same ID, name and times when QEMU took both at one instant."""
    other = qemu.create(tmp_path / "other.qcow2", SIZE)
    qemu.io(other, f"write -P 7 {SIZE - MiB} 64k", "write -P 7 0 64k")
    for name in ("empty", "mon", "tue"):
        qemu.take(other, name)
    mine, theirs = (qemu.snapshots(path)["mon"] for path in (image, other))
    head = 40 - 16  # of an entry from its dates to the VM clock
    same = qemu.peek(image, mine.entry_offset + 16, head)
    qemu.patch(other, theirs.entry_offset + 16, same)
    patched = qemu.snapshots(other)["mon"]
    assert patched.identity[:5] == mine.identity[:5]
    out = tmp_path / "other.raw"
    command.qcow2snap("copy", other, "mon", out)
    assert "holds snapshot 'mon'" in refused(image, "mon", "tue", out)


def test_two_disks_of_one_machine_with_like_tables_are_told_apart(tmp_path: Path) -> None:
    """As preallocated ones have them, or two that were made of one template."""
    path, other = qemu.create(tmp_path / "a.qcow2", SIZE), tmp_path / "b.qcow2"
    qemu.io(path, f"write -P 1 0 {SIZE}")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 2M 1M")
    qemu.take(path, "two")
    hosts = [e for e in command.qcow2snap_json("map", path, "one") if e["type"] == 0]
    for name, within in {"first": 0, "last": SIZE - 512}.items():
        shutil.copyfile(path, other)
        extent = next(e for e in hosts if e["offset"] <= within < e["offset"] + e["length"])
        qemu.patch(other, extent["host"] + within - extent["offset"], b"another disk")
        out = tmp_path / name / "out.raw"
        out.parent.mkdir()
        command.qcow2snap("copy", path, "one", out)
        line = refused(other, "one", "two", out)
        assert "holds snapshot 'one' (ID 1, " in line
        assert "), but that of another disk: " in line


def grown(path: Path) -> None:
    with open(path, "ab") as f:
        f.write(b"x")


def touched(path: Path) -> None:
    os.utime(path)


def written(path: Path) -> None:
    qemu.patch(path, 5 * MiB, b"x")


@pytest.mark.parametrize("change", [grown, touched, written])
def test_a_file_that_was_changed_is_refused(image: Path, backup: Path, change: Any) -> None:
    change(backup)
    line = refused(image, "mon", "tue", backup)
    assert "was changed after snapshot 'mon' (ID 2" in line
    assert "add --verify-base" in line


def test_a_copy_of_the_copy_knows_too_if_it_keeps_times_and_attributes(
    image: Path, backup: Path
) -> None:
    other = backup.with_name("other.raw")
    shutil.copy2(backup, other)
    command.qcow2snap("copy", image, "--since", "mon", "tue", other)
    shutil.copyfile(backup, other)  # the attribute stays that of what was there
    assert "was changed after snapshot 'tue'" in refused(image, "tue", "long", other)
    shutil.copyfile(backup, other.with_name("third.raw"))
    line = refused(image, "mon", "tue", other.with_name("third.raw"))
    assert "has no record of what it holds: add --verify-base" in line


def test_trust_base_asks_for_no_record_and_leaves_one(image: Path, backup: Path) -> None:
    os.removexattr(backup, ATTRIBUTE)
    command.qcow2snap("copy", image, "--since", "mon", "--trust-base", "tue", backup)
    command.qcow2snap("copy", image, "--since", "tue", "long", backup)
    assert backup.read_bytes() == qemu.snapshot_content(image, "long")


def test_the_active_disk_can_be_copied_but_not_be_found_again(image: Path, backup: Path) -> None:
    command.qcow2snap("copy", image, "--since", "mon", "@active", backup)
    assert backup.read_bytes() == qemu.content(image)
    assert record(backup)["holds"] is None
    assert "holds an active disk as it once was" in refused(image, "long", "tue", backup)
    assert "may have changed since" in refused(image, "@active", "tue", backup)
    command.qcow2snap("copy", image, "--since", "@active", "--trust-base", "tue", backup)
    assert backup.read_bytes() == qemu.snapshot_content(image, "tue")


def test_what_keeps_no_record_wants_trust_base(image: Path, tmp_path: Path) -> None:
    content = qemu.snapshot_content(image, "mon")
    with devices.loop_device(tmp_path, content) as device:
        line = command.fails("copy", image, "--since", "mon", "tue", device)
        assert f"'{device}' keeps no record of what it holds: add --verify-base" in line
        assert device.read_bytes() == content
    with remote("memory", SIZE) as server:
        line = command.fails("copy", image, "--since", "mon", "tue", server.uri)
        assert "keeps no record of what it holds: add --verify-base" in line


def test_a_file_without_a_record_is_compared_and_then_has_one(image: Path, backup: Path) -> None:
    os.removexattr(backup, ATTRIBUTE)
    line = refused(image, "tue", "long", backup, "--verify-base")
    assert f"'{backup}' does not hold snapshot 'tue' (ID 3)" in line
    assert re.search(r": it differs at guest offset 0x[12]00000, nothing was written$", line)
    qemu.patch(backup, SIZE - 1, b"x")
    line = refused(image, "mon", "tue", backup, "--verify-base")
    assert f"differs at guest offset {SIZE - 1:#x}, nothing was written" in line
    qemu.patch(backup, SIZE - 1, b"\0")
    command.qcow2snap("copy", image, "--since", "mon", "--verify-base", "tue", backup)
    command.qcow2snap("copy", image, "--since", "tue", "long", backup)
    assert backup.read_bytes() == qemu.snapshot_content(image, "long")


def test_a_device_is_compared(image: Path, tmp_path: Path) -> None:
    content = bytearray(qemu.snapshot_content(image, "mon"))
    content[7 * MiB] = 1
    with devices.loop_device(tmp_path, content) as device:
        line = command.fails("copy", image, "--since", "mon", "--verify-base", "tue", device)
        assert f"differs at guest offset {7 * MiB:#x}, nothing was written" in line
        assert device.read_bytes() == content
        qemu.patch(device, 7 * MiB, b"\0")
        command.qcow2snap("copy", image, "--since", "mon", "--verify-base", "tue", device)
        assert device.read_bytes() == qemu.snapshot_content(image, "tue")


@pytest.mark.parametrize("filters", [[], ["--filter=noextents"], ["--filter=noparallel"]], ids=str)
def test_an_export_is_compared(image: Path, tmp_path: Path, filters: list[str]) -> None:
    served = tmp_path / "served.raw"
    served.write_bytes(qemu.snapshot_content(image, "mon"))
    with remote(*filters, "file", served) as server:
        update = ["copy", image, "--since", "tue", "--verify-base", "mon", server.uri]
        qemu.patch(served, 7 * MiB, b"x")
        assert f"differs at guest offset {7 * MiB:#x}" in command.fails(*update)
        qemu.patch(served, 7 * MiB, b"\0")
        assert served.read_bytes() == qemu.snapshot_content(image, "mon")
        qemu.patch(served, MiB + 5, b"partly written")
        update = ["copy", image, "--since", "mon", "--verify-base", "tue", server.uri]
        for _ in range(2):  # as after an interruption
            command.qcow2snap(*update)
            assert served.read_bytes() == qemu.snapshot_content(image, "tue")


@pytest.mark.parametrize("option", ["--trust-base", "--verify-base", "--in-place"])
def test_options_of_an_update_want_one(image: Path, tmp_path: Path, option: str) -> None:
    done = command.run("copy", image, option, "mon", tmp_path / "out")
    assert done.returncode == 2
    assert "go with --since" in done.stderr
    assert not (tmp_path / "out").exists()


# --- Interrupted ---


def test_an_interrupted_update_in_place_lets_only_the_same_be_repeated(
    image: Path, backup: Path
) -> None:
    """By a cluster of the image that cannot be read until it has been mended."""
    qemu.io(image, "write -c -P 4 6M 64k")
    qemu.take(image, "last")
    stream = damage.stream(image, "last", 6 * MiB)[0]
    good = qemu.peek(image, stream, 16)
    qemu.patch(image, stream, b"\xff" * 16)
    how = ["--in-place"]
    line = command.fails("copy", image, "--since", "mon", *how, "last", backup)
    assert "is partly written: repeat the copy" in line
    assert record(backup)["state"] == "between"
    line = command.fails("copy", image, "--since", "mon", *how, "tue", backup)
    assert "is neither snapshot 'mon' (ID 2, 20" in line
    assert "nor snapshot 'last' (ID 5, 20" in line
    assert "an update was interrupted: repeat that one" in line
    assert "is neither" in command.fails("copy", image, "--since", "last", "tue", backup)
    qemu.patch(image, stream, good)
    command.qcow2snap("copy", image, "--since", "mon", *how, "last", backup)
    assert backup.read_bytes() == qemu.snapshot_content(image, "last")


def test_one_that_others_wrote_to_after_it_was_interrupted_is_refused(
    image: Path, backup: Path
) -> None:
    """What they leave is the record, and its size may be right as well."""
    qemu.io(image, "write -c -P 4 6M 64k")
    qemu.take(image, "last")
    stream = damage.stream(image, "last", 6 * MiB)[0]
    good = qemu.peek(image, stream, 16)
    qemu.patch(image, stream, b"\xff" * 16)
    update = ["copy", image, "--since", "mon", "--in-place", "last", backup]
    command.fails(*update)
    qemu.patch(image, stream, good)
    qemu.patch(backup, 4 * MiB, b"another")
    assert record(backup)["state"] == "between"
    assert f"differs at guest offset {4 * MiB:#x}, nothing was" in command.fails(*update)
    qemu.patch(backup, 4 * MiB, bytes(7))
    command.qcow2snap(*update)
    assert backup.read_bytes() == qemu.snapshot_content(image, "last")


# --- Where there are no attributes ---


def test_a_file_beside_it_stands_in_for_the_attribute(
    image: Path, without_attributes: Path
) -> None:
    out, beside = without_attributes / "out.raw", without_attributes / "out.raw.qcow2snap"
    command.qcow2snap("copy", image, "empty", out)
    assert sorted(os.listdir(without_attributes)) == ["out.raw", "out.raw.qcow2snap"]
    assert "holds snapshot 'empty'" in refused(image, "mon", "tue", out)
    command.qcow2snap("copy", image, "--since", "empty", "--in-place", "tue", out)
    assert out.read_bytes() == qemu.snapshot_content(image, "tue")
    assert json.loads(beside.read_bytes())["holds"]["name"] == "tue"
    moved = out.with_name("moved.raw")
    out.rename(moved)
    assert "has no record" in refused(image, "tue", "mon", moved)
    beside.rename(f"{moved}.qcow2snap")
    command.qcow2snap("copy", image, "--since", "tue", "--in-place", "mon", moved)


def test_a_link_in_its_place_is_not_followed_and_not_replaced(
    image: Path, without_attributes: Path, tmp_path: Path
) -> None:
    precious, out = tmp_path / "precious", without_attributes / "out.raw"
    precious.write_text("precious")
    (without_attributes / "out.raw.qcow2snap").symlink_to(precious)
    line = command.fails("copy", image, "empty", out)
    assert "cannot keep a record of what" in line
    assert "it is there and is something else" in line
    assert precious.read_text() == "precious"
    assert (without_attributes / "out.raw.qcow2snap").is_symlink()


def test_another_file_of_that_name_is_left_alone(image: Path, backup: Path) -> None:
    mine = backup.with_name("disk.raw.qcow2snap")
    mine.write_text("mine")
    command.qcow2snap("copy", image, "--since", "mon", "tue", backup)
    command.qcow2snap("copy", image, "--since", "tue", "--in-place", "mon", backup)
    assert mine.read_text() == "mine"


def test_without_room_for_the_attribute_a_file_beside_it_does(image: Path, backup: Path) -> None:
    filler = 0
    try:
        while filler < 64:
            os.setxattr(backup, f"user.filler{filler}", b"x" * 200)
            filler += 1
    except OSError:
        pass
    else:
        pytest.skip("there is always room here")
    size = 200
    while size:
        try:
            os.setxattr(backup, "user.rest", b"x" * size)
            break
        except OSError:
            size -= 4
    command.qcow2snap("copy", image, "--since", "mon", "--in-place", "tue", backup)
    assert backup.read_bytes() == qemu.snapshot_content(image, "tue")
    command.qcow2snap("copy", image, "--since", "tue", "mon", backup)
    assert backup.read_bytes() == qemu.snapshot_content(image, "mon")
    assert sorted(os.listdir(backup.parent)) == ["disk.raw"], "the new file has room"


DAMAGED = {
    "empty": b"",
    "no JSON": b"holds mon",
    "too long": b'{"version":1' + b" " * 5000 + b"}",
    "nested": b"[" * 4000,
    "no object": b"[1]",
    "a later version": b'{"version":2}',
    "not ASCII": b'{"version":1,"holds":"\xff"}',
    "not a number": b'{"version":NaN}',
    "line feeds": b'{"version":"\n\n\\n"}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_record_is_one_line(image: Path, backup: Path, content: bytes) -> None:
    os.removexattr(backup, ATTRIBUTE)
    try:
        os.setxattr(backup, ATTRIBUTE, content)
    except OSError:  # too long for an attribute here
        backup.with_name("disk.raw.qcow2snap").write_bytes(content)
    line = refused(image, "mon", "tue", backup)
    assert f"the record of what '{backup}' holds cannot be read: " in line
    command.qcow2snap("copy", image, "--since", "mon", "--trust-base", "tue", backup)
    command.qcow2snap("copy", image, "--since", "tue", "long", backup)


def test_a_fifo_in_its_place_is_one_line(image: Path, backup: Path) -> None:
    os.removexattr(backup, ATTRIBUTE)
    os.mkfifo(backup.with_name("disk.raw.qcow2snap"))
    assert "is no regular file" in refused(image, "mon", "tue", backup)
