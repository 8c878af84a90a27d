"""prune: what is told, and what QEMU has deleted afterwards, quiet or running.

The policy itself is tests/tables/test_keep.py's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support import damage, live, qemu, running, secret
from support.command import as_nobody, fails, on_terminal, qcow2snap, qcow2snap_json, run
from support.devices import loop_device
from support.false_qemu import Answers, false_qemu
from support.qemu import KiB, MiB
from support.refcounts import allocated, count_table
from support.relay import relayed
from support.remote import remote
from support.tables import Entry, write_table
from support.vm import machine

FIRST = int(datetime(2024, 2, 26, 10).timestamp())  # a Monday
HOUR, DAY = 3600, 86400


def redate(path: Path, dates: dict[str, int]) -> None:
    """Say of snapshots when they were taken, seconds after FIRST."""
    for name, s in qemu.snapshots(path).items():
        if name in dates:
            qemu.patch(path, s.entry_offset + 16, struct.pack(">II", FIRST + dates[name], 0))


@pytest.fixture
def disk(tmp_path: Path, made: Path) -> Path:
    """Ten snapshots in five days, each with an L1 table, an L2 table and a cluster of its own."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(made.read_bytes())
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = qemu.create(tmp_path_factory.mktemp("made") / "disk.qcow2", 4 * MiB)
    dates = {}
    for n in range(10):
        qemu.io(path, f"write -P {n + 1} {n * 64}k 64k", f"write -P {n + 1} 3M 64k")
        name = f"{'morning' if n % 2 == 0 else 'evening'}-{n // 2 + 1}"
        qemu.take(path, name)
        dates[name] = n // 2 * DAY + n % 2 * 8 * HOUR
    redate(path, dates)
    return path


def names(path: Path) -> list[str]:
    return [s["name"] for s in qemu.info(path).get("snapshots", [])]


