"""``qcow2snap copy`` to standard output and FIFOs: all bytes in order, or an exit status of 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import command, damage, qemu
from support.qemu import MiB
from support.running import eventually
from support.server import ROOT

SIZE = 24 * MiB + 512
COMMAND = [sys.executable, "-m", "qcow2snap_core", "copy"]
ENVIRONMENT = {**os.environ, "Q": " ".join(COMMAND), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random content, compressed clusters and holes, larger than any pipe."""
    path = tmp_path_factory.mktemp("copy") / "disk.qcow2"
    qemu.RandomImage(path, seed=8, size=SIZE, compressed=True).make(["s"], 60)
    return path


def shell(line: str, *arguments: object, status: int = 0) -> tuple[bytes, str]:
    """What a shell command prints, and the lines on standard error; $Q is our command."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *map(str, arguments)],
        capture_output=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr.decode()


WAYS = {
    "a pipe": "$Q $1 s - | cat",
    "a pipe by its device": "$Q $1 s /dev/stdout | cat",
    "a file": '$Q $1 s - >"$2/out" && cat "$2/out"',
    "a file, its end": '$Q $1 s - >>"$2/out" && cat "$2/out"',
    "a file by its device": '$Q $1 s /dev/stdout >"$2/out" && cat "$2/out"',
    "a FIFO": 'mkfifo "$2/fifo" && { $Q $1 s "$2/fifo" >&2 & } && cat "$2/fifo" && wait $!',
    "another process": "{ $Q $1 s >(cat >&3) >/dev/null; } 3>&1 | cat",
}


@pytest.mark.parametrize("line", WAYS.values(), ids=WAYS.keys())
def test_all_bytes_in_order(image: Path, tmp_path: Path, line: str) -> None:
    out, said = shell(line, image, tmp_path)
    assert out == qemu.snapshot_content(image, "s")
    assert said == "" or line == WAYS["a FIFO"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("$Q $1 s - >&-", "standard output is closed: redirect it to a file or a program"),
        ("$Q $1 s - >/dev/full", "writing to 'standard output' failed: no space left on device"),
        (
            "$Q $1 s - 1<>$1",
            "'standard output' is '$1', which is being copied: give another target",
        ),
        ("$Q $1 --since s s -", "standard output holds nothing to update: leave out --since"),
        ("$Q $1 --format qcow2 s - | cat", "is no file: only a file can be written as qcow2"),
    ],
)
def test_what_cannot_be_is_one_line(image: Path, tmp_path: Path, line: str, expected: str) -> None:
    before = image.read_bytes()
    out, said = shell(f"cd {tmp_path}; {line}", image, status=1)
    assert said.startswith("qcow2snap: ")
    assert said.endswith(f"{expected.replace('$1', str(image))}\n")
    assert said.count("\n") == 1
    assert not out
    assert image.read_bytes() == before


def test_nothing_is_said_of_a_reader_who_has_enough(image: Path) -> None:
    _, said = shell('$Q $1 s - | head -c 1 >/dev/null; exit "${PIPESTATUS[0]}"', image, status=1)
    assert said == ""


def test_nor_by_restore(image: Path, tmp_path: Path) -> None:
    command.qcow2snap("backup", image, tmp_path / "backups")
    restore = '${Q%copy}restore --snapshot s "$1" -'
    line = f'{restore} | head -c 1 >/dev/null; exit "${{PIPESTATUS[0]}}"'
    _, said = shell(line, tmp_path / "backups", status=1)
    assert said == ""


def test_a_reader_of_a_fifo_who_goes_away_is_one_line(image: Path, tmp_path: Path) -> None:
    line = 'cd "$2"; mkfifo f; head -c 1 f >/dev/null & exec $Q $1 s f'
    _, said = shell(line, image, tmp_path, status=1)
    assert said == "qcow2snap: writing to 'f' failed: broken pipe\n"


def test_damage_ends_the_stream_where_it_is(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.io(path, "write -P 1 0 9M", "write -c -P 2 10M 64k", "write -P 3 11M 1M")
    qemu.take(path, "s")
    qemu.patch(path, damage.stream(path, "s", 10 * MiB)[0], b"\xff" * 16)
    out, said = shell("$Q $1 s -", path, status=1)
    assert f"guest offset {10 * MiB:#x}" in said
    assert said.count("\n") == 1
    assert out == (b"\1" * 9 * MiB + bytes(MiB))[: len(out)]
    assert len(out) >= 9 * MiB


def test_a_snapshot_that_is_deleted_meanwhile_ends_the_stream(tmp_path: Path) -> None:
    """Whoever reads slowly gets none of what the guest has put in its clusters."""
    path, fifo = qemu.create(tmp_path / "disk.qcow2", 64 * MiB), tmp_path / "fifo"
    qemu.io(path, "write -P 1 0 64M")
    qemu.take(path, "s")
    os.mkfifo(fifo)
    with (
        subprocess.Popen(
            [*COMMAND, str(path), "s", str(fifo)],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        open(fifo, "rb") as reader,
    ):
        first = reader.read(1)
        qemu.delete(path, "s")
        qemu.io(path, "write -P 9 0 64M")
        content = first + reader.read()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was deleted" in said
    assert said.count("\n") == 1
    assert content == b"\1" * len(content)
    assert len(content) < 64 * MiB


@pytest.mark.parametrize("reads", [False, True], ids=["no reader", "a reader who does not read"])
def test_an_interrupt_is_heard_while_it_waits(image: Path, tmp_path: Path, reads: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) if reads else None
    with subprocess.Popen([*COMMAND, str(image), "s", str(fifo)], env=ENVIRONMENT) as process:
        status = Path(f"/proc/{process.pid}/status")
        # It defers SIGINT as long as it works.
        eventually(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << 14)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    if reader is not None:
        os.close(reader)


def test_a_copy_to_elsewhere_only_reports_and_needs_no_standard_output(
    image: Path, tmp_path: Path
) -> None:
    shell('$Q "$1" s "$2/out" >&-', image, tmp_path)


def test_a_terminal_is_refused(image: Path) -> None:
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, str(image), "s", "-"],
            env=ENVIRONMENT,
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 1
    assert b"standard output is a terminal: redirect it" in done.stderr
