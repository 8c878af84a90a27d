"""What snapshots' files are called, however alike or odd the snapshots are."""

from __future__ import annotations

import time

import pytest

from qcow2snap_core.format.filenames import file_names
from qcow2snap_core.format.snapshots import Snapshot


def snapshots(*pairs: tuple[str, str]) -> list[Snapshot]:
    return [Snapshot(*pair, 0, 0, 0, 0, 0, None, 0, 0, 0, 0, 0) for pair in pairs]


CASES = {
    "plain": ([("1", "a"), ("2", "b")], ["a", "b"]),
    "repeated": ([("1", "a"), ("2", "a")], ["1", "2"]),
    "empty": ([("1", "")], ["1"]),
    "nothing at all": ([("", ""), ("", "")], ["unnamed", "unnamed.2"]),
    "another's ID": ([("1", "2"), ("2", "b")], ["1", "b"]),
    "its own ID": ([("1", "1")], ["1"]),
    "all alike": ([("1", "a")] * 3, ["1", "1.2", "1.3"]),
    "a number that is taken": ([("1", "a"), ("1", "a"), ("1.2", "a")], ["1", "1.2", "1.2.2"]),
    "what is taken": ([("1", "active"), ("2", "b")], ["1", "b"]),
    "too long": ([("1", "n" * 255), ("2", "é" * 127)], ["1", "é" * 127]),
    "a long ID too": ([("9" * 300, "n" * 300)], [f"{'9' * 50}.2"]),
}


@pytest.mark.parametrize(("pairs", "expected"), CASES.values(), ids=CASES.keys())
def test_names(pairs: list[tuple[str, str]], expected: list[str]) -> None:
    assert file_names(snapshots(*pairs), ".", ("active",)) == expected


def test_a_table_full_of_equals_takes_no_time() -> None:
    began = time.thread_time()
    names = file_names(snapshots(*[("1", "a")] * 65536))
    assert len(set(names)) == 65536
    assert time.thread_time() - began < 5
