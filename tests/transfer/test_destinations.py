"""A target is told apart once: by what is there, by its name and by what is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcow2snap_core.errors import UsageError
from qcow2snap_core.transfer.destinations import new_copy, update
from qcow2snap_core.transfer.devices import Export
from qcow2snap_core.transfer.qcow2file import Qcow2File
from qcow2snap_core.transfer.rawfile import FileInPlace, NewFile, UpdatedFile
from qcow2snap_core.transfer.streams import Stream


@pytest.mark.parametrize(
    ("target", "form", "expected"),
    [
        ("new", None, NewFile),
        ("new.qcow2", None, Qcow2File),
        ("new.qcow2", "raw", NewFile),
        ("new", "qcow2", Qcow2File),
        ("fifo", None, Stream),
        ("./-", None, NewFile),
        ("nbd://localhost/x.qcow2", None, Export),
    ],
)
def test_for_a_new_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, form: str | None, expected: type
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    assert type(new_copy(target, form=form)) is expected


@pytest.mark.parametrize(
    ("target", "in_place", "expected"),
    [
        ("old", False, UpdatedFile),
        ("old", True, FileInPlace),
        ("nbd://localhost/x", False, Export),
        ("nbd://localhost/x", True, Export),
    ],
)
def test_for_an_update(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    in_place: bool,
    expected: type,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old").touch()
    assert type(update(target, in_place=in_place)) is expected


@pytest.mark.parametrize("target", ["-", "fifo"])
def test_a_stream_holds_nothing_to_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with pytest.raises(UsageError, match="is a FIFO: give a file|nothing to update"):
        update(target)