def refused(*arguments: object) -> str:
    """The one line with which it fails, before anything is told of what is deleted."""
    done = run("prune", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def would(*arguments: object) -> tuple[str, str]:
    """What a dry run prints, and the line with which the real one would fail."""
    done = run("prune", *arguments, "--dry-run")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    before = "qcow2snap: without --dry-run this would fail: "
    assert line.startswith(before)
    return done.stdout, line.replace(before, "qcow2snap: ")


NEWEST = ["evening-4", "morning-5", "evening-5"]
EVENINGS = [f"evening-{n}" for n in range(1, 6)]

TOLD = """\
keep 3 snapshots:
ID  TAG        DATE                 REASONS
6   evening-3  2024-02-28 18:00:00  daily snapshot
8   evening-4  2024-02-29 18:00:00  daily snapshot
                                    monthly snapshot
10  evening-5  2024-03-01 18:00:00  last snapshot
                                    daily snapshot
                                    monthly snapshot
{} 7 snapshots, which frees 1.31 MiB:
ID  TAG        DATE
1   morning-1  2024-02-26 10:00:00
2   evening-1  2024-02-26 18:00:00
3   morning-2  2024-02-27 10:00:00
4   evening-2  2024-02-27 18:00:00
5   morning-3  2024-02-28 10:00:00
7   morning-4  2024-02-29 10:00:00
9   morning-5  2024-03-01 10:00:00
"""
RULES = ("--keep-daily", "3", "--keep-monthly", "2", "--keep-last", "1")


def test_what_would_be_done_is_told(disk: Path) -> None:
    before = disk.read_bytes()
    assert qcow2snap("prune", disk, *RULES, "--dry-run") == TOLD.format("would delete")
    assert disk.read_bytes() == before
    [found] = qcow2snap_json("prune", disk, *RULES, "--dry-run")
    assert disk.read_bytes() == before
    assert [s["id"] for s in found["delete"]] == ["1", "2", "3", "4", "5", "7", "9"]
    assert found["keep"][1] == {
        "id": "8",
        "name": "evening-4",
        "date-sec": FIRST + 3 * DAY + 8 * HOUR,
        "date-nsec": 0,
        "reasons": ["daily snapshot", "monthly snapshot"],
    }
    assert (found["freed-size"], found["deleted"]) == (7 * 3 * 64 * KiB, False)
    assert not any(s["deleted"] for s in found["delete"])
    assert found["freed-disk-size"] + found["freed-vm-state-size"] == found["freed-size"]


def test_what_was_told_is_done_and_the_others_are_as_they_were(disk: Path) -> None:
    kept = {name: qemu.content(disk, name) for name in EVENINGS[2:]}
    active = qemu.content(disk)
    identities = {s.identity for name, s in qemu.snapshots(disk).items() if name in kept}
    clusters = allocated(disk)
    assert qcow2snap("prune", disk, *RULES) == TOLD.format("delete")
    assert names(disk) == list(kept)
    assert {s.identity for s in qemu.snapshots(disk).values()} == identities
    assert {name: qemu.content(disk, name) for name in kept} == kept
    assert qemu.content(disk) == active
    assert clusters - allocated(disk) == 7 * 3 * 64 * KiB
    qemu.run("qemu-img", "check", "-q", disk)
    said = qcow2snap("prune", disk, *RULES)
    assert said.endswith("there is nothing to delete\n")
    [found] = qcow2snap_json("prune", disk, *RULES)
    assert (found["delete"], found["freed-size"], found["deleted"]) == ([], 0, False)


def test_what_has_another_name_is_left_alone(disk: Path) -> None:
    said = qcow2snap("prune", disk, "--keep-last", "1", "--match", "morn*", "--match", "*-[45]")
    assert "evening-1" not in said
    assert names(disk) == [*EVENINGS[:3], "evening-5"]


def test_within_a_duration_and_without_a_limit(disk: Path) -> None:
    qcow2snap("prune", disk, "--keep-within", "2d", "--keep-weekly", "unlimited")
    assert names(disk) == ["morning-1", "morning-4", *NEWEST]


def test_names_fit_the_terminal(disk: Path) -> None:
    qemu.take(disk, "n" * 200)
    lines = on_terminal("prune", disk, "--keep-last", "1", "--dry-run", columns=60)
    assert max(map(len, lines)) <= 60
    assert any(re.search(r"nnn… +20\d\d-.* last snapshot", line) for line in lines)


WRONG = {
    "no rule": ((), 2, "no rule keeps anything"),
    "rules that keep nothing": (("--keep-last", "0"), 2, "no rule keeps anything"),
    "a pattern alone": (("--match", "*"), 2, "no rule keeps anything"),
    "no number": (("--keep-last", "all"), 2, "give a whole number"),
    "a negative number": (("--keep-last", "-2"), 2, "give a whole number"),
    "no duration": (("--keep-within", "2w"), 2, "give years, months, days and hours"),
    "a socket alone": (("--keep-last", "1", "--qmp", "x"), 2, "go together"),
    "a device alone": (("--keep-last", "1", "--device", "x"), 2, "go together"),
    "a passphrase for nothing": (
        ("--keep-last", "1", "--passphrase", "x"),
        1,
        "is not encrypted: leave out the passphrase",
    ),
    "a passphrase for a QEMU": (
        ("--keep-last", "1", "--passphrase", "x", "--qmp", "x", "--device", "d"),
        2,
        "the running QEMU has it",
    ),
    "no socket": (
        ("--keep-last", "1", "--qmp", "/x", "--device", "d"),
        1,
        "cannot connect to '/x'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_deletes_nothing(disk: Path, case: str) -> None:
    words, status, said = WRONG[case]
    before = disk.read_bytes()
    done = run("prune", disk, *words)
    assert done.stdout == "", "what is told of a deletion is done"
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert disk.read_bytes() == before


# --- Which snapshot is meant ---


ODD = ["1", "two words", "-x", "c,d=e", "", "a\nb", "nbd:x", "ünïcode", "json:{", "last"]


def test_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "a:b, c").mkdir()
    path = qemu.create(tmp_path / "a:b, c" / "d=e,,.qcow2", MiB)
    for name in ODD:
        qemu.run("qemu-img", "snapshot", "-c", name, path)
    damage.rename(path, {"two words": b"not UTF-8: \xff"})
    count_table(path)
    qcow2snap("prune", path, "--keep-last", "1")
    assert names(path) == ["last"]


def test_of_several_with_one_name_the_right_ones_go(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for n in range(4):
        qemu.io(path, f"write -P {n + 1} 0 64k")
        qemu.take(path, "nightly")
    expected = qemu.content(path, "4", by="id")
    qcow2snap("prune", path, "--keep-last", "1")
    assert [s["id"] for s in qemu.info(path)["snapshots"]] == ["4"]
    assert qemu.content(path, "nightly") == expected


def ambiguous(path: Path, case: str) -> Path:
    """An image in which a name does not mean what is to be deleted."""
    qemu.create(path, MiB)
    # The first one is not the oldest, and so is kept; its ID is 1.
    for name in ("nightly", "1", "x") if case == "an ID" else ("nightly", "nightly", "x"):
        qemu.take(path, name)
    for (entry, _), date in zip(entries(path), (2 * DAY, 0, 3 * DAY), strict=True):
        qemu.patch(path, entry + 16, struct.pack(">I", FIRST + date))
    return path


def entries(path: Path) -> list[tuple[int, str]]:
    """(offset in the file, ID) of each entry of the snapshot table."""
    at, found = qemu.field64(path, 64), []
    for _ in range(int.from_bytes(qemu.peek(path, 60, 4), "big")):
        entry = damage.table_entry(path, at)
        extra, id_size = int.from_bytes(entry[36:40], "big"), int.from_bytes(entry[12:14], "big")
        found.append((at, entry[40 + extra : 40 + extra + id_size].decode()))
        at += -(-len(entry) // 8) * 8
    return found


def ids(path: Path) -> list[str]:
    return [id_ for _, id_ in entries(path)]


@pytest.mark.parametrize("case", ["an ID", "a name twice"])
def test_where_a_name_means_another_nothing_is_deleted(tmp_path: Path, case: str) -> None:
    path = ambiguous(tmp_path / "disk.qcow2", case)
    before = path.read_bytes()
    said = refused(path, "--keep-last", "2")
    why = "its name is the ID of snapshot 'nightly' (ID 1)" if case == "an ID" else "comes first"
    assert why in said
    assert "(ID 2) cannot be told to QEMU" in said
    assert path.read_bytes() == before
    with live.running(path) as it:  # it takes both
        qcow2snap("prune", path, "--keep-last", "2", "--qmp", it.qmp_socket, "--device", "disk")
    assert ids(path) == ["1", "3"]


SHOWS_AS = {"a": b"a\0zzzz", "a" * 255: b"a" * 256, "2": b"2\0"}


def hidden(path: Path, name: str, what: str = "name") -> Path:
    """An image in which QEMU takes the first snapshot, which is to be kept, for the second: it
    shows the first one's name as ``name``, or its ID."""
    qemu.create(path, MiB)
    for each in ("first", name, "newest"):
        qemu.take(path, each)
    redate(path, {"first": 2 * DAY, name: 0, "newest": 3 * DAY})
    if what == "name":
        damage.rename(path, {"first": SHOWS_AS[name]})
        count_table(path)
        return path
    entry = damage.table_entry(path, qemu.snapshots(path)["first"].entry_offset)
    rest = [damage.table_entry(path, at) for at, _ in entries(path)[1:]]
    first = entry[:12] + struct.pack(">H", len(SHOWS_AS[name])) + entry[14:-6]
    first += SHOWS_AS[name] + b"first"
    packed = [each + bytes(-len(each) % 8) for each in (first, *rest)]
    damage.put_table(path, 3, b"".join(packed))
    count_table(path)
    return path


@pytest.mark.parametrize(("name", "what"), [("a", "name"), ("a" * 255, "name"), ("2", "id")])
def test_a_name_that_qemu_sees_less_of_is_not_taken_for_another(
    tmp_path: Path, name: str, what: str
) -> None:
    path = hidden(tmp_path / "disk.qcow2", name, what)
    before = path.read_bytes()
    why = "comes first" if what == "name" else "its name is the ID of snapshot 'first'"
    assert why in fails("prune", path, "--keep-last", "2")
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["a", "a" * 255])
def test_nor_by_a_running_qemu(tmp_path: Path, name: str) -> None:
    path = hidden(tmp_path / "disk.qcow2", name)
    (first, _), *_ = entries(path)
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(path.read_bytes())
    with live.running(path) as it:
        qcow2snap("prune", path, "--keep-last", "2", "--qmp", it.qmp_socket, "--device", "disk")
    assert ids(path) == ["1", "3"]
    extra = int.from_bytes(qemu.peek(copy, first + 36, 4), "big")
    qemu.patch(copy, first + 40 + extra, b"2")  # now ID and name are one another's
    before = copy.read_bytes()
    with live.running(copy) as it:
        given = ("--qmp", it.qmp_socket, "--device", "disk")
        assert "(ID 2) comes first" in fails("prune", copy, "--keep-last", "2", *given)
    assert copy.read_bytes() == before


@pytest.mark.parametrize("what", ["name", "id"])
def test_what_has_a_nul_itself_is_refused(tmp_path: Path, what: str) -> None:
    path = hidden(tmp_path / "disk.qcow2", "2", what)
    (first, _), *_ = entries(path)
    qemu.patch(path, first + 16, struct.pack(">I", FIRST - DAY))
    before = path.read_bytes()
    assert "which reads up to the NUL" in refused(path, "--keep-last", "2")
    assert path.read_bytes() == before
    with live.running(path) as it:
        given = ("--qmp", it.qmp_socket, "--device", "disk")
        assert "which reads up to the NUL" in refused(path, "--keep-last", "2", *given)
    assert path.read_bytes() == before


def test_a_name_that_is_too_long_goes_by_its_id(tmp_path: Path) -> None:
    path = hidden(tmp_path / "disk.qcow2", "a" * 255)
    (first, _), *_ = entries(path)
    qemu.patch(path, first + 16, struct.pack(">I", FIRST - DAY))
    said = fails("prune", path, "--keep-last", "2")
    assert "which keeps only the beginning of its name or ID: a running QEMU can be told" in said
    with live.running(path) as it:
        qcow2snap("prune", path, "--keep-last", "2", "--qmp", it.qmp_socket, "--device", "disk")
    assert ids(path) == ["2", "3"]


# --- With qemu-img ---


@pytest.mark.parametrize("form", ["aes", "luks"])
def test_an_encrypted_image_wants_its_passphrase(tmp_path: Path, form: str) -> None:
    path, secrets = tmp_path / "disk.qcow2", ("open sesame",)
    secret.create(path, MiB, secrets, **{"encrypt.format": form})
    for name in ("one", "two"):
        secret.take(path, secrets, name)
    assert "add --passphrase +FILE" in fails("prune", path, "--keep-last", "1")
    if form == "luks":
        said = fails("prune", path, "--keep-last", "1", "--passphrase", "wrong")
        assert f"Could not open '{path}': Invalid password" in said
        assert "0 of 1 were deleted" in said
    assert len(names_of(path)) == 2
    qcow2snap("prune", path, "--keep-last", "1", "--passphrase", "open sesame")
    assert names_of(path) == ["two"]


ONCE = """\
#!/bin/sh
mkdir {folder}/once 2>/dev/null && exec {qemu_img} "$@"
echo 'no more' >&2
exit 1
"""


def test_what_was_deleted_before_an_error_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("one", "two", "three"):
        qemu.take(path, name)
    script = tmp_path / "qemu-img"
    script.write_text(ONCE.format(folder=tmp_path, qemu_img=shutil.which("qemu-img")))
    script.chmod(0o755)
    line = ("prune", path, "--keep-last", "1")
    with monkeypatch.context() as m:
        m.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        done = run(*line, "--json")
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.endswith("deleting snapshot 'two' (ID 2) failed: no more: 1 of 2 were deleted")
    [found] = json.loads(done.stdout)
    assert [(s["name"], s["deleted"]) for s in found["delete"]] == [("one", True), ("two", False)]
    assert found["deleted"] is False
    assert names(path) == ["two", "three"]
    [found] = qcow2snap_json(*line)
    assert [(s["name"], s["deleted"]) for s in found["delete"]] == [("two", True)]
    assert found["deleted"] is True


@pytest.mark.parametrize("what", ["an L2 table", "another's L1 table"])
def test_an_image_with_wrong_refcounts_is_refused(tmp_path: Path, what: str) -> None:
    """Where a cluster is in use and has no refcount, QEMU puts its new snapshot table, and sees
    only then that it must not: it has removed the snapshot, or lost the last one, by then."""
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB)
    for n, name in enumerate(("one", "two", "three")):
        qemu.io(path, f"write -P 1 {n} 64k")
        qemu.take(path, name)
    redate(path, {"one": 0})
    own = damage.l2_table(path, "one", 0)
    cluster = own if what == "an L2 table" else qemu.snapshots(path)["two"].l1_table_offset
    refcounts = qemu.field64(path, qemu.field64(path, 48))
    qemu.patch(path, refcounts + 2 * (cluster // (64 * KiB)), b"\0\0")
    before = path.read_bytes()
    said = fails("prune", path, "--keep-last", "2")
    assert "is damaged, and deleting could lose what is to be kept" in said
    assert path.read_bytes() == before
    done = run("prune", path, "--keep-last", "2", "--dry-run")
    assert done.returncode == 0
    assert "without --dry-run this would fail: " in done.stderr


def names_of(path: Path) -> list[str]:
    return list(qemu.snapshots(path))


def test_what_the_image_names_is_not_opened(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("one", "two"):
        qemu.take(path, name)
    listening = tmp_path / "nbd.sock"
    qemu.run(
        "qemu-img", "rebase", "-u", "-F", "raw", "-b", f"nbd+unix:///?socket={listening}", path
    )
    qcow2snap("prune", path, "--keep-last", "1")
    assert names_of(path) == ["two"]


def test_nor_an_external_data_file(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB, data_file=tmp_path / "data.raw")
    l1_size, l1 = struct.unpack(">IQ", qemu.peek(path, 36, 12))
    size = struct.pack(">QQ", 0, MiB)
    write_table(path, [Entry(b"%d" % n, b"made", l1, l1_size, extra=size) for n in (1, 2)])
    count_table(path)
    before = path.read_bytes()
    assert "has an external data file" in refused(path, "--keep-last", "1")
    assert path.read_bytes() == before


def test_a_block_device(disk: Path, tmp_path: Path) -> None:
    content = disk.read_bytes().ljust(8 * MiB, b"\0")
    with loop_device(tmp_path, content) as device:
        qcow2snap("prune", device, "--keep-last", "2")
        assert names_of(device) == ["morning-5", "evening-5"]


def test_an_image_elsewhere_is_refused(disk: Path) -> None:
    with remote("file", disk) as server:
        assert "is remote: run this where the file is" in refused(server.uri, "--keep-last", "1")
        told, hindered = would(server.uri, "--keep-last", "1")
        assert "would delete 9" in told
        assert "is remote: run this where the file is" in hindered


def test_who_may_not_write_it_deletes_nothing(made: Path) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        disk = Path(folder, "disk.qcow2")
        disk.write_bytes(made.read_bytes())
        disk.chmod(0o644)
        done = as_nobody("prune", disk, "--keep-last", "1")
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        may_not = f"'{disk}' may not be written, as deleting does: run this as a user who may"
        assert line == f"qcow2snap: {may_not}"
        assert len(names(disk)) == 10


def test_a_damaged_image_is_left_alone(disk: Path) -> None:
    damage.put64(disk, damage.l1_entry(disk, "morning-1", 0), damage.END_OF_FILE)
    before = disk.read_bytes()
    assert "is damaged: qcow2snap check tells" in fails("prune", disk, "--keep-last", "1")
    assert disk.read_bytes() == before
    qemu.patch(disk, 60, struct.pack(">I", 70_000))
    assert "the snapshot table is damaged" in fails("prune", disk, "--keep-last", "1")


def test_no_snapshots(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    assert qcow2snap("prune", path, "--keep-last", "1") == "there is nothing to delete\n"


def test_ctrl_c_stops_between_two(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.take(path, "first")
    s = qemu.snapshots(path)["first"]
    for n in range(60):
        qemu.take(path, f"n{n}")
    kept = qemu.content(path, "n59")
    assert s.id == "1"
    with running.started("prune", path, "--keep-last", "1", "--json") as process:
        # The header's count of snapshots: to list them takes as long as some of the deletions.
        running.until(lambda: qemu.field64(path, 60) >> 32 < 60, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, said = process.communicate(timeout=60)
    assert process.returncode == 130
    [line] = said.splitlines()
    deleted = re.fullmatch(r"qcow2snap: stopped: (\d+) of 60 snapshots were deleted", line)
    assert deleted is not None, line
    left = names_of(path)
    assert 1 < len(left) < 60
    assert len(left) == 61 - int(deleted[1])
    assert left[-1] == "n59"
    [found] = json.loads(out)
    assert [s["name"] for s in found["delete"] if not s["deleted"]] == left[:-1]
    qemu.run("qemu-img", "check", "-q", path)
    assert qemu.content(path, "n59") == kept


def test_ctrl_c_that_reaches_qemu_img_too(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its start and its own process group it belongs to ours."""
    before = names(disk)
    wrapper = tmp_path / "bin" / "qemu-img"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\nkill -INT $PPID\nsleep 0.2\nkill -INT $$\n")
    wrapper.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        done = run("prune", disk, *RULES)
    assert done.returncode == 130
    assert re.fullmatch(r"qcow2snap: stopped: 0 of \d snapshots were deleted\n", done.stderr)
    assert names(disk) == before


# --- With a running QEMU ---


def test_a_running_qemu_has_to_do_it(disk: Path) -> None:
    kept = {name: qemu.content(disk, name) for name in EVENINGS[2:]}
    with live.running(disk) as it:
        said = refused(disk, *RULES)
        assert "is in use, a QEMU has it open for writing: add --qmp SOCKET --device NODE" in said
        assert len(names(disk)) == 10
        told, hindered = would(disk, *RULES)
        assert told == TOLD.format("would delete")
        assert hindered == said
        told, hindered = would(disk, *RULES, "--qmp", it.qmp_socket, "--device", "vda")
        assert told == TOLD.format("would delete")
        assert "its qcow2 ones are disk" in hindered
        with it.guest() as guest:
            guest.pwrite(b"new" * 100, 0)
        it.take("now")
        through = ("--qmp", it.qmp_socket, "--device", "disk")
        assert "would delete" in qcow2snap("prune", disk, *RULES, *through, "--dry-run")
        out = qcow2snap("prune", disk, "--match", "*-*", *RULES, *through)
        assert out == TOLD.format("delete")
        with it.guest() as guest:
            assert guest.pread(300, 0) == b"new" * 100
        assert names(disk) == [*EVENINGS[2:], "now"]
    assert {name: qemu.content(disk, name) for name in kept} == kept
    assert qemu.content(disk, "now")[:300] == b"new" * 100
    qemu.run("qemu-img", "check", "-q", disk)


MISSHAPEN: dict[str, tuple[Answers, str]] = {
    "commands": (
        {"query-commands": [{"nom": 1}]},
        "query-commands: the answer cannot be understood, an element of it has no name: ",
    ),
    "device": (
        {"query-commands": [], "query-block": ([], [{"inserted": 1}])},
        "query-block: the answer cannot be understood, an element of it has no device: ",
    ),
    "nodes": (
        {"query-commands": [], "query-block": [], "query-named-block-nodes": ([],)},
        "QEMU has no device 'd': its qcow2 ones are",
    ),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_what_is_no_answer_of_qemu_s_is_one_line(disk: Path, tmp_path: Path, case: str) -> None:
    image = json.loads(qemu.run("qemu-img", "info", "--output=json", disk))
    node = {"node-name": "d", "drv": "qcow2", "image": image}
    odd, why = MISSHAPEN[case]
    replies: Answers = {"qmp_capabilities": {}, "query-block": [], **odd}
    then = odd.get("query-named-block-nodes")
    nodes = ([node], *then) if isinstance(then, tuple) else [node]
    with false_qemu(tmp_path / "qmp", {**replies, "query-named-block-nodes": nodes}):
        said = refused(disk, *RULES, "--qmp", tmp_path / "qmp", "--device", "d")
    assert said.startswith(f"qcow2snap: {why}")
    assert len(names(disk)) == 10


def test_it_has_to_be_the_file_that_qemu_has_open(disk: Path, tmp_path: Path) -> None:
    other = qemu.create(tmp_path / "other.qcow2", MiB)
    for name in ("one", "two"):
        qemu.take(other, name)
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(disk.read_bytes())
    with live.running(disk) as it:
        through = ("--keep-last", "1", "--qmp", it.qmp_socket, "--device")
        assert "'disk' has other snapshots in QEMU than" in refused(other, *through, "disk")
        said = refused(copy, *through, "disk")
        assert f"QEMU has '{disk}' open: '{copy}' is another file" in said
        assert "its qcow2 ones are disk" in refused(disk, *through, "vda")
        assert "is file, not qcow2" in refused(disk, *through, "file")
        assert "given twice" in refused(disk, *through, "disk", "--device", "disk")
    assert len(names(disk)) == len(names(copy)) == 10


def test_a_copy_is_noticed_after_the_first_where_qemu_s_files_cannot_be_seen(
    disk: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(disk.read_bytes())
    with live.running(disk) as it, relayed(tmp_path, it.qmp_socket) as relay:
        it.qmp.execute("query-named-block-nodes")
        disk.rename(tmp_path / "moved.qcow2")  # so that its name does not lead there either
        said = fails("prune", copy, "--keep-last", "1", "--qmp", relay, "--device", "disk")
    assert f"but '{copy}' still has it: is it the file that QEMU has open?" in said
    assert said.endswith("0 of 9 were deleted")
    assert len(names(tmp_path / "moved.qcow2")) == 9
    assert len(names(copy)) == 10


def test_names_that_qmp_cannot_say(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("a", "b", "c"):
        qemu.take(path, name)
    damage.rename(path, {"a": b"not UTF-8: \xff", "b": "ünïcode".encode()})
    count_table(path)
    with live.running(path) as it:
        through = ("--qmp", it.qmp_socket, "--device", "disk")
        qcow2snap("prune", path, "--keep-last", "1", *through)
    assert names(path) == ["c"]


def test_a_machine_and_its_saved_states_on_two_disks(tmp_path: Path) -> None:
    disks = [qemu.create(tmp_path / f"{n}.qcow2", 4 * MiB) for n in "ab"]
    socket = tmp_path / "qmp"
    more = ("-drive", f"if=none,id=second,file={disks[1]},format=qcow2")
    with machine(disks[0], *more, "-qmp", f"unix:{socket},server=on,wait=off") as vm:
        first = next(d for d in vm.qmp("query-block") if d["inserted"]["file"] == str(disks[0]))
        for n in range(3):
            vm.run_a_little()
            vm.save(f"state-{n}")
        vm.qmp("blockdev-snapshot-internal-sync", device="second", name="its own")
        given = ("--keep-last", "1", "--qmp", socket, "--device", first["device"])
        # What is on the first disk alone leaves a state that cannot be loaded; it is asked for.
        [found] = qcow2snap_json("prune", disks[0], *given, "--dry-run")
        assert found["freed-vm-state-size"] > MiB // 2
        out = qcow2snap("prune", disks[0], *given, "--device", "second")
        assert " of it VM state:\n" in out
        assert names(disks[0]) == ["state-2"]
        assert names(disks[1]) == ["state-2", "its own"]
        jobs: list[Any] = vm.qmp("query-jobs")
        assert jobs == [], "nothing is left behind"
        ended = [e for e in vm.events if e.get("data", {}).get("status") == "concluded"]
        assert len(ended) == 2, "a job for each saved machine"
        assert vm.hmp("loadvm state-2") == ""
        assert "No snapshot" not in vm.hmp("info snapshots")
    for disk in disks:
        qemu.run("qemu-img", "check", "-q", disk)


def test_disks_whose_snapshots_are_all_alike(tmp_path: Path) -> None:
    """Two of the three disks of a machine: only one has its state."""
    disks = [qemu.create(tmp_path / f"{n}.qcow2", 4 * MiB) for n in "abc"]
    socket = tmp_path / "qmp"
    more = [f"if=none,id=disk-{d.stem},file={d},format=qcow2" for d in disks[1:]]
    line = [word for drive in more for word in ("-drive", drive)]
    with machine(disks[0], *line, "-qmp", f"unix:{socket},server=on,wait=off") as vm:
        for n in range(2):
            vm.save(f"state-{n}")
        first = next(d for d in vm.qmp("query-block") if d["inserted"]["file"] == str(disks[0]))
        given = [x for d in ("disk-b", "disk-c", first["device"]) for x in ("--device", d)]
        qcow2snap("prune", disks[2], "--keep-last", "1", "--qmp", socket, *given)
        assert [names(disk) for disk in disks] == [["state-1"]] * 3
        assert vm.hmp("loadvm state-1") == ""


def test_another_disk_s_snapshots_must_be_the_same_ones(tmp_path: Path) -> None:
    disks = [qemu.create(tmp_path / f"{n}.qcow2", 4 * MiB) for n in "ab"]
    for disk in disks:
        for name in ("old", "new"):
            qemu.take(disk, name)
    redate(disks[1], {"old": 0})
    socket = tmp_path / "qmp"
    more = ("-drive", f"if=none,id=second,file={disks[1]},format=qcow2")
    with machine(disks[0], *more, "-qmp", f"unix:{socket},server=on,wait=off") as vm:
        device = vm.qmp("query-block")[0]["device"]
        given = ("--keep-last", "1", "--qmp", socket, "--device", device, "--device", "second")
        said = refused(disks[0], *given)
    assert "on device 'second' is of another time than snapshot 'old' (ID 1)" in said
    assert [names(disk) for disk in disks] == [["old", "new"]] * 2
