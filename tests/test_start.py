"""What a start imports: a server should answer at once, and each module more makes it later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import qemu
from support.server import ROOT, command

# Each takes from half a millisecond to thirty, and serving a plain image needs none of them.
HEAVY = {
    "argparse",
    "construct",
    "contextlib",
    "cryptography",
    "dataclasses",
    "enum",
    "getpass",
    "hashlib",
    "importlib.util",
    "json",
    "mmap",
    "nbd",
    "numpy",
    "pathlib",
    "re",
    "subprocess",
    "tempfile",
    "traceback",
    "typing",
    "urllib.parse",
    "zstandard",
    "qcow2snap_core.decode.encryption",
    "qcow2snap_core.image.layers",
}

# Imported a second after the first client came, which a busy machine may make part of the start.
REPORTS = "qcow2snap_core.serve.reports"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", 1 << 20)
    qemu.io(path, "write -P 7 0 64k")
    qemu.take(path, "nightly")
    return path


def imported(*line: object) -> set[str]:
    """The modules that a program has imported, without those that Python itself starts with."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [str(x) for x in line], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = [x.split("|")[2] for x in done.stderr.splitlines() if x.startswith("import time:")]
    return {name.strip() for name in _without(REPORTS, names[names.index(" site") + 1 :])}


def _without(name: str, names: list[str]) -> list[str]:
    """The lines without that module's and those before it, further in, that it has imported."""
    kept: list[str] = []
    within = -1
    for line in reversed(names):
        depth = len(line) - len(line.lstrip())
        if line.strip() == name:
            within = depth
        elif within < 0 or depth <= within:
            within = -1
            kept.append(line)
    return kept


@pytest.mark.parametrize("choice", [{"snapshot": "nightly"}, {}])
def test_serving_a_plain_image_imports_no_more_than_it_uses(image: Path, choice: dict) -> None:
    copy = "nbdcopy nbd+unix:///nightly?socket=$unixsocket null:"
    found = imported(*command("-U", "-", "--run", copy, file=image, **choice))
    assert "qcow2snap_core.image.guard" in found
    assert not found & HEAVY


@pytest.mark.parametrize(
    ("arguments", "there", "not_there"),
    [
        (
            ["--version"],
            "qcow2snap_core.cli",
            {"qcow2snap_core.tables.check", "construct", "subprocess"},
        ),
        (
            ["list", "disk.qcow2"],
            "qcow2snap_core.tables.space",
            {"qcow2snap_core.tables.check", "construct", "ssl"},
        ),
        (
            ["map", "disk.qcow2", "nightly"],
            "qcow2snap_core.image.disk",
            {"construct", "subprocess"},
        ),
        (["--help"], "qcow2snap_core.tables.check", {"cryptography"}),
    ],
)
def test_a_command_imports_no_other_command(
    image: Path, arguments: list[str], there: str, not_there: set[str]
) -> None:
    words = [str(image) if a == "disk.qcow2" else a for a in arguments]
    found = imported(
        "/usr/bin/env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "qcow2snap_core", *words
    )
    assert there in found
    assert not found & not_there


def test_the_library_leaves_construct_as_it_is() -> None:
    """It was imported without its debugger once, for every program that uses the library."""
    program = (
        "import qcow2snap_core, qcow2snap_core.tables.check, qcow2snap_core.decode.luks, sys\n"
        "from construct import Debugger, Probe\n"
        "assert sys.modules['construct.debug'].__file__, 'a stub'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_without_construct_one_line_names_its_package() -> None:
    script = (
        "import sys; sys.modules['construct'] = None; from qcow2snap_core import cli; "
        "sys.exit(cli.main(['check', 'disk.qcow2']))"
    )
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    expected = "qcow2snap: Python's module construct is missing: install python3-construct\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
