"""The IDs of new snapshots are those that QEMU gives."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.refcounts import count_table
from support.tables import Entry, write_table

from qcow2snap_core.transfer.assembly import free_ids

LAST = (1 << 64) - 1


def by_qemu(path: Path, ids: list[str]) -> str:
    """The ID that it gives to one more snapshot of an image that has these."""
    qemu.create(path, MiB)
    qemu.run("qemu-img", "snapshot", "-c", "first", path)
    l1 = qemu.snapshots(path)["first"].l1_table_offset
    write_table(path, [Entry(id_.encode(), b"x%d" % n, l1, 1) for n, id_ in enumerate(ids)])
    count_table(path)
    qemu.run("qemu-img", "snapshot", "-c", "new", path)
    return qemu.snapshots(path)["new"].id


@pytest.mark.parametrize(
    "ids",
    [
        ["1", "3"],
        ["007"],
        ["12abc"],
        [" 5"],
        ["-2"],
        ["+3"],
        ["\u0665", "x"],
        [str(10**19 - 1)],
        [str(LAST - 1)],
        [str(LAST)],
        ["9" * 20],
        ["9" * 60],
    ],
)
def test_the_next_id_is_the_one_that_qemu_gives(tmp_path: Path, ids: list[str]) -> None:
    assert next(free_ids(ids)) == by_qemu(tmp_path / "disk.qcow2", ids)


def test_no_id_is_given_twice_where_qemu_does(tmp_path: Path) -> None:
    ids = ["0", str(LAST), "2"]
    assert by_qemu(tmp_path / "disk.qcow2", ids) == "0"
    assert list(islice(free_ids(ids), 3)) == ["1", "3", "4"]
    assert list(islice(free_ids([str(10**19 - 1), str(10**19)]), 1)) == [str(10**19 + 1)]
    assert next(free_ids(["9" * 5000])) == "0"
