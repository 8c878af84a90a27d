"""A wrong value of an option is a usage error: one line that says what to give, never the value."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import qemu
from support.command import here
from support.qemu import MiB

WRONG = "s3cret"
SIZE = "give bytes, or a number with a unit, like 64M"
ADDRESS = "give an address, like 0x100000000"
PLACE = "give BLOCK=ADDRESS or BLOCK=none"
SECONDS = "give seconds, more than 0, like 30 or 0.5"
NUMBER = "give a whole number"
IN = {
    "list": ["disk.qcow2"],
    "prune": ["disk.qcow2"],
    "ls": ["disk.qcow2", "one"],
    "mount": ["disk.qcow2", "one", "mnt"],
    "extract": ["disk.qcow2", "one", "/etc"],
    "memory": ["disk.qcow2", "one", "out"],
}


@pytest.mark.parametrize(
    ("command", "option", "value", "advice"),
    [
        ("prune", "--keep-within", "2w", "give years, months, days and hours, like 2y5m7d3h"),
        ("prune", "--keep-last", WRONG, NUMBER),
        ("extract", "--max-files", WRONG, NUMBER),
        ("extract", "--max-bytes", WRONG, SIZE),
        ("extract", "--max-bytes", "9" * 30, SIZE),
        ("memory", "--below-4g", WRONG, SIZE),
        ("memory", "--above-4g", WRONG, ADDRESS),
        ("memory", "--above-4g", "-4096", ADDRESS),
        ("memory", "--place", WRONG, PLACE),
        ("memory", "--place", f"dimm0={WRONG}", PLACE),
        ("memory", "--place", "=0x1000", PLACE),
        ("ls", "--max-files", WRONG, NUMBER),
        ("mount", "--partition", WRONG, NUMBER),
        ("list", "--remote-timeout", WRONG, SECONDS),
        ("list", "--remote-timeout", "0", SECONDS),
    ],
)
def test_a_wrong_value(command: str, option: str, value: str, advice: str) -> None:
    (line,) = here(command, *IN[command], f"{option}={value}", status=2).splitlines()
    more = f"qcow2snap {command} --help says what there is"
    assert line == f"qcow2snap: argument {option}: {advice}: {more}"


@pytest.mark.parametrize("command", sorted(IN))
def test_a_disk_of_a_file(command: str, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    words = [path, *IN[command][1:], "--disk", "vda"]
    if command == "prune":
        words += ["--keep-last", "1"]
    (line,) = here(command, *words, status=2).splitlines()
    assert "--disk goes with libvirt:DOMAIN: qcow2snap" in line


def test_a_disk_of_a_repository(tmp_path: Path) -> None:
    assert "--disk goes with libvirt:DOMAIN" in here("list", tmp_path, "--disk", "vda", status=2)
