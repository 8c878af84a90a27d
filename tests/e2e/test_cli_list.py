"""qcow2snap list: qemu-img's table and numbers, with the disk size and the space of each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import damage, qemu
from support.command import fails, qcow2snap, qcow2snap_json, run
from support.qemu import KiB, MiB
from support.tables import Entry


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", 2 * MiB)
    qemu.io(path, "write -P 1 0 1M")
    qemu.take(path, "weekly")
    qemu.run("qemu-img", "resize", "-q", path, 3 * MiB)
    qemu.io(path, "write -P 2 0 512k")
    qemu.take(path, "with space")
    return path


def test_json_has_qemus_names_and_ours(disk: Path) -> None:
    found = qcow2snap_json("list", disk)
    ours = [{k: s.pop(k) for k in ("disk-size", "exclusive-size", "export")} for s in found]
    assert found == qemu.info(disk)["snapshots"]
    assert ours == [
        {"disk-size": 2 * MiB, "exclusive-size": 640 * KiB, "export": "weekly"},
        {"disk-size": 3 * MiB, "exclusive-size": 64 * KiB, "export": "with space"},
    ]


def test_the_table_begins_as_qemu_imgs(disk: Path) -> None:
    theirs = qemu.run("qemu-img", "snapshot", "-l", disk).splitlines()[1:]
    ours = qcow2snap("list", disk).splitlines()
    # QEMU 10 writes VM_SIZE where older ones write VM SIZE, and hours with four digits.
    theirs = [re.sub(r"\b00(?=\d\d:\d\d:\d\d\.)", "", x.replace("_", " ")) for x in theirs]
    assert ours[0].split() == [*theirs[0].split(), "DISK", "SIZE", "EXCLUSIVE"]
    for line, their in zip(ours[1:], theirs[1:], strict=True):
        assert line.split()[: len(their.split())] == their.split()
    assert [line.split()[-4:] for line in ours[1:]] == [
        ["2", "MiB", "640", "KiB"],
        ["3", "MiB", "64", "KiB"],
    ]
    assert len({len(line) for line in ours}) == 1


def test_no_snapshot_no_output(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    assert qcow2snap("list", path) == ""
    assert qcow2snap_json("list", path) == []


@pytest.mark.parametrize(
    "options",
    [
        [
            "--object",
            "secret,id=s,data=x",
            "-o",
            "encrypt.format=aes,encrypt.key-secret=s",
        ],
        ["-o", "backing_file=/nonexistent,backing_fmt=raw", "-u"],
    ],
    ids=["encrypted", "without its backing file"],
)
def test_what_tables_do_not_need_is_not_asked_for(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, MiB)
    if "aes" in options[-1]:
        opts = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
        secret = ["--object", "secret,id=s,data=x"]
        qemu.run("qemu-img", "snapshot", *secret, "-c", "s", "--image-opts", opts)
        assert [s["name"] for s in qcow2snap_json("list", path)] == ["s"]
    else:
        assert qcow2snap_json("list", path) == []


def test_names_that_would_break_a_line_are_escaped(disk: Path) -> None:
    damage.rename(disk, {"weekly": b"a\nb\x1b[1m\xff"})
    assert r"a\nb\x1b[1m\xff" in qcow2snap("list", disk)
    assert qcow2snap_json("list", disk)[0]["export"] == "1"


def test_a_damaged_table_is_listed_as_far_as_it_goes(disk: Path) -> None:
    qemu.patch(disk, 60, b"\0\0\0\x03")
    done = run("list", disk, "--json")
    assert done.returncode == 1
    assert "the snapshot table is damaged: entry 3 of 3" in done.stderr
    assert [s["name"] for s in json.loads(done.stdout)] == ["weekly", "with space"]


def test_entries_that_no_qemu_writes_are_listed_as_they_stand(disk: Path) -> None:
    one, two = qemu.snapshots(disk).values()
    entry = damage.table_entry(disk, one.entry_offset)
    same = Entry(b"1", b"again", two.l1_table_offset, two.l1_size, extra=bytes(8))
    damage.put_table(disk, 3, entry + bytes(-len(entry) % 8) + same.pack())
    done = run("list", disk, "--json")
    assert done.returncode == 0
    assert [(s["id"], s["name"], s["disk-size"], s["export"]) for s in json.loads(done.stdout)] == [
        ("1", "weekly", 2 * MiB, "weekly"),
        ("1", "again", 3 * MiB, "again"),
        ("", "", 3 * MiB, None),
    ]
    (line,) = done.stderr.splitlines()
    assert "entry 1 of the snapshot table, snapshot 'weekly' (ID 1), has the same ID as" in line
    assert "(and 5 more like this)" in line
    listed = run("list", disk)
    assert (listed.returncode, len(listed.stdout.splitlines())) == (0, 4)
    assert listed.stderr == done.stderr
    lines = qcow2snap("check", disk, status=3).splitlines()
    assert [x.rsplit(" ", 1)[1] for x in lines if "has an empty ID" in x] == ["['']"]


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 1000)
    assert "not a qcow2 image" in fails("list", tmp_path / "x")
    assert "no such file" in fails("list", tmp_path / "y")
