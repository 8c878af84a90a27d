"""Where a record is kept, and when: what a crash leaves never claims to hold what it does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcow2snap_core.transfer.records import Record
from qcow2snap_core.transfer.updates import ENDING, keep_in


def test_a_record_beside_the_file_is_on_the_disk_before_the_update_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    synced, renamed = os.fsync, os.rename

    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no attributes")

    def fsync(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        synced(fd)

    def rename(old: str, new: str) -> None:
        done.append(new)
        renamed(old, new)

    monkeypatch.setattr(os, "setxattr", refused)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    (tmp_path / "copy").write_text("old")
    with open(tmp_path / "copy", "r+b") as file:
        keep_in(str(tmp_path / "copy"), file.fileno(), Record(None, None, True))
    assert done[-2:] == [f"{tmp_path}/copy{ENDING}", str(tmp_path)]
