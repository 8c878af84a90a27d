"""A disk that is larger than its L1 table covers.  QEMU makes every table large enough, so this is
damage: what the table covers is served, what it does not cover is an error and never zeros."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.command import fails, qcow2snap, qcow2snap_json, run
from support.qemu import KiB, MiB
from support.server import block_status, serve
from support.tables import Entry, write_table

from qcow2snap_core.errors import ImageError
from qcow2snap_core.image.opener import open_image
from qcow2snap_core.tables.diff import changes

L1_SIZE, HEADER_L1_SIZE, DISK_SIZE = 8, 36, 48  # in an entry, the header, an entry


def extra(size: int) -> bytes:
    return struct.pack(">QQQ", 0, size, 0)


def shorten(path: Path, entries: int, recorded: bytes | None = None) -> None:
    """Give the snapshot an L1 table of that many entries, and other extra data."""
    s = qemu.snapshots(path)["s"]
    data = extra(s.disk_size) if recorded is None else recorded
    write_table(path, [Entry(b"1", b"s", s.l1_table_offset, entries, extra=data)])


def failed(client: nbd.NBD, length: int, offset: int) -> bool:
    """Whether reads and extents of that range are answered with EIO."""
    found = set()
    for ask in (
        lambda: client.pread(length, offset),
        lambda: block_status(client, offset, length),
    ):
        try:
            ask()
            found.add(0)
        except nbd.Error as e:
            found.add(e.errnum)
    assert len(found) == 1, found
    return found == {errno.EIO}


def make(
    directory: Path, extended: str, backing: tuple[object, str] | None = None
) -> tuple[Path, int]:
    """Four L1 entries, each a different byte in all that it maps; what one maps."""
    cluster = 16 * KiB if extended == "on" else 4 * KiB
    per_entry = cluster * cluster // (16 if extended == "on" else 8)
    options = {"cluster_size": cluster, "extended_l2": extended}
    path = qemu.create(directory / "disk.qcow2", 4 * per_entry, backing=backing, **options)
    qemu.io(path, *(f"write -P {n + 1} {n * per_entry} {per_entry}" for n in range(4)))
    qemu.take(path, "s")
    return path, per_entry


def pattern(per_entry: int, entries: int) -> bytes:
    return b"".join(bytes([n + 1]) * per_entry for n in range(entries))


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize("entries", [0, 1, 2])
def test_only_what_the_table_covers_is_served(
    tmp_path: Path, entries: int, extended: str, backed: bool
) -> None:
    """Nor is it the layer's below, which may be as old as the oldest snapshot."""
    below = None
    if backed:
        (tmp_path / "below.raw").write_bytes(b"\x09" * 64 * MiB)
        below = "below.raw", "raw"
    path, per_entry = make(tmp_path, extended, below)
    shorten(path, entries)
    reach = entries * per_entry
    with serve(file=path) as server, server.connect("s", extents=True) as client:
        assert client.get_size() == 4 * per_entry
        if entries:
            assert client.pread(reach, 0) == pattern(per_entry, entries)
            assert block_status(client, 0, reach) == [(0, reach, 0)]
            assert failed(client, 1024, reach - 512)
        for at in (reach, reach + 5000, 4 * per_entry - 512):
            assert failed(client, 512, at)
        assert (
            f"guest offset {reach:#x}: its L1 table of {entries} entries covers only {reach} bytes"
            in server.log
        )


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("extended", ["off", "on"])
@pytest.mark.parametrize("recorded", [b"", bytes(8), bytes(12)], ids=len)
def test_an_old_entry_without_a_size_goes_on_as_it_did(
    tmp_path: Path, extended: str, recorded: bytes, backed: bool
) -> None:
    """Its size is the active disk's, which may have grown since."""
    below = None
    if backed:
        (tmp_path / "below.raw").write_bytes(b"\x09" * 64 * MiB)
        below = "below.raw", "raw"
    path, per_entry = make(tmp_path, extended, below)
    shorten(path, 2, recorded)
    rest = 2 * per_entry
    byte = b"\x09" if backed else b"\0"
    with serve(file=path) as server:
        assert server.read("s") == pattern(per_entry, 2) + byte * rest
        held = [(0, 2 * rest, 0)] if backed else [(0, rest, 0), (rest, rest, 3)]
        assert server.extents("s") == held


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """Three snapshots of 1 MiB, of which "bad" says that it has 2^62 bytes."""
    path = qemu.create(tmp_path / "disk.qcow2", MiB, cluster_size=512)
    for n, name in enumerate(("old", "bad", "new")):
        qemu.io(path, f"write -P {n + 1} {n * 64}k 256k")
        qemu.take(path, name)
    entry = qemu.snapshots(path)["bad"].entry_offset
    qemu.patch(path, entry + DISK_SIZE, struct.pack(">Q", 1 << 62))
    return path


def test_a_size_of_exabytes(huge: Path) -> None:
    with serve(file=huge) as server:
        with server.connect("bad", extents=True) as client:
            assert client.get_size() == 1 << 62
            content = client.pread(MiB, 0)
            assert content == qemu.content(huge, "bad")[:MiB]  # which has the active disk's size
            assert block_status(client, 0, MiB) == [(0, 320 * KiB, 0), (320 * KiB, 704 * KiB, 3)]
            for at in (MiB, 1 << 40, (1 << 62) - 512):
                assert failed(client, 512, at)
            assert failed(client, 1024, MiB - 512)
        for name in ("old", "new"):
            assert server.read(name) == qemu.content(huge, name)


