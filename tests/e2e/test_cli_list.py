"""qcow2snap list: qemu-img's table and numbers, with the disk size and the space of each."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support import damage, qemu
from support.command import fails, on_terminal, qcow2snap, qcow2snap_json, run
from support.qemu import KiB, MiB
from support.refcounts import allocated
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
    names = [f"exclusive{part}-size" for part in ("", "-disk", "-vm-state")]
    ours = [[s.pop(k) for k in ("disk-size", *names, "export")] for s in found]
    assert found == qemu.info(disk)["snapshots"]
    assert ours == [
        [2 * MiB, 640 * KiB, 640 * KiB, 0, "weekly"],
        [3 * MiB, 64 * KiB, 64 * KiB, 0, "with space"],
    ]


def test_columns_in_which_nothing_stands_are_left_out(disk: Path) -> None:
    lines = qcow2snap("list", disk).splitlines()
    assert lines[0].split() == ["ID", "TAG", "DATE", "DISK", "SIZE", "EXCLUSIVE"]
    first = qemu.snapshots(disk)["weekly"].entry_offset
    damage.put64(disk, first + 24, 5_025_000_000)  # the VM clock
    assert "00:00:05.025" in qcow2snap("list", disk).splitlines()[1]
    assert "VM SIZE" not in qcow2snap("list", disk)


def test_long_names_are_cut_on_a_terminal_only(disk: Path) -> None:
    qemu.take(disk, "n" * 120)
    name = "n" * 120
    assert name in qcow2snap("list", disk)
    for columns in (60, 80):
        lines = on_terminal("list", disk, columns=columns)
        assert {len(line) for line in lines} == {columns}
        assert re.search(r"3   n{10,}… ", lines[3])
        assert max(map(len, on_terminal("list", "--tree", disk, columns=columns)[:4])) <= columns
    assert name in on_terminal("list", disk, columns=300)[3]
    wide = on_terminal("list", "--wide", disk, columns=60)
    assert name in wide[3]
    assert "ICOUNT" in wide[0]


def test_the_table_begins_as_qemu_imgs(disk: Path) -> None:
    theirs = qemu.run("qemu-img", "snapshot", "-l", disk).splitlines()[1:]
    ours = qcow2snap("list", "--wide", disk).splitlines()
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


@pytest.mark.parametrize("data_file", [False, True])
def test_no_snapshots_are_told(tmp_path: Path, data_file: bool) -> None:
    options = {"data_file": tmp_path / "data"} if data_file else {}
    path = qemu.create(tmp_path / "disk.qcow2", MiB, **options)
    done = run("list", path)
    why = ": QEMU keeps none in an image with an external data file" if data_file else ""
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"qcow2snap: '{path}' has no snapshots{why}\n"
    assert qcow2snap_json("list", path) == []


# --- What deleting several frees; the other way round is in tests/tables/test_space.py ---


def test_what_deleting_some_together_frees(disk: Path) -> None:
    qemu.take(disk, "a,b")
    qemu.io(disk, "write -P 3 0 1M")
    assert "deleting 'weekly' frees 640 KiB" in qcow2snap("list", disk, "--free", "weekly")
    copy = disk.with_name("copy")
    shutil.copyfile(disk, copy)
    before = allocated(copy)
    qemu.delete(copy, "with space")
    qemu.delete(copy, "a,b")
    freed = before - allocated(copy)
    assert freed == 9 * 64 * KiB + 2 * 64 * KiB  # what both have: no sum of two says it
    for words in (["--free", "with space", "--free", "a,b"], ["--free=2,3"], ["--free", "3,,2,3"]):
        assert qcow2snap_json("list", disk, *words) == [
            {
                "snapshots": ["2", "3"],
                "freed-size": freed,
                "freed-disk-size": freed,
                "freed-vm-state-size": 0,
            }
        ]
    said = qcow2snap("list", disk, "--free", "2,3")
    assert said == "deleting 'with space', 'a,b' together frees 704 KiB\n"
    assert "no snapshot 'x'" in fails("list", disk, "--free", "weekly,x")


def test_names_are_words_that_choose_each(disk: Path) -> None:
    for name in ("1", "weekly", "line\nfeed"):
        qemu.take(disk, name)
    words = qcow2snap("list", "--names", disk).splitlines()
    assert words == ["1", "with space", "3", "4", "5"]
    for number, word in enumerate(words, 1):
        [freed] = qcow2snap_json("list", disk, "--free", word)
        assert freed["snapshots"] == [str(number)]


@pytest.mark.parametrize(
    "words", [["--json", "--tree"], ["--wide", "--json"], ["--free", "1", "--tree"]]
)
def test_forms_that_do_not_go_together(disk: Path, words: list[str]) -> None:
    done = run("list", disk, *words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


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
