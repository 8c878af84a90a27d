"""The command qcow2snap, run as users run it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from typing import Any

import pytest

from qcow2snap_core import cli
from support.server import ROOT


def qcow2snap(*arguments: object, status: int = 0) -> str:
    """What it prints; it must end with that status, and say nothing else when that is 0."""
    done = run(*arguments)
    assert done.returncode == status, (arguments, done)
    assert status or not done.stderr, done.stderr
    return done.stdout


def qcow2snap_json(*arguments: object, status: int = 0) -> list[dict[str, Any]]:
    """What it prints with --json."""
    found: list[dict[str, Any]] = json.loads(qcow2snap(*arguments, "--json", status=status))
    return found


def fails(*arguments: object) -> str:
    """The one line with which it fails."""
    done = run(*arguments)
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    return line


def here(*arguments: object, status: int = 0) -> str:
    """The same as :func:`qcow2snap` in this process, which a tenth of a second is saved by; what it
    says on standard error follows what it prints where the status is another than 0."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = cli.main([str(argument) for argument in arguments])
    assert found == status, (arguments, found, out.getvalue(), err.getvalue())
    assert status or not err.getvalue(), err.getvalue()
    return out.getvalue() + err.getvalue()


def fails_here(*arguments: object) -> str:
    """The same as :func:`fails` in this process."""
    (line,) = here(*arguments, status=1).splitlines()
    return line


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def as_nobody(*arguments: object, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run by a user who may do nothing, ``before`` by root; skips the test where that cannot be."""
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    if subprocess.run([*NOBODY, "test", "-r", ROOT / "qcow2snap_core"], check=False).returncode:
        pytest.skip("others cannot read this checkout")
    return subprocess.run(
        [*before, *NOBODY, sys.executable, "-m", "qcow2snap_core", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


def run(*arguments: object, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qcow2snap_core", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="surrogateescape",
        timeout=120,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


def terminal(columns: int = 80) -> tuple[int, int]:
    """Its two ends, ours and the program's.  tqdm 4.70 draws nothing where it has no columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    return ours, theirs


def on_terminal(*arguments: object, columns: int = 80) -> list[str]:
    """The lines that it shows on a terminal of that width."""
    into, out = terminal(columns)
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    line = [sys.executable, "-m", "qcow2snap_core", *map(str, arguments)]
    with subprocess.Popen(
        line, stdin=out, stdout=out, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    ) as process:
        os.close(out)
        shown = b""
        while True:
            try:
                shown += os.read(into, 1 << 16)
            except OSError:  # the other end is closed
                break
    os.close(into)
    assert process.returncode == 0
    return shown.decode().splitlines()
