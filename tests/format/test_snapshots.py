"""The snapshot table: what qemu-img says of it is what we say, old and damaged entries too."""

from __future__ import annotations

import os
import re
import struct

import pytest
from support.devices import opened
from support.qemu import KiB, MiB, content, create, info, io, patch, run, take
from support.tables import Entry, write_table

from qcow2snap_core.errors import UsageError
from qcow2snap_core.format.choosing import Choice, choose, summary
from qcow2snap_core.format.snapshot_table import (
    Table,
    _Reader,
    read_fields,
    read_table,
    read_table_once,
)
from qcow2snap_core.format.snapshots import date


def table(path):
    with opened(path) as storage:
        return read_table(storage)


def as_qemu_writes_it(s):
    """The names and units of qemu-img info."""
    said = {
        "id": s.id,
        "name": s.name,
        "vm-state-size": s.vm_state_size,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec // 10**9,
        "vm-clock-nsec": s.vm_clock_nsec % 10**9,
    }
    return said if s.icount is None else {**said, "icount": s.icount}


def assert_equal_to_qemus(path):
    found = table(path)
    assert found.damage is None
    assert [as_qemu_writes_it(s) for s in found.snapshots] == info(path)["snapshots"]
    lines = run("qemu-img", "snapshot", "-l", path).splitlines()[2:]
    listed = [re.search(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", line)[1] for line in lines]
    assert [date(s) for s in found.snapshots] == listed
    return found.snapshots


@pytest.fixture(params=["0.10", "1.1"])
def image(tmp_path, request):
    """An image with one snapshot, and that snapshot."""
    path = create(tmp_path / "disk.qcow2", MiB, compat=request.param)
    io(path, "write -P 7 0 64k")
    take(path, "real")
    return path, table(path).snapshots[0]


def entry(real, id_, name, **more):
    """An entry of another ID and name for the same content."""
    return Entry(id_, name, real.l1_table_offset, real.l1_size, **more)


# --- What QEMU writes ---


@pytest.mark.parametrize("options", [{"compat": "0.10"}, {"compat": "1.1", "cluster_size": 512}])
def test_the_table_is_what_qemu_img_lists(tmp_path, options):
    path = create(tmp_path / "disk.qcow2", MiB, **options)
    assert table(path)[:2] == ((), None)
    names = ["nightly", "same", "same", "2", "with space", "zwölf", "a/b", "x" * 250]
    for name in names:
        take(path, name)
    run("qemu-img", "snapshot", "-d", "2", path)  # by name: its ID was 4
    found = assert_equal_to_qemus(path)
    assert [s.name for s in found] == [n for n in names if n != "2"]
    assert [s.id for s in found] == [*"1235678"]
    assert {s.disk_size for s in found} == {MiB}


def test_each_snapshot_keeps_the_size_that_the_disk_had(tmp_path):
    path = create(tmp_path / "disk.qcow2", MiB)
    for n, size in enumerate([3 * MiB, 512 * KiB, 2 * MiB + 512]):
        take(path, f"before {n}")
        run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, size)
    assert [s.disk_size for s in assert_equal_to_qemus(path)] == [MiB, 3 * MiB, 512 * KiB]


def test_a_table_longer_than_one_reading_of_it(tmp_path):
    """The entries are read 64 KiB at a time, and lie across the joints."""
    path = create(tmp_path / "disk.qcow2", MiB)
    take(path, "real")
    (real,) = table(path).snapshots
    entries = [entry(real, b"%d" % n, b"n" * (n % 251), extra=bytes(16)) for n in range(700)]
    write_table(path, entries)
    found = assert_equal_to_qemus(path)
    assert [(s.id, len(s.name)) for s in found] == [(str(n), n % 251) for n in range(700)]


# --- Entries as other programs wrote them ---

EXTRA = struct.pack(">QQQ", 5 << 32, 3 * MiB, 42)


@pytest.mark.parametrize(
    ("extra", "vm_state_size", "disk_size", "icount"),
    [
        (b"", 99, MiB, None),
        (EXTRA[:8], 5 << 32, MiB, None),
        (EXTRA[:12], 5 << 32, MiB, None),
        (EXTRA[:16], 5 << 32, 3 * MiB, None),
        (EXTRA, 5 << 32, 3 * MiB, 42),
        (EXTRA[:16] + b"\xff" * 8, 5 << 32, 3 * MiB, None),
        (EXTRA + b"from the future" * 30, 5 << 32, 3 * MiB, 42),
    ],
)
def test_extra_data_of_any_length(image, extra, vm_state_size, disk_size, icount):
    path, real = image
    old = entry(real, b"9", b"old", vm_clock=5 * 10**9 + 7, vm_state_size=99, extra=extra)
    write_table(path, [old, entry(real, b"10", b"next", extra=bytes(16))])
    found = table(path).snapshots
    assert [s.name for s in found] == ["old", "next"]
    assert (found[0].vm_state_size, found[0].disk_size, found[0].icount) == (
        vm_state_size,
        disk_size,
        icount,
    )
    if len(extra) % 8 == 0 and (len(extra) >= 16 or real_version(path) == 2):
        assert_equal_to_qemus(path)


def real_version(path):
    return path.read_bytes()[7]


@pytest.mark.parametrize(
    ("id_", "name"),
    [(b"1", b""), (b"", b"caf\xe9"), (b"1", b"a\0b"), (b"1", b"x" * 65535), (b"x" * 65535, b"\n")],
)
def test_ids_and_names_are_any_bytes(image, id_, name):
    path, real = image
    write_table(path, [entry(real, id_, name), entry(real, b"2", b"next")])
    found = table(path).snapshots
    assert (found[0].id.encode("utf-8", "surrogateescape"), found[1].id) == (id_, "2")
    assert found[0].name.encode("utf-8", "surrogateescape") == name


def test_identity_is_all_that_never_changes(image):
    path, real = image
    first = entry(real, b"1", b"n", date=(5, 6), vm_clock=7)
    write_table(path, [first])
    (before,) = table(path).snapshots
    for change, same in [
        ({"extra": bytes(24)}, True),
        ({"id": b"2"}, False),
        ({"name": b"m"}, False),
        ({"date": (4, 6)}, False),
        ({"date": (5, 7)}, False),
        ({"vm_clock": 8}, False),
        ({"l1_table_offset": 64 * KiB}, False),
        ({"l1_size": 2}, False),
    ]:
        write_table(path, [Entry(**{**vars(first), **change})])
        (after,) = table(path).snapshots
        assert (after.identity == before.identity) is same, change


# --- Damage ---


def test_entries_before_the_damage_are_kept(image):
    path, real = image
    entries = [entry(real, b"%d" % n, b"name", extra=bytes(16)) for n in (1, 2, 3)]
    offset = write_table(path, entries)
    end = offset + sum(len(e.pack()) for e in entries)
    with open(path, "r+b") as f:
        f.truncate(end - 8)
    found = table(path)
    assert [s.id for s in found.snapshots] == ["1", "2"]
    assert re.fullmatch(r"entry 3 of 3 at host offset 0x\w+ lies past the end .*", found.damage)


def test_the_padding_of_the_last_entry_may_be_missing(image):
    path, real = image
    only = entry(real, b"1", b"n")
    offset = write_table(path, [only])
    with open(path, "r+b") as f:
        f.truncate(offset + 42)
    assert table(path).damage is None


@pytest.mark.parametrize(
    ("at", "form", "value", "damage"),
    [
        (36, ">I", 0xFFFFFFFF, "entry 2 of 2 has 4294967295 bytes of extra data, more than 1024"),
        (36, ">I", 1025, "entry 2 of 2 has 1025 bytes of extra data, more than 1024"),
        (14, ">H", 0xFFFF, "entry 2 of 2 at host offset 0x"),
        (12, ">H", 0xFFFF, "entry 2 of 2 at host offset 0x"),
    ],
)
def test_a_length_that_cannot_be_is_damage(image, at, form, value, damage):
    path, real = image
    first = entry(real, b"1", b"kept")
    offset = write_table(path, [first, entry(real, b"2", b"lost")])
    with open(path, "r+b") as f:
        f.truncate(offset + 4 * KiB)
    patch(path, offset + len(first.pack()) + at, struct.pack(form, value))
    with opened(path) as storage:
        found = read_table_once(storage)
    assert [s.name for s in found.snapshots] == ["kept"]
    assert found.damage.startswith(damage)


@pytest.mark.parametrize(
    ("count", "offset", "damage"),
    [
        (65537, 0x50000, "it has 65537 entries, more than 65536"),
        (0xFFFFFFFF, 0x50000, "it has 4294967295 entries"),
        (1, 0, "its offset 0x0 is not one of a cluster"),
        (1, 0x50001, "its offset 0x50001 is not one of a cluster"),
        (1, 1 << 40, "its offset 0x10000000000 lies past the end of the file"),
        (1, 2**63 - 512, "its offset 0x7ffffffffffffe00 is not one of a cluster"),
        (1, 2**64 - 2**21, "its offset 0xffffffffffe00000 lies past the end"),
    ],
)
def test_a_table_that_cannot_be_is_damage(image, count, offset, damage):
    path, _ = image
    patch(path, 60, struct.pack(">IQ", count, offset))
    with opened(path) as storage:
        found = read_table_once(storage)
    assert found.snapshots == ()
    assert found.damage.startswith(damage)


# --- Choosing ---

PAIRS = [("1", "a"), ("2", "same"), ("3", "same"), ("4", "2"), ("5", ""), ("6", "6"), ("7", "1")]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    path = create(tmp_path_factory.mktemp("choose") / "disk.qcow2", MiB)
    for n, (id_, name) in enumerate(PAIRS, 1):
        io(path, f"write -P {n} 0 64k")
        take(path, name)
        assert table(path).snapshots[-1].id == id_
    return path


@pytest.mark.parametrize("asked", ["a", "1", "same", "2", "3", "6", "7"])
def test_one_word_means_to_us_what_it_means_to_qemu(several, asked):
    out = several.with_name("out")
    run("qemu-img", "convert", "-l", asked, "-O", "raw", several, out)
    assert choose(table(several), Choice(asked), "disk").id == str(out.read_bytes()[0])


@pytest.mark.parametrize("by", ["id", "name"])
@pytest.mark.parametrize("asked", ["1", "2", "6", "same", "a"])
def test_id_and_name_alone_too(several, by, asked):
    fits = any(asked == pair[by == "name"] for pair in PAIRS)
    choice = Choice(**{by: asked})
    if fits:
        content_byte = content(several, asked, by=by)[0]
        assert choose(table(several), choice, "disk").id == str(content_byte)
    else:
        with pytest.raises(UsageError, match=r"no snapshot (with the ID|named) '"):
            choose(table(several), choice, "disk")


@pytest.mark.parametrize(
    ("choice", "id_"),
    [
        (Choice(id="3", name="same"), "3"),
        (Choice(id="4", name="2"), "4"),
        (Choice("same", id="3"), "3"),
        (Choice("2", name="2"), "4"),
        (Choice("2", name="same"), "2"),
        (Choice(""), "5"),
        (Choice(name=""), "5"),
        (Choice("1", name="1"), "7"),
    ],
)
def test_every_part_that_is_given_must_match(several, choice, id_):
    assert choose(table(several), choice, "disk").id == id_


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        (Choice("nope"), "no snapshot 'nope' in "),
        (Choice(id="3", name="a"), "no snapshot with the ID '3' and named 'a' in "),
        (Choice("a", id="2"), "no snapshot 'a' and with the ID '2' in "),
        (Choice(id=""), "no snapshot with the ID '' in "),
        (Choice("a\nb"), r"no snapshot 'a\nb' in "),
    ],
)
def test_the_error_says_what_was_asked_and_what_there_is(several, choice, shown):
    with pytest.raises(UsageError) as caught:
        choose(table(several), choice, "disk.qcow2")
    assert str(caught.value).startswith(f"{shown}'disk.qcow2': it has 1 'a', 2 'same', 3 'same', ")


