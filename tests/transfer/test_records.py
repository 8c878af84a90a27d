"""The record of what a copy holds: what is written can be read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import damage, qemu
from support.qemu import MiB

from qcow2snap_core.image.opener import open_image
from qcow2snap_core.transfer.records import MOST, Held, Record, held, parse, text

MON = Held("1", "mon", 1, 2, 3, "0" * 64)
LONG = Held("\U0001f4be" * 64, "\udcff" * 64, 2**32 - 1, 2**32 - 1, 2**64 - 1, "f" * 64)


@pytest.mark.parametrize(
    "record",
    [
        Record(MON, size=5, mtime_ns=7),
        Record(None),
        Record(MON, LONG, True, 2**63 - 1, -1),
        Record(LONG, LONG, True, 2**63 - 1, 2**63 - 1),
        Record(None, None, True),
    ],
    ids=str,
)
def test_what_is_written_can_be_read(record: Record) -> None:
    raw = text(record)
    assert raw.isascii()
    assert len(raw) <= MOST
    assert parse(raw) == record


GOOD = json.loads(text(Record(MON, size=5, mtime_ns=7)))

CHANGES: list[tuple[tuple[str, ...], Any]] = [
    (("version",), 0),
    (("version",), True),
    (("version",), "1"),
    (("state",), "half"),
    (("state",), ["whole"]),
    (("size",), -1),
    (("size",), 1.0),
    (("size",), 1 << 63),
    (("size",), True),
    (("mtime-ns",), None),
    (("mtime-ns",), -(1 << 63) - 1),
    (("holds",), "mon"),
    (("holds",), []),
    (("holds",), {}),
    (("holds", "name"), 1),
    (("holds", "name"), "x" * 65),
    (("holds", "id"), None),
    (("holds", "date-sec"), 1 << 32),
    (("holds", "vm-clock-nsec"), 1 << 64),
    (("holds", "digest"), "0" * 63),
    (("holds", "digest"), "0" * 63 + "G"),
    (("holds", "more"), 1),
    (("more",), 1),
    (("since",), GOOD["holds"]),
]


@pytest.mark.parametrize(("where", "value"), CHANGES, ids=str)
def test_what_is_not_a_record_is_refused(where: tuple[str, ...], value: Any) -> None:
    fields = json.loads(json.dumps(GOOD))
    inner = fields
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse(json.dumps(fields).encode())


@pytest.mark.parametrize("key", GOOD)
def test_no_field_may_be_missing_or_be_there_twice(key: str) -> None:
    with pytest.raises(ValueError, match="field|version"):
        parse(json.dumps({k: v for k, v in GOOD.items() if k != key}).encode())
    twice = json.dumps(GOOD)[:-1] + f', "{key}": {json.dumps(GOOD[key])}' + "}"
    with pytest.raises(ValueError, match="twice"):
        parse(twice.encode())


# --- What a snapshot is known by ---


def made(directory: Path, *commands: str) -> Path:
    path = qemu.create(directory / "disk.qcow2", 4 * MiB)
    qemu.io(path, "write -P 1 1M 64k")
    qemu.take(path, "s")
    qemu.io(path, "write -P 2 2M 64k")
    qemu.take(path, "t")
    return path


def known(path: Path, name: str) -> Held:
    with open_image(str(path)) as image:
        found = held(image.snapshot(name))
    assert found is not None
    return found


def test_what_qemu_does_to_the_others_changes_nothing(tmp_path: Path) -> None:
    path = made(tmp_path)
    before = known(path, "s")
    assert (before.id, before.name) == ("1", "s")
    qemu.io(path, "write -P 9 1M 64k", "write -z 2M 64k")
    qemu.take(path, "u")
    qemu.delete(path, "t")  # which sets and clears COPIED bits
    qemu.run("qemu-img", "snapshot", "-a", "s", path)
    qemu.run("qemu-img", "resize", "-q", path, 8 * MiB)
    assert known(path, "s") == before
    assert known(path, "u") != before


@pytest.mark.parametrize("word", [8, 24])  # an L2 entry that is there, and one that is not
def test_other_tables_are_another_snapshot(tmp_path: Path, word: int) -> None:
    path = made(tmp_path)
    before = known(path, "s")
    table = damage.l2_table(path, "s", 0)
    qemu.patch(path, table + word * 8 + 5, b"\x40")
    after = known(path, "s")
    assert after.digest != before.digest
    assert after[:5] == before[:5]


def test_an_active_disk_is_none(tmp_path: Path) -> None:
    with open_image(str(made(tmp_path))) as image:
        assert held(image.active_disk()) is None


def test_long_names_are_cut_and_yet_differ(tmp_path: Path) -> None:
    path = made(tmp_path)
    damage.rename(path, {"s": b"n" * 200 + b"1", "t": b"n" * 200 + b"2"})
    one, two = (known(path, "n" * 200 + end) for end in "12")
    assert one.name == two.name == "n" * 64
    assert one.digest != two.digest
