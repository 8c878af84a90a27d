"""The names under which snapshots are exported: every rule of "EXPORTS" in the manual page."""

from __future__ import annotations

import re

import pytest

from qcow2snap_core.errors import UsageError
from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.serve.exports import default, exports_of, find

MiB, GiB = 1 << 20, 1 << 30


def snapshot(id_, name, vm_state_size=0):
    return Snapshot(
        id=id_,
        name=name,
        date_sec=1_700_000_000,
        date_nsec=0,
        vm_clock_nsec=0,
        vm_state_size=vm_state_size,
        disk_size=GiB,
        icount=None,
        l1_table_offset=0x30000,
        l1_size=1,
        entry_offset=0x50000,
        entry_length=64,
        extra_data_size=24,
    )


def table(*pairs):
    """Snapshots with the IDs 1, 2, 3 … of these names; a pair is an ID of its own and a name."""
    return [
        snapshot(*pair) if isinstance(pair, tuple) else snapshot(str(n), pair)
        for n, pair in enumerate(pairs, 1)
    ]


def names(*pairs):
    return [e.name for e in exports_of(table(*pairs))]


LONG = "ü" * 2048  # 4096 bytes


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ([], []),
        (["nightly", "weekly"], ["nightly", "weekly"]),
        (["", "b"], ["1", "b"]),
        (["same", "b", "same"], ["1", "b", "3"]),
        (["", ""], ["1", "2"]),
        (["2", "b"], ["1", "b"]),
        (["2", "1"], ["1", "2"]),
        (["1", "2"], ["1", "2"]),
        (["3", "b"], ["3", "b"]),
        ([("5", "1"), ("1", "x")], ["5", "x"]),
        (["caf\udce9", "b"], ["1", "b"]),
        (["a\0b", "b"], ["1", "b"]),
        ([LONG, "b"], [LONG, "b"]),
        ([LONG + "x", "b"], ["1", "b"]),
        (["a/b", "with space", "日本", "a\nb"], ["a/b", "with space", "日本", "a\nb"]),
        ([("7", "a"), ("7", "b")], ["a", "b"]),
        ([("7", ""), ("7", "")], ["7"]),
        ([("", "a")], ["a"]),
        ([("", "")], []),
    ],
)
def test_a_snapshot_goes_by_its_name_or_else_by_its_id(snapshots, expected):
    assert names(*snapshots) == expected


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ([("1", "vm", 5)], ["vm", "vm/vmstate"]),
        ([("1", "vm", 5), ("2", "b")], ["vm", "vm/vmstate", "b"]),
        ([("1", "", 5)], ["1", "1/vmstate"]),
        ([("1", "a", 5), ("2", "a", 5)], ["1", "1/vmstate", "2", "2/vmstate"]),
        ([("1", "vm", 5), ("2", "vm/vmstate")], ["vm", "1/vmstate", "vm/vmstate"]),
        ([("1", "vm/vmstate"), ("2", "vm", 5)], ["vm/vmstate", "vm", "2/vmstate"]),
        (
            [("1", "vm", 5), ("2", "vm/vmstate"), ("3", "1/vmstate")],
            ["vm", "vm/vmstate", "1/vmstate"],
        ),
        (
            [("1", "vm", 5), ("2", "vm/vmstate", 5)],
            ["vm", "1/vmstate", "vm/vmstate", "vm/vmstate/vmstate"],
        ),
        ([("1", "x" * 4088, 5)], ["x" * 4088, "x" * 4088 + "/vmstate"]),
        ([("1", "x" * 4089, 5)], ["x" * 4089, "1/vmstate"]),
    ],
)
def test_saved_vm_state_is_a_second_export_unless_a_snapshot_has_that_name(snapshots, expected):
    assert names(*snapshots) == expected


def test_a_snapshot_really_named_so_wins_over_the_vm_state():
    snapshots = table(("1", "vm", 5), ("2", "vm/vmstate"))
    export = find(exports_of(snapshots), snapshots, "vm/vmstate")
    assert (export.snapshot.id, export.vm_state) == ("2", False)


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ([], None),
        (["a"], "a"),
        ([""], "1"),
        ([("1", "vm", 5)], "vm"),
        (["a", "b"], None),
        (["", "a"], None),
        (["same", "same"], None),
    ],
)
def test_the_default_export_is_the_only_snapshot(snapshots, expected):
    snapshots = table(*snapshots)
    exports = exports_of(snapshots)
    assert default(exports) == expected
    if expected is None:
        with pytest.raises(UsageError, match="there is no default export, name one: it has "):
            find(exports, snapshots, "")
    else:
        assert find(exports, snapshots, "").snapshot is snapshots[0]
        assert not find(exports, snapshots, "").vm_state


@pytest.mark.parametrize(
    ("snapshots", "asked", "id_"),
    [
        (["a", "b"], "b", "2"),
        (["a", "b"], "2", "2"),
        (["", "b"], "1", "1"),
        (["same", "same"], "2", "2"),
        (["2", "b"], "2", "2"),
        (["2", "b"], "1", "1"),
        (["2", "1"], "2", "2"),
        (["caf\udce9"], "1", "1"),
    ],
)
def test_an_export_is_looked_up_by_its_name_and_then_by_id(snapshots, asked, id_):
    snapshots = table(*snapshots)
    export = find(exports_of(snapshots), snapshots, asked)
    assert (export.snapshot.id, export.vm_state) == (id_, False)


@pytest.mark.parametrize(
    ("snapshots", "asked"),
    [
        (["a", "b"], "c"),
        (["a", "b"], "A"),
        (["same", "same"], "same"),
        (["a", "b"], "a/vmstate"),
        (["a\0b", "b"], "a\0b"),
        (["a", "b"], "01"),
        ([], "a"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(snapshots, asked):
    snapshots = table(*snapshots)
    said = r"^there is no export '.*': (did you mean 'a'\? )?it has "
    with pytest.raises(UsageError, match=said) as caught:
        find(exports_of(snapshots), snapshots, asked)
    for s in snapshots:
        assert f"{s.id} '" in str(caught.value)


def test_vm_state_is_found_under_its_name():
    snapshots = table(("1", "vm", 5), ("2", "b"))
    export = find(exports_of(snapshots), snapshots, "vm/vmstate")
    assert (export.snapshot.id, export.vm_state) == ("1", True)


def test_the_description_is_id_date_and_sizes():
    (disk, state) = exports_of([snapshot("1", "vm", 3 * MiB // 2)])
    assert re.fullmatch(r"1, 2023-11-1[45] \d\d:\d\d:20, 1 GiB, 1.5 MiB", disk.description)
    assert state.description == disk.description


def test_no_id_makes_a_description_that_nbd_cannot_carry():
    (disk,) = exports_of([snapshot("\udcff\n" + "x" * 65000, "vm")])
    assert disk.description.startswith("\\xff\\nxxx")
    assert len(disk.description.encode()) < 4096


def test_every_export_of_a_crowd_leads_to_its_own_snapshot():
    """Names that are IDs, repeated, empty and VM states' names, all mixed."""
    mixed = ["3", "", "1/vmstate", "5", "a", "a", "2", "9/vmstate", "x"]
    snapshots = [snapshot(str(n), name, n % 2) for n, name in enumerate(mixed, 1)]
    exports = exports_of(snapshots)
    assert len({e.name for e in exports}) == len(exports)
    assert [e.snapshot.id for e in exports if not e.vm_state] == [s.id for s in snapshots]
    for export in exports:
        found = find(exports, snapshots, export.name)
        assert (found.snapshot, found.vm_state) == (export.snapshot, export.vm_state)
