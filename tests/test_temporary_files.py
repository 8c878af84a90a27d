"""What tests leave in the temporary directory, and how they say that it is too small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import ROOT

TESTS = """
import pytest

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("shared")
    yield path
    assert path.exists()

def test_passes(tmp_path, shared):
    (tmp_path / "file").touch()

def test_may_fail(tmp_path, shared):
    (tmp_path / "file").touch()
    assert not FAIL
"""


@pytest.mark.parametrize("fail", [False, True])
def test_only_what_failed_leaves_files(tmp_path: Path, fail: bool) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.replace("FAIL", str(fail)))
    where = tmp_path / "temporary"
    line = ["-m", "pytest", "-q", "-p", "support.space", "--basetemp", where, "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, *line], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=False
    )
    assert done.returncode == fail, done.stdout
    left = sorted(p.name for p in where.glob("[!.]*") if not p.is_symlink())
    assert left == (["shared0", "test_may_fail0"] if fail else [])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_temporary_directory_that_is_too_small(tmp_path: Path) -> None:
    script = (
        f"mount -t tmpfs -o size=1g none {tmp_path} && "
        f"TMPDIR={tmp_path} exec {sys.executable} -m pytest -q tests"
    )
    line = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == (
        f"ERROR: the tests need 2 GiB of temporary space, and {tmp_path} has 1.0 GiB: "
        "set TMPDIR to a directory that has more"
    )
