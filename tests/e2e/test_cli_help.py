"""qcow2snap help and --version, in the forms that people try."""

from __future__ import annotations

import pytest
from support.command import qcow2snap, run

import qcow2snap_core
from qcow2snap_core.cli import COMMANDS


def test_help_is_what_the_option_shows() -> None:
    assert qcow2snap("help") == qcow2snap("--help")
    assert qcow2snap("help", "help") == qcow2snap("help", "--help")
    assert "--since" in qcow2snap("help", "copy") == qcow2snap("copy", "--help")


def test_it_tells_every_command() -> None:
    lines = [line.split()[:1] for line in qcow2snap("help").splitlines()]
    assert [c for c in COMMANDS if [c] not in lines] == []


def test_an_unknown_command_is_a_usage_error() -> None:
    done = run("help", "coppy")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give one of list, map, " in done.stderr


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version(option: str) -> None:
    assert qcow2snap(option).startswith(f"qcow2snap {qcow2snap_core.__version__} ")
