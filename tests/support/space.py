"""The temporary files of the tests: enough room before they begin, and none taken afterwards.

Images of all tests together take nine GiB, those of any moment far less than two.  pytest
would keep them all until three runs later (its ``tmp_path_retention_policy`` is newer than
Debian 12), so each test's are removed here when it has passed, and a module's after its last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDED = 2 << 30  # bytes, by two tests at a time


_LARGEST = Path(__file__).resolve().parents[1] / "e2e"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Raises UsageError, which pytest prints as one line, if a run of most tests has no room."""
    config = session.config
    most = any(_LARGEST.is_relative_to(Path(argument).resolve()) for argument in config.args)
    if not most or hasattr(config, "workerinput"):
        return
    directory = config.getoption("basetemp") or tempfile.gettempdir()
    at = os.statvfs(directory if os.path.isdir(directory) else os.path.dirname(directory) or ".")
    if (free := at.f_bavail * at.f_frsize) < NEEDED:
        raise pytest.UsageError(
            f"the tests need {NEEDED >> 30} GiB of temporary space, and {directory} has "
            f"{free / (1 << 30):.1f} GiB: set TMPDIR to a directory that has more"
        )


@pytest.fixture(scope="session", autouse=True)
def _no_files_of_a_run_that_passed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    yield
    if not request.session.testsfailed:
        _remove(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", autouse=True)
def _no_files_of_a_module_that_passed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Set up first, so that it ends when the module's own fixtures have."""
    failed = request.session.testsfailed
    before = set(tmp_path_factory.getbasetemp().iterdir())
    yield
    if request.session.testsfailed == failed:
        for directory in set(tmp_path_factory.getbasetemp().iterdir()) - before:
            _remove(directory)


@pytest.fixture(autouse=True)
def _no_files_of_a_test_that_passed(request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    path = request.node.funcargs.get("tmp_path")
    if path is not None and request.session.testsfailed == failed:
        _remove(path)


def _remove(directory: Path) -> None:
    """But not what is mounted there, should a test have left that."""
    if not any(line.split()[4].startswith(f"{directory}/") for line in _mounts()):
        shutil.rmtree(directory, ignore_errors=True)


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()
