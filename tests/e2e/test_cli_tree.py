"""list --tree and map --svg: a strip for each snapshot, of what it shares and what is its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support import damage, qemu
from support.command import fails, qcow2snap, run
from support.qemu import GiB, KiB, MiB
from support.server import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def strips(path: Path, columns: int = 80, encoding: str = "utf-8") -> list[str]:
    """The lines of list --tree."""
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "qcow2snap_core", "list", "--tree", path],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode(encoding).splitlines()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write 0 320k", "write 512k 128k")
    qemu.take(path, "monday")
    qemu.io(path, "write 64k 128k", "write 768k 64k")
    qemu.take(path, "tuesday")
    qemu.io(path, "write 128k 128k", "discard 512k 64k")
    return path


def test_a_cell_for_each_cluster(disk: Path) -> None:
    assert strips(disk) == [
        "1  monday   ╷██╷╷···╷╷······",
        "2  tuesday  │╷█╵│···╵│··╷···",
        "   @active  ╵╵██╵····╵··╵···",
        "each character is 64 KiB:",
        "█ its own  │ with older and newer  ╵ with older  ╷ with newer  · nothing stored",
    ]


def test_no_wider_than_the_terminal(disk: Path) -> None:
    assert strips(disk, 20)[:4] == [
        "1  monday   ██╷·╷···",
        "2  tuesday  │█│·│·╷·",
        "   @active  ╵█╵·╵·╵·",
        "each character is 128 KiB:",
    ]


def test_ascii_where_that_is_all_there_is(disk: Path) -> None:
    damage.rename(disk, {"tuesday": "dé".encode()})
    assert strips(disk, encoding="ascii") == [
        "1  monday   ,##,,...,,......",
        r"2  d\xe9       |,#'|...'|..,...",
        "   @active  ''##'....'..'...",
        "each character is 64 KiB:",
        "# its own  | with older and newer  ' with older  , with newer  . nothing stored",
    ]


KINDS = {
    "written once": (["write 0 64k"], [], [], "╷│╵"),
    "written again": (["write 0 64k"], ["write 0 64k"], ["write 0 64k"], "███"),
    "compressed": (["write -c 0 64k"], [], ["write 0 64k"], "╷╵█"),
    "zeroed": (["write 0 64k"], ["write -z -u 0 64k"], ["write -z 0 64k"], "█··"),
    "nothing": ([], ["read 0 64k"], [], "···"),
}


@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
def test_each_kind_of_cluster(
    tmp_path: Path, case: tuple[list[str], list[str], list[str], str], extended: str
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 64 * KiB, extended_l2=extended)
    *rounds, expected = case
    for n, commands in enumerate(rounds):
        qemu.io(path, "read 0 64k", *commands)
        if n < 2:
            qemu.take(path, f"s{n}")
    assert "".join(line[-1] for line in strips(path)[:3]) == expected


def test_what_it_shares_with_others_than_its_neighbours_is_not_its_own(disk: Path) -> None:
    qemu.run("qemu-img", "snapshot", "-a", "monday", disk)
    assert [line[12:] for line in strips(disk)[:3]] == [
        "╷╷╷╷╷···╷╷······",
        "│██││···││··█···",
        "╵╵╵╵╵···╵╵······",
    ]


def test_each_strip_is_as_long_as_its_disk(disk: Path) -> None:
    qemu.run("qemu-img", "resize", "-q", disk, MiB + 512 * KiB)
    assert [len(line[12:]) for line in strips(disk)[:3]] == [16, 16, 24]


def test_large_disks_and_tables_that_all_share(tmp_path: Path) -> None:
    """One that all have is not there at all, and nobody notices: it is not read."""
    path = qemu.create(tmp_path / "disk.qcow2", 32 * GiB)
    qemu.io(path, "write 0 64k", "write 16G 64k", "write 31G 64k")
    qemu.take(path, "old")
    qemu.io(path, "write 16G 64k")
    qemu.take(path, "new")
    active = qemu.field64(path, 40)
    for entry in (damage.l1_entry(path, "old", 0), damage.l1_entry(path, "new", 0), active):
        damage.put64(path, entry, damage.END_OF_FILE)
    assert strips(path, 28)[:4] == [
        "1  old      ╷·······█······╷",
        "2  new      │·······╷······│",
        "   @active  ╵·······╵······╵",
        "each character is 2 GiB:",
    ]


def test_a_table_that_cannot_be_read_is_a_question_mark(disk: Path) -> None:
    damage.put64(disk, damage.l1_entry(disk, "monday", 0), damage.END_OF_FILE)
    lines = strips(disk)
    assert lines[0] == "1  monday   ????????????????"
    assert lines[1] == "2  tuesday  ╷╷??╷···?╷··╷···"  # monday may have them
    assert lines[4].endswith("? damaged")


def test_a_snapshot_that_is_damaged_hides_no_other(disk: Path) -> None:
    """Without its L1 table nobody knows what it shares; a cell of the others may be its own."""
    damage.put64(disk, qemu.snapshots(disk)["monday"].entry_offset, 1)
    assert strips(disk)[:3] == [
        "1  monday   ????????????????",
        "2  tuesday  ╷╷??╷···?╷··╷···",
        "   @active  ╵╵??╵····╵··╵···",
    ]


def test_an_image_without_snapshots(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 128 * KiB)
    qemu.io(path, "write 0 64k")
    assert strips(path)[0] == "  @active  █·"


def pictures(*arguments: object) -> dict[str, list[str]]:
    """What the SVG picture says of each strip, range for range."""
    found: dict[str, list[str]] = {}
    root = ET.fromstring(qcow2snap("map", "--svg", *arguments))
    assert root.tag == f"{SVG}svg"
    for title in root.iterfind(f"{SVG}rect/{SVG}title"):
        match = re.fullmatch(r"(.*), (\d.* to .*: .*)", title.text or "")
        assert match
        found.setdefault(match[1], []).append(match[2])
    return found


def test_svg_says_the_same(disk: Path) -> None:
    damage.rename(disk, {"monday": b"<&\n\xff>"})
    assert pictures(disk) == {
        r"<&\n\xff>": [
            "0 B to 64 KiB: with newer",
            "64 KiB to 192 KiB: its own",
            "192 KiB to 320 KiB: with newer",
            "320 KiB to 512 KiB: nothing stored",
            "512 KiB to 640 KiB: with newer",
            "640 KiB to 1 MiB: nothing stored",
        ],
        "tuesday": pictures(disk, "tuesday")["tuesday"],
        "@active": pictures(disk, "@active")["@active"],
    }
    assert list(pictures(disk, "2")) == ["tuesday"]


def test_what_is_refused(disk: Path) -> None:
    assert "it has 1 'monday'" in fails("map", "--svg", disk, "sunday")
    assert run("map", disk).returncode == 2
    assert run("map", disk, "monday", "--svg", "--json").returncode == 2
    assert run("list", disk, "--tree", "--json").returncode == 2


def test_many_tables_behind_one_cell(tmp_path: Path) -> None:
    """They are read in parts, which no more cross cells than they go on behind the tables."""
    path = qemu.create(tmp_path / "disk.qcow2", 2 * GiB)
    qemu.io(path, f"write {1000 * MiB} 64k")
    for n in range(70):
        qemu.io(path, f"write {300 * MiB} 64k")
        qemu.take(path, str(n))
    lines = strips(path, 21)
    assert lines[71] == "each character is 256 MiB:"
    assert {line[-8:] for line in lines[1:69]} == {"·█·│····"}


def test_what_the_characters_mean_fits_the_terminal_too(disk: Path) -> None:
    assert strips(disk, 40)[-3:] == [
        "█ its own  │ with older and newer",
        "╵ with older  ╷ with newer",
        "· nothing stored",
    ]
