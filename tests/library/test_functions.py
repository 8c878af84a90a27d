"""The library's functions say and write what the commands do, which are held against QEMU, and are
quiet about it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from support import qemu
from support.command import qcow2snap_json
from support.qemu import MiB
from support.server import ROOT

import qcow2snap_core
from qcow2snap_core import Image, SnapshotGone, UsageError

SIZE = 4 * MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.io(path, "write -P 7 0 1M")
    qemu.take(path, "one")
    qemu.run("qemu-img", "resize", "-q", path, 2 * SIZE)
    qemu.io(path, "write -P 8 1M 64k", "write -z 0 64k", "write -P 9 6M 64k")
    qemu.take(path, "two")
    qemu.io(path, "write -P 9 2M 64k")
    return path


@pytest.fixture
def image(path: Path) -> Iterator[Image]:
    with qcow2snap_core.open(path) as opened:
        yield opened


def test_changes_are_those_of_diff(path: Path, image: Image) -> None:
    disks = {"one": image.open("one"), "two": image.open("two"), "@active": image.active()}
    for (older, old), (newer, new) in product(disks.items(), disks.items()):
        listed = qcow2snap_json("diff", path, older, newer)
        changes = qcow2snap_core.changes(old, new)
        assert [e._asdict() for e in changes] == listed, (older, newer)


def test_exclusive_sizes_are_those_of_list(path: Path, image: Image) -> None:
    listed = [(s["id"], s["exclusive-size"]) for s in qcow2snap_json("list", path)]
    assert [(s.id, size) for s, size in qcow2snap_core.exclusive_sizes(image)] == listed


@pytest.mark.parametrize("name", [None, "one", "two"])
def test_findings_are_those_of_check(path: Path, name: str | None) -> None:
    table = qemu.snapshots(path)["one"].l1_table_offset
    qemu.patch(path, table, b"\xff" * 8)
    with qcow2snap_core.open(path) as image:
        findings = qcow2snap_core.check(image, name)
        if name is not None:
            assert findings == qcow2snap_core.check(image, image.find(name))
    listed = qcow2snap_json("check", path, *([name] if name else []), status=3 if findings else 0)
    assert [(f.problem, f.message, list(f.snapshots)) for f in findings] == [
        (f["problem"], f["message"], f["snapshots"]) for f in listed
    ]
    assert bool(findings) == (name != "two")


@pytest.mark.parametrize("data", [False, True])
def test_nothing_is_said_to_be_whole_of_a_snapshot_that_was_deleted(
    path: Path, image: Image, data: bool
) -> None:
    one = image.find("one")
    qemu.delete(path, "one")
    with pytest.raises(SnapshotGone, match="snapshot 1 'one' .* was deleted"):
        qcow2snap_core.check(image, one, data=data)


def test_check_warns_that_it_did_not_compare_the_refcounts(path: Path) -> None:
    qemu.patch(path, 79, b"\1")  # the dirty bit
    with qcow2snap_core.open(path) as image:
        said: list[str] = []
        assert qcow2snap_core.check(image, warn=said.append) == []
        assert said == [f"'{path}' is marked dirty: its refcounts were not compared"]
        with pytest.warns(UserWarning, match="is marked dirty"):
            qcow2snap_core.check(image)


def test_a_copy_and_its_updates(path: Path, image: Image, tmp_path: Path) -> None:
    target = tmp_path / "out"
    one, two, active = image.open("one"), image.open("two"), image.active()
    done = qcow2snap_core.copy(one, target)
    with pytest.raises(UsageError, match="is there already"):
        qcow2snap_core.copy(two, target)
    assert qcow2snap_core.copy(one, target, replace=True) == done
    assert target.read_bytes() == qemu.snapshot_content(path, "one")
    assert done == (MiB, 3 * MiB)
    for since, new, keywords in (
        (one, two, {}),
        (two, one, {"in_place": True}),
        (one, active, {"base": "compared"}),
        (active, two, {"base": "trusted", "verify": False}),
    ):
        qcow2snap_core.copy(new, target, since=since, **keywords)
        assert target.read_bytes() == new.pread(new.size, 0)
    with pytest.raises(UsageError, match="holds snapshot 'two'"):
        qcow2snap_core.copy(two, target, since=one)


def test_a_file_is_of_the_format_that_is_asked_for_or_that_its_name_says(
    path: Path, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = qemu.snapshot_content(path, "one")
    for name, keywords in {"raw.qcow2": {"format": "raw"}, "-": {}}.items():
        qcow2snap_core.copy(image.open("one"), name, **keywords)
        assert Path(name).read_bytes() == expected
    for name, keywords in {"out": {"format": "qcow2"}, "x.qcow2": {"compress": "zlib"}}.items():
        qcow2snap_core.copy(image.open("one"), name, **keywords)
        assert qemu.content(tmp_path / name) == expected


def test_a_chain_and_back(path: Path, image: Image, tmp_path: Path) -> None:
    files = qcow2snap_core.split(image, tmp_path / "chain", warn=pytest.fail)
    assert files == [str(tmp_path / "chain" / f"{n}.qcow2") for n in ("one", "two", "active")]
    for file, name in zip(files, ("one", "two", None), strict=True):
        expected = qemu.snapshot_content(path, name) if name else qemu.content(path)
        assert qemu.content(Path(file)) == expected
    joined = tmp_path / "joined.qcow2"
    with qcow2snap_core.open(files[-1]) as top:
        assert qcow2snap_core.join(top, joined) == ["one", "two"]
    assert qemu.info(joined)["snapshots"] == qemu.info(path)["snapshots"]
    assert qemu.content(joined) == qemu.content(path)


def test_threads_may_write_at_once(image: Image, tmp_path: Path) -> None:
    """Each starts servers of its own for a qcow2 file."""

    def write(number: int) -> bool:
        qcow2snap_core.copy(image.open("two"), tmp_path / f"copy{number}.qcow2")
        chain = qcow2snap_core.split(image, tmp_path / f"chain{number}")
        with qcow2snap_core.open(chain[-1]) as top:
            return len(qcow2snap_core.join(top, tmp_path / f"joined{number}")) == len(chain) - 1

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(write, range(4)))  # what was written has been compared


def test_a_repository_and_back(path: Path, image: Image, tmp_path: Path) -> None:
    where = tmp_path / "repository"
    files = qcow2snap_core.backup(image, where, warn=pytest.fail)
    assert files == [str(where / name) for name in ("1.qcow2", "2.qcow2")]
    assert qcow2snap_core.backup(image, where, compress="zlib") == []
    assert qcow2snap_core.verify(where) == []
    assert qcow2snap_core.restore(where, tmp_path / "again.qcow2") == ["one", "two"]
    assert qemu.info(tmp_path / "again.qcow2")["snapshots"] == qemu.info(path)["snapshots"]
    with pytest.raises(UsageError, match="is there already"):
        qcow2snap_core.restore(where, tmp_path / "again.qcow2")
    assert qcow2snap_core.restore(where, tmp_path / "raw", snapshot="one") == ["one"]
    assert (tmp_path / "raw").read_bytes() == qemu.snapshot_content(path, "one")
    os.truncate(files[1], 1000)
    [problem] = qcow2snap_core.verify(where)
    assert "has 1000 bytes" in problem
    with pytest.raises(qcow2snap_core.ImageError, match="has 1000 bytes"):
        qcow2snap_core.restore(where, tmp_path / "other.qcow2")
    said: list[str] = []
    other = tmp_path / "other.qcow2"
    assert qcow2snap_core.restore(where, other, skip_damaged=True, warn=said.append) == ["one"]
    assert "is left out: " in said[0]
    with pytest.raises(ValueError, match="goes without snapshot"):
        qcow2snap_core.restore(where, other, snapshot="one", skip_damaged=True)


def test_join_warns_of_what_is_left_out(image: Image, tmp_path: Path) -> None:
    said: list[str] = []
    qcow2snap_core.join(image, tmp_path / "a", warn=said.append)
    assert said == [f"the snapshots inside '{image.path}' are not carried over"]
    with pytest.warns(UserWarning, match="are not carried over"):
        qcow2snap_core.join(image, tmp_path / "b")


def test_no_bar_is_drawn_on_the_terminal_of_a_program(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    program = (
        f"import qcow2snap_core; image = qcow2snap_core.open({str(path)!r}); "
        f"qcow2snap_core.copy(image.open('one'), {str(tmp_path / 'out')!r}); "
        f"qcow2snap_core.split(image, {str(tmp_path / 'chain')!r}); print('done')"
    )
    ours, theirs = pty.openpty()
    try:
        said = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, stderr=theirs)
        assert said == b"done\n"
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            pytest.fail(f"{os.read(ours, 1024)!r}")
    finally:
        os.close(ours)
        os.close(theirs)
