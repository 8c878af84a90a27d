"""What is salvaged of a damaged snapshot: every byte outside the losses is QEMU's, and the losses
are no larger than the damage."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import catalogue, damage, qemu, secret
from support.badsectors import SECTOR, bad_sectors
from support.catalogue import CASES, Case
from support.mutants import KINDS, mutants, qemus
from support.qemu import KiB, MiB
from support.vm import machine

from qcow2snap_core.errors import Error, SnapshotGone, StorageError, UsageError
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.mapping import Budget
from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.tables.lost import Range, ranges
from qcow2snap_core.transfer import salvage as module
from qcow2snap_core.transfer.mover import PIECE, cut
from qcow2snap_core.transfer.salvage import Salvage

TiB = 1 << 40
CLUSTER, SIZE = 4 * KiB, 4 * MiB  # an L2 table maps 2 MiB, a sector of it 256 KiB

Ranges = list[tuple[int, int]]  # offset, length


@contextmanager
def opened(path: Path | str, snapshot: str) -> Iterator[Disk]:
    with open_image(str(path), Options(slice_bytes=SECTOR)) as image:
        yield image.snapshot(snapshot)


def salvaged(disk: Disk) -> tuple[bytes, Ranges]:
    """All that can be read, as a copy reads it, and what was lost."""
    salvage = Salvage(disk)
    found = bytearray(disk.size)
    at = 0
    for offset, length, kind in cut(salvage.plan()):
        assert offset == at, "a gap in the plan"
        at += length
        if kind == 0:
            salvage.pread_into(memoryview(found)[offset:at], offset)
    assert at == disk.size
    losses = salvage.losses()
    assert all(loss.why.isprintable() and loss.why for loss in losses)
    return bytes(found), [(loss.offset, loss.length) for loss in losses]


def assert_same(found: bytes, expected: bytes, lost: Ranges) -> None:
    """Equal outside of what was lost, and zeros there."""
    assert len(found) == len(expected)
    wanted = bytearray(expected)
    for offset, length in lost:
        wanted[offset : offset + length] = bytes(length)
    assert found == wanted


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    joined: Ranges = []
    for offset, length in sorted(ranges):
        if joined and offset <= sum(joined[-1]):
            start = joined[-1][0]
            joined[-1] = start, max(sum(joined[-1]), offset + length) - start
        else:
            joined.append((offset, length))
    return joined


# --- Fields and streams ---


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    directory = tmp_path_factory.mktemp("bases")
    kinds = {case.kind for case in CASES}
    paths = {kind: catalogue.make(directory, kind) for kind in kinds}
    return {kind: (path, qemu.content(path, "BAD")) for kind, path in paths.items()}


DAMAGED = [case for case in CASES if isinstance(case.outcome, range)]


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.name)
def test_what_a_damaged_field_leads_to_is_lost_and_nothing_else(
    tmp_path: Path, bases: dict[str, tuple[Path, bytes]], case: Case
) -> None:
    base, expected = bases[case.kind]
    path = tmp_path / "disk.qcow2"
    path.write_bytes(base.read_bytes())
    case.apply(path)
    size = 16 * KiB if case.kind == "extl2" else catalogue.CLUSTER
    with opened(path, "BAD") as disk:
        found, lost = salvaged(disk)
    assert isinstance(case.outcome, range)
    assert lost == [(case.outcome.start * size, len(case.outcome) * size)]
    assert_same(found, expected, lost)


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_lose_what_cannot_be_read_and_no_byte_is_wrong(tmp_path: Path, kind: str) -> None:
    lossy = compared = 0
    for path, what in mutants(tmp_path, kind, range(1000, 1016)):
        try:
            with opened(path, "BAD") as disk:
                if disk.size > 4 * MiB:
                    continue
                found, lost = salvaged(disk)
        except Error:
            continue  # it cannot be opened
        expected = qemus(path, qemu.snapshots(path)["BAD"], len(found))
        if expected is not None:
            try:
                assert_same(found, expected, lost)
            except AssertionError as e:
                raise AssertionError(what) from e
            compared += 1
        lossy += bool(lost)
    assert compared > 4
    assert lossy > 0


# --- The end of the file, and bad sectors ---


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of noise whose data lies behind all tables, in no order; 64 KiB of it compressed, and
    some zeros at its end."""
    path = qemu.create(tmp_path_factory.mktemp("plain") / "disk.qcow2", SIZE, cluster_size=CLUSTER)
    noise = path.with_name("noise")
    noise.write_bytes(random.Random(1).randbytes(300_007).hex().encode())
    packed = (f"write -c -s {noise} {n * CLUSTER} {CLUSTER}" for n in range(16))
    qemu.io(path, *packed, f"write -s {noise} 64k {SIZE - 256 * KiB}")
    qemu.take(path, "one")
    content = qemu.content(path, "one")
    numbers = [n for n in range(16, SIZE // CLUSTER) if any(content[n * CLUSTER :][:CLUSTER])]
    random.Random(2).shuffle(numbers)
    end = -(-path.stat().st_size // CLUSTER) * CLUSTER
    with open(path, "r+b") as f:
        f.seek(end)
        f.writelines(content[n * CLUSTER :][:CLUSTER] for n in numbers)
    for k, n in enumerate(numbers):
        damage.put64(path, damage.l2_entry(path, "one", n * CLUSTER), end + k * CLUSTER)
    assert qemu.content(path, "one") == content
    return path


def places(path: Path, snapshot: str) -> dict[int, int]:
    """{guest offset: host offset} of each cluster that is not compressed."""
    found = {}
    for guest in range(0, SIZE, CLUSTER):
        if table := damage.l2_table(path, snapshot, guest):
            entry = qemu.field64(path, table + 8 * (guest // CLUSTER % (CLUSTER // 8)))
            if entry and not entry & 1 << 62:
                found[guest] = entry & damage.OFFSET
    return found


def in_guest(path: Path, bad: Iterable[tuple[int, int]]) -> Ranges:
    """What of a guest's disk lies in ranges of the file."""
    return merged(
        (guest + start - host, stop - start)
        for guest, host in places(path, "one").items()
        for offset, length in bad
        if (start := max(host, offset)) < (stop := min(host + CLUSTER, offset + length))
    )


@pytest.mark.parametrize("missing", [1, 512, 5000, 123_457, 2 * MiB])
def test_of_a_file_that_was_cut_off_what_is_missing_is_lost(
    tmp_path: Path, plain: Path, missing: int
) -> None:
    expected = qemu.content(plain, "one")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(plain.read_bytes()[:-missing])
    end = path.stat().st_size // SECTOR * SECTOR
    with opened(path, "one") as disk:
        found, lost = salvaged(disk)
    assert lost == in_guest(plain, [(end, MiB * 100)])
    assert_same(found, expected, lost)


def test_bad_sectors_are_lost_one_by_one(plain: Path) -> None:
    expected = qemu.content(plain, "one")
    hosts = list(places(plain, "one").values())
    rng = random.Random(3)
    bad = {host + rng.randrange(8) * SECTOR: SECTOR for host in rng.sample(hosts, 20)}
    bad[hosts[700]] = CLUSTER
    at, _ = damage.stream(plain, "one", 5 * CLUSTER)
    bad[at // SECTOR * SECTOR + SECTOR] = SECTOR  # in the middle of a stream
    with bad_sectors(plain, bad.items()) as server, opened(server.uri, "one") as disk:
        found, lost = salvaged(disk)
    packed = [n for n in range(16) if _holds(plain, n * CLUSTER, at // SECTOR * SECTOR + SECTOR)]
    assert packed
    streams = [(n * CLUSTER, CLUSTER) for n in packed]
    assert lost == merged([*in_guest(plain, bad.items()), *streams])
    assert_same(found, expected, lost)


def _holds(path: Path, guest: int, sector: int) -> bool:
    """Whether the stream of a compressed cluster needs a sector of the file."""
    at, more = damage.stream(path, "one", guest)
    first = at // SECTOR * SECTOR
    return first <= sector <= first + more * SECTOR


def test_a_bad_sector_of_a_table_loses_what_has_its_entries_there(plain: Path) -> None:
    expected = qemu.content(plain, "one")
    table = damage.l2_table(plain, "one", 2 * MiB)
    bad = [(table + SECTOR, SECTOR)]
    with bad_sectors(plain, bad) as server, opened(server.uri, "one") as disk:
        found, lost = salvaged(disk)
    assert lost == [(2 * MiB + 64 * CLUSTER, 64 * CLUSTER)]
    assert_same(found, expected, lost)


def test_a_bad_sector_of_the_l1_table_loses_what_is_behind_its_entries(tmp_path: Path) -> None:
    """Clusters of 512 bytes: an L1 table of two sectors, each of whose entries is for 32 KiB."""
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB, cluster_size=512)
    qemu.io(path, "write -P 5 0 4M")
    qemu.take(path, "one")
    expected = qemu.content(path, "one")
    l1 = qemu.snapshots(path)["one"].l1_table_offset
    with bad_sectors(path, [(l1 + SECTOR, SECTOR)]) as server, opened(server.uri, "one") as disk:
        found, lost = salvaged(disk)
    assert lost == [(2 * MiB, 2 * MiB)]
    assert_same(found, expected, lost)


def test_a_layer_below_is_gone_through_in_the_same_way(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", SIZE, cluster_size=CLUSTER)
    qemu.io(base, f"write -P 7 0 {SIZE}")
    path = qemu.create(tmp_path / "disk.qcow2", SIZE + MiB, backing=("base.qcow2", "qcow2"))
    qemu.io(path, "write -P 9 128k 64k", f"write -P 8 {SIZE - 64 * KiB} 128k")
    qemu.take(path, "one")
    expected = qemu.content(path, "one")
    l1 = qemu.field64(base, 40)
    table = qemu.field64(base, l1 + 8) & damage.OFFSET
    damage.put64(base, table + 8 * 3, damage.END_OF_FILE)
    damage.put64(base, l1, 1)  # all that is behind the first entry, but for what lies above
    with opened(path, "one") as disk:
        found, lost = salvaged(disk)
    assert lost == [
        (0, 128 * KiB),
        (192 * KiB, 2 * MiB - 192 * KiB),
        (2 * MiB + 3 * CLUSTER, CLUSTER),
    ]
    assert_same(found, expected, lost)


def test_a_raw_file_below_loses_bad_sectors(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(MiB))
    path = qemu.create(tmp_path / "disk.qcow2", 2 * MiB, backing=("base.raw", "raw"))
    qemu.take(path, "one")
    with opened(path, "one") as disk:
        os.truncate(base, MiB // 2 + 100)  # under its reader
        found, lost = salvaged(disk)
    assert lost == [(MiB // 2, MiB // 2)]
    assert found == base.read_bytes()[: MiB // 2].ljust(2 * MiB, b"\0")


@pytest.mark.parametrize("form", ["luks", "aes"])
def test_of_an_encrypted_cluster_bad_sectors_alone_are_lost(tmp_path: Path, form: str) -> None:
    path, secrets = tmp_path / "disk.qcow2", ("open sesame",)
    secret.create(path, MiB, secrets, **{"encrypt.format": form})
    secret.io(path, secrets, "write -P 5 0 1M")
    secret.take(path, secrets, "one")
    expected = secret.content(path, secrets, "one")
    host = qemu.field64(path, damage.l2_entry(path, "one", 128 * KiB)) & damage.OFFSET
    with bad_sectors(path, [(host + 7 * SECTOR, 2 * SECTOR)]) as server:
        options = Options(slice_bytes=SECTOR, passphrases={0: b"open sesame"})
        with open_image(server.uri, options) as image:
            found, lost = salvaged(image.snapshot("one"))
    assert lost == [(128 * KiB + 7 * SECTOR, 2 * SECTOR)]
    assert_same(found, expected, lost)


def test_a_saved_machine_is_salvaged_as_well(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB, cluster_size=CLUSTER)
    with machine(path) as vm:
        vm.save("one")
    with opened(path, "one") as disk:
        assert disk.size == 4 * MiB
    at = 4 * MiB + 64 * CLUSTER  # where the state is, for L2 tables of 2 MiB
    damage.put64(path, damage.l2_entry(path, "one", at), damage.END_OF_FILE)
    expected = qemu.content(qemu.as_active(path, "one", vm_state=True))[4 * MiB :]
    with open_image(str(path), Options(slice_bytes=SECTOR)) as image:
        found, lost = salvaged(image.disk(image.snapshots[0], vm_state=True))
    assert lost == [(64 * CLUSTER, CLUSTER)]
    assert_same(found, expected[: len(found)], lost)


# --- What is no damage, and what it costs ---


def test_a_deleted_snapshot_is_not_salvaged(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 5 0 1M")
    qemu.take(path, "one")
    damage.put64(path, damage.l2_entry(path, "one", 0), damage.END_OF_FILE)
    with opened(path, "one") as disk:
        salvage = Salvage(disk)
        assert [e.type for e in salvage.plan()] == [3, 0]
        entry = qemu.snapshots(path)["one"].entry_offset
        qemu.patch(path, entry + damage.SNAPSHOT_FIELDS["date_nsec"], b"\x77")
        with pytest.raises(SnapshotGone):
            list(salvage.plan())
        for offset in (0, 512 * KiB):
            with pytest.raises(SnapshotGone):
                salvage.pread_into(bytearray(64 * KiB), offset)


def test_a_snapshot_may_be_deleted_while_parts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 5 0 1M")
    qemu.take(path, "one")
    damage.put64(path, damage.l2_entry(path, "one", 0), damage.END_OF_FILE)
    entry = qemu.snapshots(path)["one"].entry_offset

    def then_deleted(disk: Disk, offset: int, length: int) -> Iterator[Range]:
        yield from ranges(disk, offset, length)
        qemu.patch(path, entry + damage.SNAPSHOT_FIELDS["date_nsec"], b"\x77")

    with opened(path, "one") as disk:
        monkeypatch.setattr(module, "ranges", then_deleted)  # asked before the parts are read
        with pytest.raises(SnapshotGone):
            Salvage(disk).pread_into(bytearray(128 * KiB), 0)


def test_of_a_terabyte_behind_damaged_entries_not_every_cluster_is_asked_for(
    tmp_path: Path,
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", TiB)
    qemu.io(path, "write -P 5 0 1M", f"write -P 6 {TiB - MiB} 1M")
    qemu.take(path, "one")
    s = qemu.snapshots(path)["one"]
    last = damage.l1_entry(path, "one", TiB - MiB)
    qemu.patch(path, s.l1_table_offset, b"\0\0\0\0\0\0\0\1" * (s.l1_size - 1))
    began = time.thread_time()
    with opened(path, "one") as disk:
        salvage = Salvage(disk)
        assert sum(e.length for e in salvage.plan() if e.type == 0) == MiB
        assert [(x.offset, x.length) for x in salvage.losses()] == [(0, TiB - 512 * MiB)]
    damage.put64(path, last, damage.END_OF_FILE)  # an L2 table that is not there
    with opened(path, "one") as disk:
        salvage = Salvage(disk)
        assert {e.type for e in salvage.plan()} == {3}
        assert [(x.offset, x.length) for x in salvage.losses()] == [(0, TiB)]
    assert time.thread_time() - began < 2


def test_there_is_an_end_to_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other entry of an L2 table is bad, and all of the L1 table lead to it."""
    path = qemu.create(tmp_path / "disk.qcow2", SIZE, cluster_size=CLUSTER)
    qemu.io(path, f"write -P 5 0 {SIZE}")
    qemu.take(path, "one")
    table = damage.l2_table(path, "one", 0)
    for n in range(0, CLUSTER // 8, 2):
        damage.put64(path, table + 8 * n, 0x200)
    damage.put64(path, damage.l1_entry(path, "one", 2 * MiB), table)
    monkeypatch.setattr(module, "_MOST_REASONS", 100)
    with opened(path, "one") as disk:
        salvage = Salvage(disk)
        for _ in range(2):  # as a copy goes through the plan
            assert sum(e.type == 3 for e in salvage.plan()) == 512
        losses = salvage.losses()
        assert [(x.offset, x.length) for x in losses] == [
            (n * CLUSTER, CLUSTER) for n in range(0, SIZE // CLUSTER, 2)
        ]
        assert [bool(x.why) for x in losses] == [True] * 100 + [False] * 412
        monkeypatch.setattr(module, "_MOST", 511)
        with pytest.raises(UsageError, match="more than 511 ranges of it cannot be read"):
            list(salvage.plan())


def test_a_server_that_is_gone_is_no_bad_sector(plain: Path) -> None:
    with bad_sectors(plain, []) as server, open_image(server.uri) as image:
        active = Salvage(image.active_disk())
        list(active.plan())
        server.kill()
        with pytest.raises(StorageError):
            active.pread_into(bytearray(PIECE), 0)
    with bad_sectors(plain, []) as server, opened(server.uri, "one") as disk:
        salvage = Salvage(disk)
        assert all(e.length for e in salvage.plan())
        server.kill()
        with pytest.raises(StorageError):
            salvage.pread_into(bytearray(PIECE), 0)
        with pytest.raises(StorageError):
            list(Salvage(disk).plan())


@pytest.mark.parametrize(
    ("bad", "most", "seconds"), [(SECTOR, 8 * KiB, 40), (2 * MiB, 2 * MiB, 40)]
)
def test_what_a_slow_error_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, most: int, seconds: int
) -> None:
    """On a clock that goes on by seven seconds with each read that fails, and not otherwise."""
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB)
    qemu.io(path, "write -P 5 0 4M")
    qemu.take(path, "one")
    host = qemu.field64(path, damage.l2_entry(path, "one", 2 * MiB)) & damage.OFFSET
    now = 0.0
    original = Disk.fill

    def slow(self: Disk, buffer: memoryview, offset: int, budget: Budget | None = None) -> None:
        nonlocal now
        try:
            original(self, buffer, offset, budget)
        except StorageError:
            now += 7
            raise

    monkeypatch.setattr(Disk, "fill", slow)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    with bad_sectors(path, [(host, bad)]) as server, opened(server.uri, "one") as disk:
        found, lost_ = salvaged(disk)
    assert now <= seconds
    [(offset, length)] = lost_
    assert (offset, length <= most) == (2 * MiB, True)
    assert_same(found, b"\5" * 4 * MiB, lost_)


def test_a_slow_disk_gets_some_time_for_a_bad_range(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a MiB of sectors at 3 ms each would be 6 s."""
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    expected = qemu.content(plain, "one")
    hosts = places(plain, "one")
    bad = [(hosts[guest], CLUSTER) for guest in hosts if MiB <= guest < 3 * MiB // 2]
    slow = ("--filter=delay", "rdelay=3ms")
    with bad_sectors(plain, bad, *slow) as server, opened(server.uri, "one") as disk:
        salvage = Salvage(disk)
        found = bytearray(2 * MiB)
        began = time.monotonic()
        salvage.pread_into(found, 0)
        assert time.monotonic() - began < 5
    lost = [(loss.offset, loss.length) for loss in salvage.losses()]
    assert sum(length for _, length in lost) < MiB
    assert lost[0][0] <= MiB <= sum(lost[0])
    assert_same(bytes(found), expected[: 2 * MiB], lost)