def test_the_error_tells_of_damage(several):
    damaged = Table(table(several).snapshots[:1], "entry 2 of 2 is bad")
    with pytest.raises(UsageError, match=r"\(its snapshot table is damaged: entry 2 of 2 is bad\)"):
        choose(damaged, Choice("same"), "disk")


def test_a_summary_is_short_whatever_there_is(several):
    one = table(several).snapshots[:1]
    assert summary(()) == "it has none"
    assert summary(one * 3, most=2) == "it has 1 'a', 1 'a' and 1 more"


def test_a_proof_is_of_all_that_was_read(image):
    """Also when the table was still being written out when it was first looked at."""
    path, real = image
    entries = [entry(real, b"%d" % n, b"name") for n in (1, 2)]
    offset = write_table(path, entries)
    whole = path.read_bytes()
    with opened(path) as storage:
        os.truncate(path, offset + len(entries[0].pack()))
        reader = _Reader(storage, offset, 0)
        assert reader.entry().id == "1"
        path.write_bytes(whole)
        second = reader.entry()
        assert second.id == "2"
        fingerprint = reader.fingerprint(read_fields(storage))
        assert fingerprint.holds(storage)
        patch(path, second.entry_offset + second.entry_length - 1, b"!")
        assert not fingerprint.holds(storage)
