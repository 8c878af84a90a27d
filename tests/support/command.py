"""The command ``qcow2snap``, run as its users run it."""

from __future__ import annotations

import subprocess
import sys

from support.server import ROOT


def line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "qcow2snap_core", *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start it; whoever calls ends it."""
    return subprocess.Popen(
        line(*arguments),
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*arguments: object) -> str:
    """What it prints when all goes well; then it says nothing on standard error."""
    with start(*arguments) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), f"{arguments}: {err}"
    return out


def refused(*arguments: object, status: int = 1) -> str:
    """The one line that it prints when it fails."""
    with start(*arguments) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert err.count("\n") == 1, err
    return err.removeprefix("qcow2snap: ").rstrip("\n")
