"""What a directory says of its files: what is written can be read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from qcow2snap_core.format.snapshots import Snapshot
from qcow2snap_core.transfer.manifest import NAME, Entry, Manifest, Stored, parse, text

ONE = Snapshot("1", "one", 2**32 - 1, 10**9 - 1, 2**64 - 1, 7, 512, 2**64 - 2, 0, 0, 0, 0, 24)
TWO = Snapshot("", "\udcff\n\U0001f4be" * 50, 0, 0, 0, 0, 0, None, 0, 0, 0, 0, 24)
STATE = Stored("1.vmstate", 7, "a" * 64)
GOOD = Manifest(
    (
        Entry(ONE, Stored("1.qcow2", 4096, "0" * 64), None, STATE, "f" * 64),
        Entry(TWO, Stored("nächtlich 夜.qcow2", 2**63 - 1, "1" * 64), "1.qcow2"),
    )
)


@pytest.mark.parametrize("manifest", [GOOD, Manifest(), GOOD._replace(active="active.qcow2")])
def test_what_is_written_can_be_read(manifest: Manifest) -> None:
    raw = text(manifest)
    assert raw.isascii()
    assert parse(raw) == manifest


def to(value: object, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        inner: Any = fields
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


FIRST = ("snapshots", 0)
FILE = (*FIRST, "disk", "file")
BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a path": (to("../disk.qcow2", *FILE), "a file's name is none"),
    "an absolute path": (to("/etc/passwd", *FILE), "a file's name is none"),
    "the directory": (to(".", *FILE), "a file's name is none"),
    "the one above": (to("..", *FILE), "a file's name is none"),
    "an option": (to("-n", *FILE), "a file's name is none"),
    "a NUL": (to("a\0b", *FILE), "a file's name is none"),
    "a line feed": (to("a\nb", *FILE), "a file's name is none"),
    "half a character in it": (to("\ud800", *FILE), "a file's name is none"),
    "an empty one": (to("", *FILE), "a file's name is none"),
    "a long one": (to("n" * 256, *FILE), "a file's name is none"),
    "no file": (to(None, *FILE), "a file's name is none"),
    "the manifest": (to(NAME, *FILE), "is there twice"),
    "the active disk": (to("1.qcow2", "active"), "is there twice"),
    "a VM state twice": (to("1.qcow2", *FIRST, "vm-state", "file"), "is there twice"),
    "a VM state that is the next disk": (to("1.vmstate", "snapshots", 1, "disk", "file"), "twice"),
    "a parent that is not there": (to("9.qcow2", "snapshots", 1, "parent"), "not listed before"),
    "a parent that is itself": (to("1.qcow2", *FIRST, "parent"), "not listed before"),
    "a parent that is a VM state": (to("1.vmstate", "snapshots", 1, "parent"), "not listed before"),
    "another order": (lambda fields: fields["snapshots"].reverse(), "not listed before"),
    "a size that is negative": (to(-1, *FIRST, "disk", "size"), "out of bounds"),
    "a size that is true": (to(True, *FIRST, "disk-size"), "out of bounds"),
    "a size that no disk has": (to(1 << 63, *FIRST, "disk-size"), "out of bounds"),
    "a fraction": (to(1.5, *FIRST, "date-sec"), "out of bounds"),
    "a date to come": (to(1 << 32, *FIRST, "date-sec"), "out of bounds"),
    "a clock": (to(1 << 63, *FIRST, "vm-clock-sec"), "out of bounds"),
    "a clock's rest": (to(10**9, *FIRST, "vm-clock-nsec"), "out of bounds"),
    "an icount that is none": (to(2**64 - 1, *FIRST, "icount"), "out of bounds"),
    "no checksum": (to("0" * 63, *FIRST, "disk", "sha256"), "a digest is none"),
    "capitals in it": (to("A" * 64, *FIRST, "disk", "sha256"), "a digest is none"),
    "a digest that is none": (to(1, *FIRST, "digest"), "a digest is none"),
    "a VM state without a file": (to(1, "snapshots", 1, "vm-state-size"), "of a VM state"),
    "a file without a VM state": (to(0, *FIRST, "vm-state-size"), "of a VM state"),
    "a VM state of another size": (to(8, *FIRST, "vm-state", "size"), "of a VM state"),
    "a name that is no text": (to(["x"], *FIRST, "name"), "is no text"),
    "half a character": (to("\ud800", *FIRST, "name"), "an ID or a name is no text"),
    "a name no entry can have": (to("n" * (1 << 16), *FIRST, "name"), "too long"),
    "a field more": (to(1, *FIRST, "more"), "its fields are not those of a snapshot"),
    "a field less": (lambda fields: fields["snapshots"][0].pop("id"), "not those of a snapshot"),
    "a file's field more": (to(1, *FIRST, "disk", "more"), "not those of a file"),
    "another version": (to(2, "version"), "its version is 2"),
    "a version that is true": (to(True, "version"), "it has no version"),
    "a manifest's field more": (to(1, "more"), "not those of a manifest"),
    "snapshots that are none": (to({}, "snapshots"), "no array"),
    "a snapshot that is none": (to("one", *FIRST), "not those of a snapshot"),
    "too many": (to([None] * 65537, "snapshots"), "no array"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_manifest_is_refused(what: str) -> None:
    change, expected = BAD[what]
    fields = json.loads(text(GOOD))
    change(fields)
    with pytest.raises(ValueError, match=expected):
        parse(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "^it is no JSON, or only a part of it$"),
        (text(GOOD)[:-9], "^it is no JSON, or only a part of it$"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"version": 1, "version": 1}', "is there twice"),
        (b'{"version": NaN}', "is no number"),
        ("ü".encode(), "^it is not ASCII$"),
        (b"null", "it has no version"),
        (b'{"version": ' + b"1" * 5000 + b"}", "^a number is out of bounds$"),
    ],
)
def test_what_is_no_object_of_json_is_refused(raw: bytes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse(raw)
