"""qcow2snap diff: what a script copies by it makes the new content, as QEMU sees it, of the old."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from support import qemu
from support.command import fails, on_terminal, qcow2snap, qcow2snap_json, run
from support.qemu import KiB, MiB, RandomImage


def applied(old: bytes, new: bytes, found: list[dict[str, int]]) -> bytes:
    """A backup at ``old`` after the ranges were copied to it."""
    result = bytearray(old[: len(new)].ljust(len(new), b"\xee"))
    for extent in found:
        offset, length, kind = extent["offset"], extent["length"], extent["type"]
        end = offset + length
        result[offset:end] = bytes(length) if kind == 3 else new[offset:end]
    return bytes(result)


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}, {"compat": "0.10"}])
def test_a_backup_goes_from_snapshot_to_snapshot(tmp_path: Path, options: dict[str, str]) -> None:
    image = RandomImage(tmp_path / "disk.qcow2", 3, options=dict(options), compressed=True)
    names = image.make()
    backup = qemu.snapshot_content(image.path, names[0])
    for old, new in [*pairwise(names), (names[-1], "@active")]:
        expected = (
            qemu.content(image.path) if new == "@active" else qemu.snapshot_content(image.path, new)
        )
        found = qcow2snap_json("diff", image.path, old, new)
        assert all(list(extent) == ["offset", "length", "type"] for extent in found)
        backup = applied(backup, expected, found)
        assert backup == expected


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", 8 * MiB)
    qemu.io(path, "write -P 1 0 4M")
    qemu.take(path, "old")
    qemu.io(path, "write -P 2 1M 128k", "write -z -u 2M 1M")
    qemu.take(path, "new")
    return path


def test_the_text_is_in_nbdinfos_columns(disk: Path) -> None:
    assert qcow2snap("diff", disk, "old", "new").splitlines() == [
        "   1048576      131072    0  data",
        "   2097152     1048576    3  hole,zero",
    ]


def test_a_terminal_shows_the_totals(disk: Path) -> None:
    assert on_terminal("diff", disk, "old", "new")[2:] == [
        "128 KiB to copy, 1 MiB now zero, of 8 MiB"
    ]
    assert on_terminal("diff", disk, "new", "new") == ["0 B to copy, 0 B now zero, of 8 MiB"]


def test_nothing_changed(disk: Path) -> None:
    assert qcow2snap("diff", disk, "new", "new") == ""
    assert qcow2snap_json("diff", disk, "new", "@active") == []


def test_a_snapshot_named_active_wins(disk: Path) -> None:
    qemu.take(disk, "@active")
    qemu.io(disk, "write -P 3 0 64k")
    assert qcow2snap_json("diff", disk, "new", "@active") == []


def test_errors_are_one_line(disk: Path) -> None:
    assert "no snapshot 'older'" in fails("diff", disk, "older", "new")
    assert run("diff", disk, "old").returncode == 2


def test_an_encrypted_image_needs_no_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    secret = ["--object", "secret,id=s,data=x"]
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, path, MiB)
    opened = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    for name in ("old", "new"):
        qemu.run("qemu-io", *secret, "--image-opts", opened, "-c", "write -P 1 64k 64k")
        qemu.run("qemu-img", "snapshot", *secret, "-c", name, "--image-opts", opened)
    assert qcow2snap_json("diff", path, "old", "new") == [
        {"offset": 64 * KiB, "length": 64 * KiB, "type": 0}
    ]
