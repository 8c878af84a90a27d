"""A part is removed by whoever clears up after its writer was killed, and never before.

What the commands leave when they are killed is in tests/e2e/test_killed.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support import command, qemu
from support.running import eventually
from support.server import ROOT

from qcow2snap_core.errors import UsageError
from qcow2snap_core.transfer.outputs import output

KINDS = [False, True]  # a file, a directory
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

# Makes an output, says its temporary name, and waits for a line before it is done.
WRITER = """
import os, sys
from qcow2snap_core.transfer.outputs import output
os.umask(0)
with output(sys.argv[1], sys.argv[2] == "True") as part:
    with open(os.path.join(part, "x") if sys.argv[2] == "True" else part, "w") as f:
        f.write("whole")
    print(part, flush=True)
    sys.stdin.readline()
"""

# Makes outputs, one after the other, as fast as it can, and looks at each.
MANY = """
import os, sys
from qcow2snap_core.transfer.outputs import output
for n in range(200):
    name = f"{sys.argv[1]}-{n}"
    with output(name, n % 2) as part:
        with open(os.path.join(part, "x") if n % 2 else part, "w") as f:
            f.write(name)
    assert open(os.path.join(name, "x") if n % 2 else name).read() == name
"""

CLEARER = """
import sys
from qcow2snap_core.transfer.outputs import clear
while True:
    clear(sys.argv[1])
