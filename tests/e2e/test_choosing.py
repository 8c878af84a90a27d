"""Which snapshot a key or an export name opens, and which names a server offers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import nbd
import pytest
from support import damage, qemu
from support.qemu import KiB
from support.server import Server, refused, serve

K64 = 64 * KiB


def image(path: Path, *names: str) -> Path:
    """Snapshot number N (its ID) holds bytes N; the active disk holds zeros."""
    qemu.create(path, K64)
    for number, name in enumerate(names, 1):
        qemu.io(path, f"write -P {number} 0 64k")
        qemu.take(path, name)
    qemu.io(path, "write -P 0 0 64k")
    return path


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """The third is named as the first is numbered."""
    return image(tmp_path / "disk.qcow2", "monday", "tuesday", "1")


def opened(server: Server, export: str = "") -> int | None:
    """The number of the snapshot that an export name opens; None if it is refused."""
    try:
        data = server.read(export)
    except nbd.Error:
        return None
    assert data == data[:1] * K64
    return data[0]


def listed(server: Server) -> dict[str, dict[str, Any]]:
    said = json.loads(qemu.run("nbdinfo", "--list", "--json", server.uri()))
    exports = {e["export-name"]: e for e in said["exports"]}
    assert len(exports) == len(said["exports"])
    return exports


# --- Keys ---

KEYS: list[tuple[list[str], int]] = [
    (["snapshot=monday"], 1),
    (["snapshot=2"], 2),
    (["snapshot=1"], 1),  # an ID before a name
    (["snapshot=3"], 3),
    (["snapshot-id=1"], 1),
    (["snapshot.id=2"], 2),
    (["snapshot-name=1"], 3),
    (["snapshot.name=tuesday"], 2),
    (["snapshot-id=2", "snapshot-name=tuesday"], 2),
    (["snapshot.name=1", "snapshot.id=3"], 3),
    (["snapshot=1", "snapshot-name=monday"], 1),
    (["snapshot=1", "snapshot-name=1"], 3),
]


@pytest.mark.parametrize(("keys", "number"), KEYS, ids=["+".join(k) for k, _ in KEYS])
def test_a_key_chooses_a_snapshot(three: Path, keys: list[str], number: int) -> None:
    with serve(f"file={three}", *keys) as server:
        assert opened(server) == number


@pytest.mark.parametrize(
    "keys",
    [
        ["snapshot=wednesday"],
        ["snapshot="],
        ["snapshot-id=monday"],
        ["snapshot-id=01"],
        ["snapshot-name=2"],
        ["snapshot-name=Monday"],
        ["snapshot-id=1", "snapshot-name=tuesday"],
        ["snapshot.id=1", "snapshot.name=1"],
    ],
    ids="+".join,
)
def test_what_matches_nothing_is_refused_with_a_list(three: Path, keys: list[str]) -> None:
    assert refused(f"file={three}", *keys).endswith("it has 1 'monday', 2 'tuesday', 3 '1'")


# --- Exports without a key ---


def test_every_snapshot_is_an_export(three: Path) -> None:
    with serve(file=three) as server:
        assert list(listed(server)) == ["monday", "tuesday", "3"]
        assert [opened(server, x) for x in ("monday", "tuesday", "3", "1", "2")] == [1, 2, 3, 1, 2]


def test_the_list_describes_them(three: Path) -> None:
    with serve(file=three) as server:
        tuesday = listed(server)["tuesday"]
    taken = qemu.info(three)["snapshots"][1]
    date = qemu.run("date", "-d", f"@{taken['date-sec']}", "+%F %T").strip()
    assert tuesday["description"] == f"2, {date}, 64 KiB, 0 B"
    assert tuesday["export-size"] == K64
    assert tuesday["is_read_only"] is True


def test_an_unknown_export_is_refused_and_the_log_lists_them(three: Path) -> None:
    with serve(file=three) as server:
        assert opened(server, "wednesday") is None
        line = server.log.splitlines()[0]
        assert "there is no export 'wednesday': did you mean 'tuesday'? " in line
        assert line.endswith("it has 1 'monday', 2 'tuesday', 3 '1'")
        assert opened(server, "monday") == 1


def test_the_default_export_is_refused_while_there_are_several(three: Path) -> None:
    with serve(file=three) as server:
        assert opened(server) is None
        line = server.log.splitlines()[0]
        assert "there is no default export" in line
        assert "1 'monday', 2 'tuesday', 3 '1'" in line


def test_the_default_export_is_the_only_snapshot(tmp_path: Path) -> None:
    with serve(file=image(tmp_path / "disk.qcow2", "only")) as server:
        assert list(listed(server)) == ["only"]
        assert opened(server) == 1


def test_an_image_without_snapshots_is_served_empty(tmp_path: Path) -> None:
    with serve(file=image(tmp_path / "disk.qcow2")) as server:
        assert opened(server) is None
        assert "it has none" in server.log


NAMING: list[tuple[str, list[str], dict[str, bytes], list[str]]] = [
    ("empty", ["a", "b"], {"b": b""}, ["a", "2"]),
    ("twice", ["a", "a", "b"], {}, ["1", "2", "b"]),
    ("another's ID", ["2", "b"], {}, ["1", "b"]),
    ("its own ID", ["1", "b"], {}, ["1", "b"]),
    ("not UTF-8", ["a", "b"], {"a": b"na\xefve"}, ["1", "b"]),
    ("with a NUL", ["a", "b"], {"a": b"a\0b"}, ["1", "b"]),
    ("4096 bytes", ["a", "b"], {"a": b"x" * 4096}, ["x" * 4096, "b"]),
    ("4097 bytes", ["a", "b"], {"a": b"x" * 4097}, ["1", "b"]),
    ("4096 characters, more bytes", ["a", "b"], {"a": "é".encode() * 2049}, ["1", "b"]),
    ("UTF-8", ["näv/é %s\t'\"", "b"], {}, ["näv/é %s\t'\"", "b"]),
]


@pytest.mark.parametrize(("why", "names", "new", "exports"), NAMING, ids=[n[0] for n in NAMING])
def test_a_name_that_is_no_good_gives_way_to_the_id(
    tmp_path: Path, why: str, names: list[str], new: dict[str, bytes], exports: list[str]
) -> None:
    path = image(tmp_path / "disk.qcow2", *names)
    if new:
        damage.rename(path, new)
    with serve(file=path) as server:
        assert list(listed(server)) == exports
        for number, export in enumerate(exports, 1):
            assert opened(server, export) == number
            assert opened(server, str(number)) == number or str(number) in exports


def test_an_export_name_that_is_not_utf8_is_refused_in_one_line(three: Path) -> None:
    with serve(file=three) as server:
        asked = "nbd+unix:///na%efve?socket=" + str(server.socket)
        assert subprocess.run(["nbdinfo", asked], capture_output=True, check=False).returncode
        assert "not UTF-8" in server.log
        assert "Traceback" not in server.log
        assert opened(server, "monday") == 1


# --- Exports with a key ---


def test_only_the_chosen_one_is_served(three: Path) -> None:
    with serve(file=three, snapshot="tuesday") as server:
        assert list(listed(server)) == ["tuesday"]
        assert [opened(server, x) for x in ("", "tuesday", "2")] == [2, 2, 2]
        assert [opened(server, x) for x in ("monday", "1", "3", "tuesday/vmstate")] == [None] * 4


def test_a_chosen_one_is_fixed_by_more_than_its_name_and_id(tmp_path: Path) -> None:
    path = image(tmp_path / "disk.qcow2", "a", "nightly")
    with serve(file=path, snapshot="nightly") as server:
        assert opened(server) == 2
        qemu.delete(path, "nightly")
        qemu.take(path, "nightly")
        assert qemu.info(path)["snapshots"][1]["id"] == "2"
        assert [opened(server, x) for x in ("", "nightly", "2")] == [None] * 3
        assert "was deleted" in server.log


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("l1_table_offset", True),
        ("l1_size", True),
        ("date_sec", True),
        ("date_nsec", True),
        ("vm_clock_nsec", True),
        ("name", True),
        ("icount", False),  # extra data, which QEMU adds to old entries
    ],
)
def test_any_part_of_its_identity_makes_it_another_snapshot(
    tmp_path: Path, field: str, other: bool
) -> None:
    path = image(tmp_path / "disk.qcow2", "nightly", "nightly2")
    at = qemu.snapshots(path)["nightly"].entry_offset + damage.SNAPSHOT_FIELDS[field]
    with serve(file=path, snapshot="nightly") as server:
        assert opened(server) == 1
        last = qemu.peek(path, at, 1)[0]
        qemu.patch(path, at, bytes([last ^ 1]))
        assert opened(server) == (None if other else 1)
        qemu.patch(path, at, bytes([last]))


def test_without_a_key_new_snapshots_appear_and_old_ones_go(three: Path) -> None:
    with serve(file=three) as server:
        qemu.delete(three, "monday")
        qemu.io(three, "write -P 4 0 64k")
        qemu.take(three, "wednesday")
        assert list(listed(server)) == ["tuesday", "1", "wednesday"]
        assert [opened(server, x) for x in ("monday", "1", "wednesday")] == [None, 3, 4]
