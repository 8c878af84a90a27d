"""The progress bar: on a terminal and nowhere else, and no trouble without tqdm."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.command import terminal
from support.server import ROOT

WORK = """
from qcow2snap_core.util.progress import progress
with progress("copying", 2 << 20) as advance:
    advance(1 << 20)
    advance(1 << 20)
"""
WITHOUT_TQDM = "import sys; sys.modules['tqdm'] = None\n"
SEEN = "import sys\n" + WORK + "assert 'tqdm' not in sys.modules"


def on_a_terminal(code: str) -> str:
    """What the code writes to a terminal of its own."""
    ours, theirs = terminal()
    try:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=theirs, check=True)
        os.write(theirs, b"end")
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(ours, 4096)
        return shown.removesuffix(b"end").decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_bar_may_count_something_else() -> None:
    code = WORK.replace("2 << 20)", "2, 'snapshots')").replace("1 << 20", "1")
    shown = on_a_terminal(code)
    assert "0/2" in shown
    assert "snapshots/s" in shown


def test_a_bar_with_binary_units_is_drawn_on_a_terminal() -> None:
    shown = on_a_terminal(WORK)
    assert "copying:" in shown
    assert "2.00M" in shown


def test_the_bar_is_gone_at_the_end() -> None:
    assert on_a_terminal(WORK).split("\r")[-2].strip() == ""


def test_nothing_is_drawn_without_tqdm() -> None:
    assert on_a_terminal(WITHOUT_TQDM + WORK) == ""


TOTAL = "def total():\n    print('asked')\n    return 2 << 20\n"
COSTLY = TOTAL + WORK.replace("2 << 20)", "total)")


def test_a_total_that_is_costly_is_asked_for_where_a_bar_is_drawn(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert "2.00M" in on_a_terminal(COSTLY)
    assert capfd.readouterr().out == "asked\n"
    assert on_a_terminal(WITHOUT_TQDM + COSTLY) == ""
    subprocess.run([sys.executable, "-c", COSTLY], cwd=ROOT, stderr=subprocess.PIPE, check=True)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("code", [WORK, SEEN], ids=["silent", "tqdm is not even imported"])
def test_nothing_is_drawn_on_a_pipe(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stderr == b""