"""


@contextmanager
def writer(
    path: Path, is_directory: bool, *before: str
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has begun an output, and the part that it writes."""
    words = [*before, sys.executable, "-c", WRITER, str(path), str(is_directory)]
    with subprocess.Popen(
        words, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            part = process.stdout.readline().strip()
            if not part and before:
                pytest.skip(f"{before[0]} does not work here")
            yield process, Path(part)
        finally:
            process.kill()


def whole(path: Path) -> bool:
    file = path / "x" if path.is_dir() else path
    return file.read_text() == "whole"


@pytest.mark.parametrize("is_directory", KINDS)
def test_a_part_is_there_until_it_is_renamed(tmp_path: Path, is_directory: bool) -> None:
    out = tmp_path / "out"
    with output(str(out), is_directory) as part:
        assert os.listdir(tmp_path) == [os.path.basename(part)]
        assert os.path.isdir(part) is is_directory
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(RuntimeError), output(str(out), is_directory):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("is_directory", KINDS)
def test_a_part_lives_as_long_as_its_writer(tmp_path: Path, is_directory: bool) -> None:
    with writer(tmp_path / "out", is_directory) as (process, part):
        with output(str(tmp_path / "other"), replace=True):
            assert part.exists()
        process.communicate("go on\n", timeout=60)
        assert process.returncode == 0
    assert whole(tmp_path / "out")
    with writer(tmp_path / "out2", is_directory) as (process, part):
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert part.exists()
        with output(str(tmp_path / "other"), replace=True):
            assert not part.exists()
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


@pytest.mark.parametrize("is_directory", KINDS)
def test_a_writer_in_another_container_is_seen(tmp_path: Path, is_directory: bool) -> None:
    """Its process has no number here, or another's."""
    apart = "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"
    with writer(tmp_path / "out", is_directory, *apart) as (process, part):
        with output(str(tmp_path / "other"), replace=True):
            assert part.exists()
        process.communicate("go on\n", timeout=60)
    assert whole(tmp_path / "out")
    with writer(tmp_path / "out2", is_directory, *apart) as (process, part):
        process.kill()
        process.wait(60)

        def cleared() -> bool:  # what was in there ends a moment after unshare
            with output(str(tmp_path / "other"), replace=True):
                return not part.exists()

        eventually(cleared)


@pytest.mark.parametrize("locked", ["the lock", "the mode"])
@pytest.mark.parametrize("is_directory", KINDS)
def test_another_users_part_is_left_where_proc_hides_processes(
    is_directory: bool, locked: str
) -> None:
    """As with ``hidepid=2``: by its lock, also where its mode and directory would let one."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        image = qemu.create(directory / "disk.qcow2", 1 << 20)
        qemu.take(image, "s")
        image.chmod(0o644)
        with writer(directory / "out", is_directory) as (process, part):
            part.chmod(0o777 if locked == "the lock" else 0o700)
            words = ["copy", image, "s", directory / "theirs"]
            hidden = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
            done = command.as_nobody(*words, before=("unshare", "-m", "sh", "-c", hidden, "sh"))
            if "mount" in done.stderr or "unshare" in done.stderr:
                pytest.skip("a process may not mount here")
            assert done.returncode == 0, done
            assert (directory / "theirs").exists()
            assert part.exists()
            process.communicate("go on\n", timeout=60)
        assert whole(directory / "out")


def test_many_that_write_and_clear_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    clearers = [
        subprocess.Popen([sys.executable, "-c", CLEARER, tmp_path], env=ENV) for _ in range(2)
    ]
    try:
        writers = [
            subprocess.Popen([sys.executable, "-c", MANY, tmp_path / str(n)], env=ENV)
            for n in range(3)
        ]
        assert [process.wait(120) for process in writers] == [0, 0, 0]
    finally:
        for process in clearers:
            process.kill()
            process.wait(60)
    assert len(os.listdir(tmp_path)) == 3 * 200


def test_what_only_looks_like_a_part_is_left(tmp_path: Path) -> None:
    with output(str(tmp_path / "out")) as part:
        name = os.path.basename(part)
    mine = name.rpartition("-")[0]
    (tmp_path / "kept").write_text("kept")
    others = [f"{mine}-0.part", f"{name}.part", f".qcow2snap-01234567-{'0' * 16}.part"]
    for other in others:
        (tmp_path / other).touch()
    link, fifo = f"{mine}-{'1' * 16}.part", f"{mine}-{'2' * 16}.part"
    (tmp_path / link).symlink_to("kept")
    os.mkfifo(tmp_path / fifo)
    dead = tmp_path / f"{mine}-{'3' * 16}.part"
    dead.touch()
    with output(str(tmp_path / "out"), replace=True):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(["out", "kept", link, fifo, *others])


def test_what_somebody_else_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="was made by somebody else meanwhile"):  # noqa: SIM117
        with output(str(out)):
            out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("is_directory", KINDS)
def test_what_is_replaced_is_there_until_then(tmp_path: Path, is_directory: bool) -> None:
    out = tmp_path / "out"
    old = out / "old.qcow2" if is_directory else out
    if is_directory:
        out.mkdir()
    old.write_text("old")
    with output(str(out), is_directory, replace=True) as part:
        (Path(part, "new") if is_directory else Path(part)).write_text("new")
        assert old.read_text() == "old"
    assert (out / "new" if is_directory else out).read_text() == "new"
    assert not is_directory or os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_put_into_a_directory_meanwhile_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.qcow2").write_text("old")
    with pytest.raises(UsageError, match="since 'notes' in it is no overlay"):  # noqa: PT012, SIM117
        with output(str(out), is_directory=True, replace=True) as part:
            Path(part, "new.qcow2").write_text("new")
            (out / "notes").write_text("theirs")
    assert sorted(os.listdir(out)) == ["notes", "old.qcow2"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_directory_is_removed_when_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.qcow2").write_text("old")
    done: list[str] = []
    synced, removed = os.fsync, os.unlink

    def fsync(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        synced(fd)

    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        done.append(path)
        removed(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "unlink", unlink)
    with output(str(out), is_directory=True, replace=True):
        done.clear()
    assert str(tmp_path) in done[: done.index("old.qcow2")]


def test_a_directory_in_which_nothing_can_be_made_is_one_line() -> None:
    refused = pytest.raises(UsageError, match="cannot write into the directory '/proc': ")
    with refused, output("/proc/out"):
        pass
