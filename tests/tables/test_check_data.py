"""check --data: what cannot be read or decoded, whose it is, and each cluster once."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from support import catalogue, damage, qemu, secret
from support.badsectors import SECTOR, bad_sectors
from support.command import fails, qcow2snap, qcow2snap_json
from support.qemu import KiB, MiB, RandomImage
from support.vm import machine

from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.tables.check import check
from qcow2snap_core.tables.data import Data
from qcow2snap_core.tables.findings import BAD_ENTRY, MOST, UNREADABLE, Finding

CLUSTER, SIZE = 4 * KiB, 4 * MiB

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "512": {"options": {"cluster_size": 512}, "size": MiB + 512},
    "compressed": {"compressed": True},
    "extended": {"options": {"extended_l2": "on"}, "compressed": True},
}


def found(path: Path | str, snapshot: str | None = None, **options: Any) -> list[Finding]:
    with open_image(str(path), Options(**{"layers": False, **options})) as image:
        chosen = next((s for s in image.snapshots if s.name == snapshot), None)
        return check(image, chosen, data=True)


def test_what_qemu_made_can_be_read(tmp_path: Path) -> None:
    for shape, options in SHAPES.items():
        image = RandomImage(tmp_path / f"{shape}.qcow2", 4, **options)
        for name in image.make():
            assert found(image.path, name) == []
        assert found(image.path) == []


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """One and two share 16 compressed clusters, and 1 MiB of others from 1 MiB on; the second MiB
    is two's and the active disk's alone."""
    path = qemu.create(tmp_path / "disk.qcow2", SIZE, cluster_size=CLUSTER)
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(1).randbytes(300_007).hex().encode())
    packed = (f"write -c -s {noise} {n * CLUSTER} {CLUSTER}" for n in range(16))
    qemu.io(path, *packed, f"write -s {noise} 1M 1M")
    qemu.take(path, "one")
    qemu.io(path, f"write -s {noise} 2M 1M", f"write -P 9 {CLUSTER * 8} {CLUSTER}")
    qemu.take(path, "two")
    return path


def test_a_stream_that_does_not_decode_is_told_once(disk: Path) -> None:
    at, _ = damage.stream(disk, "one", 3 * CLUSTER)
    qemu.patch(disk, at, b"\xff" * 16)
    [finding] = found(disk)
    assert finding.problem == UNREADABLE
    assert finding.snapshots == ("1", "2", "@active")
    assert finding.host == at
    assert "snapshot 'one' (ID 1)" in finding.message
    assert f"guest offset {3 * CLUSTER:#x}: the compressed cluster at host" in finding.message
    assert finding.is_damage
    with open_image(str(disk)) as image:
        assert check(image) == [], "the tables are in order"


def test_what_one_snapshot_has_alone_is_its_own(disk: Path) -> None:
    at, _ = damage.stream(disk, "one", 8 * CLUSTER)  # which two has written over
    qemu.patch(disk, at, b"\xff" * 16)
    assert [f.snapshots for f in found(disk)] == [("1",)]
    assert [f.snapshots for f in found(disk, "one")] == [("1",)]
    assert found(disk, "two") == []


def test_bad_sectors(disk: Path) -> None:
    hosts = [
        qemu.field64(disk, damage.l2_entry(disk, "two", guest)) & damage.OFFSET
        for guest in (MiB, MiB + CLUSTER, 2 * MiB)
    ]
    with bad_sectors(disk, [(host + SECTOR, SECTOR) for host in hosts]) as server:
        findings = found(server.uri)
    assert [(f.problem, f.host) for f in findings] == [(UNREADABLE, host) for host in hosts]
    assert [f.snapshots for f in findings] == [("1", "2", "@active")] * 2 + [("2", "@active")]
    assert all("Input/output error" in f.message for f in findings)


def test_what_the_tables_say_is_not_said_twice(disk: Path) -> None:
    damage.put64(disk, damage.l2_entry(disk, "one", MiB), damage.END_OF_FILE)
    damage.put64(disk, damage.l2_entry(disk, "one", MiB + CLUSTER), 0x200)
    with open_image(str(disk)) as image:
        told = check(image)
    assert {f.problem for f in told} >= {BAD_ENTRY}
    assert found(disk) == told


def distinct(path: Path, snapshots: tuple[str, ...]) -> int:
    """How many clusters with data they have, those that they share once."""
    entries = set()
    for name in snapshots:
        for guest in range(0, SIZE, CLUSTER):
            if damage.l2_table(path, name, guest):
                entry = qemu.field64(path, damage.l2_entry(path, name, guest))
                entries.add((guest, entry & ~(1 << 63)))
    return sum(
        entry >> 62 > 0 or bool(entry & damage.OFFSET and not entry & 1) for _, entry in entries
    )


def test_each_cluster_is_read_once(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.io(disk, "write -z 1M 64k", "discard 2M 64k", "write -P 3 3M 64k")
    qemu.take(disk, "three")
    read: list[int] = []
    original = Data._read
    monkeypatch.setattr(
        Data,
        "_read",
        lambda self, piece, view: (read.append(piece.length), original(self, piece, view)),
    )
    assert found(disk) == []
    expected = distinct(disk, ("one", "two", "three"))  # the last is as the active disk
    assert sum(read) == expected * CLUSTER
    assert len(read) < expected / 10, "neighbours go together"


def test_tables_are_gone_through_once_where_no_bar_is_drawn(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Data] = []
    original = Data._pieces
    monkeypatch.setattr(Data, "_pieces", lambda self: (passes.append(self), original(self))[1])
    assert found(disk) == []
    assert len(passes) == 1


def test_the_last_cluster_of_a_disk_may_end_with_it(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB + 512)
    qemu.io(path, "write -P 5 0 1049088")
    qemu.take(path, "one")
    end = path.stat().st_size
    host = qemu.field64(path, damage.l2_entry(path, "one", MiB)) & damage.OFFSET
    assert found(path) == []
    with bad_sectors(path, [(host + SECTOR, min(64 * KiB, end - host) - SECTOR)]) as server:
        assert found(server.uri) == [], "nobody sees more than a sector of it"
    with bad_sectors(path, [(host, SECTOR)]) as server:
        assert [f.host for f in found(server.uri)] == [host]


def test_a_saved_machine(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE, cluster_size=CLUSTER)
    with machine(path) as vm:
        vm.save("one")
    at = SIZE + 64 * CLUSTER
    host = qemu.field64(path, damage.l2_entry(path, "one", at)) & damage.OFFSET
    assert found(path) == []
    with bad_sectors(path, [(host, SECTOR)]) as server:
        [finding] = found(server.uri, "one")
    assert (finding.host, finding.snapshots) == (host, ("1",))


@pytest.mark.parametrize("kind", ["extl2", "zstd"])
def test_other_tables_and_streams(tmp_path: Path, kind: str) -> None:
    path = catalogue.make(tmp_path, kind)
    assert found(path) == []
    if kind == "zstd":
        at = catalogue.stream(path)
        qemu.patch(path, at, b"\0")
    else:
        at = qemu.field64(path, catalogue.wide_l2(1, 0)(path)) & damage.OFFSET
    bad = [] if kind == "zstd" else [(at, SECTOR)]
    with bad_sectors(path, bad) as server:
        assert [(f.problem, f.host) for f in found(server.uri)] == [(UNREADABLE, at)]


def test_an_external_data_file_is_read(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB, data_file=tmp_path / "data.raw")
    qemu.io(path, "write -P 5 0 1M")
    assert qcow2snap("check", "--data", path) == "no damage found\n"
    os.truncate(tmp_path / "data.raw", MiB - 100)
    [finding] = qcow2snap_json("check", "--data", path, status=3)
    assert (finding["problem"], finding["snapshots"]) == ("data", ["@active"])
    assert "is cut off at the end of the file" in finding["message"]


def test_a_backing_file_need_not_be_there(tmp_path: Path) -> None:
    qemu.create(tmp_path / "base.qcow2", MiB)
    path = qemu.create(tmp_path / "disk.qcow2", MiB, backing=("base.qcow2", "qcow2"))
    qemu.io(path, "write -P 5 0 64k")
    (tmp_path / "base.qcow2").unlink()
    assert qcow2snap("check", "--data", path) == "no damage found\n"


def test_an_encrypted_image_wants_its_passphrase(tmp_path: Path) -> None:
    path, secrets = tmp_path / "disk.qcow2", ("open sesame",)
    secret.create(path, MiB, secrets, **{"encrypt.format": "aes"})
    secret.io(path, secrets, "write -P 5 0 1M")
    secret.take(path, secrets, "one")
    assert qcow2snap("check", path) == "no damage found\n"
    assert "is encrypted: add --passphrase +FILE" in fails("check", "--data", path)
    given = ("--passphrase", "open sesame")
    assert qcow2snap("check", "--data", *given, path) == "no damage found\n"
    host = qemu.field64(path, damage.l2_entry(path, "one", 0)) & damage.OFFSET
    with bad_sectors(path, [(host, SECTOR)]) as server:
        said = qcow2snap("check", "--data", *given, server.uri, status=3)
    assert said.startswith("data: snapshot 'one' (ID 1) of ")
    assert said.endswith("Input/output error [1, @active]\n")


def test_there_is_an_end_to_what_is_told(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB, cluster_size=512)
    qemu.io(path, "write -P 5 0 1M")
    qemu.take(path, "one")
    guests = range(0, MiB // 2 + 64 * KiB, 512)
    hosts = [qemu.field64(path, damage.l2_entry(path, "one", guest)) for guest in guests]
    with bad_sectors(path, [(host & damage.OFFSET, SECTOR) for host in hosts]) as server:
        assert len(found(server.uri)) == MOST
