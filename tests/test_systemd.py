"""systemd takes the units, they leave little open, and what they run serves a socket of systemd."""

from __future__ import annotations

import select
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.running import eventually
from support.server import ROOT

UNITS = ROOT / "packaging" / "systemd"
NAME = "nbdkit-qcow2snap@"
MOST_EXPOSED = 15  # tenths of the figure that systemd gives, of 10.0 at the most


def needs(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"not here: {program}")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as installed, with a command that is there."""
    command = tmp_path / "qcow2snap"
    python = f"PYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} -m qcow2snap_core"
    command.write_text(f'#!/bin/sh\n{python} "$@"\n')
    command.chmod(0o755)
    for file in UNITS.iterdir():
        text = file.read_text().replace("@COMMAND@", str(command))
        (tmp_path / file.name).write_text(text)
    return tmp_path


def systemd_analyze(*arguments: object) -> str:
    """What it says, which it says to stderr as well; it must succeed."""
    needs("systemd-analyze")
    line = ["systemd-analyze", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["socket", "service"])
def test_systemd_understands_every_line(units: Path, kind: str) -> None:
    said = systemd_analyze("verify", "--man=no", units / f"{NAME}.{kind}")
    assert NAME not in said, said


def test_little_is_left_open(units: Path) -> None:
    systemd_analyze(
        "security", "--offline=true", f"--threshold={MOST_EXPOSED}", units / f"{NAME}.service"
    )


def words(service: Path, **environment: str) -> list[str]:
    """ExecStart as systemd makes a command line of it: ${A} is one word, $A as many as it has."""
    [line] = [x for x in service.read_text().splitlines() if x.startswith("ExecStart=")]
    found = []
    for word in line.removeprefix("ExecStart=").split():
        if word.startswith("${"):
            found.append(environment[word[2:-1]])
        elif word.startswith("$"):
            found += shlex.split(environment.get(word[1:], ""))
        else:
            found.append(word)
    return found


@pytest.mark.parametrize("options", ["", "snapshot=nightly --filter=log logfile=/dev/stderr"])
def test_what_the_service_runs_serves_the_socket_of_systemd(
    units: Path, tmp_path: Path, options: str
) -> None:
    needs("systemd-socket-activate")
    image = qemu.create(tmp_path / "a disk.qcow2", 1 << 20)
    qemu.take(image, "nightly")
    socket = tmp_path / "nbd.sock"
    line = words(units / f"{NAME}.service", FILE=str(image), OPTIONS=options)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(["systemd-socket-activate", "-l", socket, *line], stderr=log)
    try:
        # The socket is there a moment before anybody listens.
        eventually(lambda: b"Listening on" in (tmp_path / "log").read_bytes())
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///nightly?socket={socket}")
        assert client.get_size() == 1 << 20
        assert client.pread(1, 0) == b"\0"
        client.shutdown()
        assert process.poll() is None  # it goes on for the next one
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert ("Read id=" in (tmp_path / "log").read_text()) == bool(options)


def test_a_client_that_stays_does_not_keep_the_service(units: Path, tmp_path: Path) -> None:
    """nbdkit waits for one that does not read; where it does not any more, the limit can go."""
    assert "TimeoutStopSec=10" in (units / f"{NAME}.service").read_text().splitlines()
    image = qemu.create(tmp_path / "disk.qcow2", 1 << 20)
    qemu.take(image, "nightly")
    socket, listens = tmp_path / "nbd.sock", tmp_path / "pid"
    line = words(units / f"{NAME}.service", FILE=str(image))
    process = subprocess.Popen([*line, "-U", socket, "-P", listens])
    try:
        eventually(listens.exists)
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///nightly?socket={socket}")
        client.aio_pread(nbd.Buffer(1 << 20), 0)  # more than the socket takes
        select.select([client.aio_get_fd()], [], [])
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        del client
        assert process.wait(60) == 0
    finally:
        process.kill()