def test_the_commands_say_so(huge: Path, tmp_path: Path) -> None:
    said = "guest offset 0x100000: its L1 table of 32 entries covers only 1048576 bytes"
    assert said in fails("map", huge, "bad")
    assert said in fails("diff", huge, "old", "bad")
    assert qcow2snap("diff", huge, "bad", "old")  # which ends where the table does
    assert said in fails("split", huge, tmp_path / "chain")
    assert not (tmp_path / "chain").exists()
    assert said in fails("copy", huge, "bad", tmp_path / "copy")


def test_check_finds_it(huge: Path) -> None:
    (found,) = qcow2snap_json("check", huge, status=3)
    assert (found["problem"], found["snapshots"]) == ("table", ["2"])
    assert f"an L1 table that ends at {MiB} of the {1 << 62} bytes" in found["message"]
    assert qcow2snap_json("check", huge, "new") == []
    assert qcow2snap_json("check", huge, "bad", status=3) == [found]


def test_list_and_its_picture(huge: Path) -> None:
    """What deleting it would free is behind the table that there is."""
    said = run("list", huge, "--json")  # and on standard error that the entry is odd
    listed = json.loads(said.stdout)
    assert listed[1]["disk-size"] == 1 << 62
    picture = run("list", "--tree", huge).stdout.splitlines()
    assert "?" in picture[1]
    assert "?" not in picture[0] + picture[2]
    assert set(picture[1].split()[-1][1:]) == {"?"}
    entry = qemu.snapshots(huge)["bad"].entry_offset
    qemu.patch(huge, entry + DISK_SIZE, struct.pack(">Q", MiB))
    assert [s["exclusive-size"] for s in qcow2snap_json("list", huge)] == [
        s["exclusive-size"] for s in listed
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_difference_is_told_up_to_where_both_tables_go(tmp_path: Path, swapped: bool) -> None:
    """Two snapshots of one size, of which one lost half of its L1 table: not even where both
    have nothing are they said to be equal."""
    path = qemu.create(tmp_path / "disk.qcow2", 8 * MiB, cluster_size=4 * KiB)
    qemu.io(path, "write -P 1 0 64k")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 0 4k", "write -P 2 8k 4k")
    qemu.take(path, "two")
    names = ["two", "one"] if swapped else ["one", "two"]
    entry = qemu.snapshots(path)["one"].entry_offset
    qemu.patch(path, entry + L1_SIZE, struct.pack(">I", 2))
    with open_image(str(path)) as image:
        found = changes(*(image.snapshot(name) for name in names))
        assert next(found) == (0, 4 * KiB, 0)
        with pytest.raises(ImageError, match="'one'.*guest offset 0x400000: its L1 table of 2 ent"):
            next(found)


@pytest.mark.parametrize("extended", ["off", "on"])
def test_a_backing_file_that_qemu_would_not_open(tmp_path: Path, extended: str) -> None:
    base, per_entry = make(tmp_path, extended)
    base = base.rename(tmp_path / "base.qcow2")
    top = qemu.create(tmp_path / "top.qcow2", 4 * per_entry, backing=(base.name, "qcow2"))
    qemu.io(top, f"write -P 7 {3 * per_entry} 64k")
    qemu.take(top, "s")
    expected = qemu.content(top, "s")
    qemu.patch(base, HEADER_L1_SIZE, struct.pack(">I", 2))
    with pytest.raises(AssertionError, match="L1 table is too small"):
        qemu.content(top, "s")
    with serve(file=top) as server, server.connect("s", extents=True) as client:
        assert client.pread(2 * per_entry, 0) == expected[: 2 * per_entry]
        assert client.pread(64 * KiB, 3 * per_entry) == expected[3 * per_entry :][: 64 * KiB]
        for at in (2 * per_entry, 3 * per_entry - 512, 3 * per_entry + 64 * KiB):
            assert failed(client, 512, at)
        assert "base.qcow2" in server.log
    (found,) = qcow2snap_json("check", base, status=3)
    assert found["snapshots"] == ["@active"]
    assert f"its L1 table covers only {2 * per_entry} of {4 * per_entry}" in found["message"]
    done = run("join", top, tmp_path / "out.qcow2")
    assert (done.returncode, "its L1 table of 2 entries" in done.stderr) == (1, True)
    assert not (tmp_path / "out.qcow2").exists()


def test_a_vm_state_that_its_table_does_not_reach(tmp_path: Path) -> None:
    """Also of an old entry: a state never grew after it was saved."""
    path = qemu.create(tmp_path / "disk.qcow2", 2 * MiB, cluster_size=4 * KiB)
    qemu.io(path, "write -P 1 0 2M")
    qemu.take(path, "s")
    s = qemu.snapshots(path)["s"]
    for data in (struct.pack(">QQQ", 8 * KiB, 2 * MiB, 0), b""):
        entry = Entry(b"1", b"s", s.l1_table_offset, 1, vm_state_size=8 * KiB, extra=data)
        write_table(path, [entry])
        with serve(file=path) as server:
            assert server.read("s") == b"\x01" * 2 * MiB
            with server.connect("s/vmstate", extents=True) as client:
                assert failed(client, 512, 0)
                assert failed(client, 8 * KiB, 0)
        findings = qcow2snap_json("check", path, status=3)
        (found,) = [f for f in findings if f["message"].startswith("VM state")]
        assert f"VM state of snapshot 's' (ID 1) of '{path}'" in found["message"]
        assert f"covers only 0 of {8 * KiB} bytes" in found["message"]
