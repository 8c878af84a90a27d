"""What cannot be read is EIO, for exactly the clusters that need it, with one line in the log; the
rest of the disk, the other snapshots and the other clients are served on."""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest
from support import damage, qemu
from support.qemu import KiB, MiB
from support.server import Server, block_status, serve

# 4 KiB clusters: an L2 table maps 2 MiB, so the disk has two.
CLUSTER, SIZE = 4 * KiB, 4 * MiB
BAD = 5  # the cluster that is damaged
TABLE = 2 * MiB // CLUSTER  # clusters behind one L2 table


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """All data; "plain" of standard clusters, "packed" with compressed ones in both tables."""
    path = qemu.create(tmp_path / "disk.qcow2", SIZE, cluster_size=CLUSTER)
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(1000).hex().encode())
    qemu.io(path, *(f"write -c -s {noise} {n * CLUSTER} {CLUSTER}" for n in range(16)))
    qemu.io(path, f"write -c -P 1 {SIZE // 2} {CLUSTER}")
    qemu.take(path, "packed")
    qemu.io(path, f"write -s {noise} 0 {SIZE}")
    qemu.take(path, "plain")
    qemu.io(path, f"write -P 3 0 {SIZE}")
    return path


def l2(path: Path, change: Callable[[int], int], snapshot: str = "plain") -> None:
    at = damage.l2_entry(path, snapshot, BAD * CLUSTER)
    damage.put64(path, at, change(qemu.field64(path, at)))


def l1(path: Path, value: int) -> None:
    damage.put64(path, damage.l1_entry(path, "plain", 0), value)


def shorter_stream(entry: int) -> int:
    """The descriptor with no sector beyond the first: the noise needs about five."""
    return entry & (1 << 58) - 1 | 1 << 62


def garbage(path: Path) -> None:
    """A deflate block of the reserved type, which no stream may hold."""
    offset, _ = damage.stream(path, "packed", BAD * CLUSTER)
    qemu.patch(path, offset, b"\xff" * 16)


PAST = damage.END_OF_FILE
ONE, WHOLE_TABLE = range(BAD, BAD + 1), range(TABLE)

# What is damaged; whose; clusters that are lost; whether extents need it; what the log says.
DAMAGES: dict[str, tuple[Callable[[Path], None], str, range, bool, str]] = {
    "unaligned": (
        lambda p: l2(p, lambda e: e | 0x200), "plain", ONE, True,
        r"an L2 entry holds the unaligned host offset 0x[0-9a-f]+200$"),
    "reserved-bits": (
        lambda p: l2(p, lambda e: e | 2), "plain", ONE, True,
        r"the L2 entry 0x[0-9a-f]{16} has reserved bits set$"),
    "data-past-end": (
        lambda p: l2(p, lambda e: PAST), "plain", ONE, True,
        r"the data cluster at host offset 0x10000000000 lies past the end of the file \(\d+ byte"),
    "table-past-end": (
        lambda p: l1(p, PAST), "plain", WHOLE_TABLE, True,
        r"its L2 table at host offset 0x10000000000 is past the end of the file$"),
    "table-unaligned": (
        lambda p: l1(p, 1 << 63 | 0x10200), "plain", WHOLE_TABLE, True,
        r"L1 entry 0 is invalid: 0x8000000000010200$"),
    "stream-past-end": (
        lambda p: l2(p, lambda e: 1 << 62 | PAST, "packed"), "packed", ONE, True,
        r"the compressed cluster at host offset 0x10000000000 lies past the end of the file"),
    "stream-cut": (
        lambda p: l2(p, shorter_stream, "packed"), "packed", ONE, False,
        r"the compressed cluster at host offset 0x[0-9a-f]+: its \w+ stream .*ends"),
    "stream-garbage": (
        garbage, "packed", ONE, False,
        r"the compressed cluster at host offset 0x[0-9a-f]+: its deflate stream is damaged"),
}  # fmt: skip


def error(read: Callable[[], object]) -> int:
    """The errno of a request that must fail."""
    with pytest.raises(nbd.Error) as failed:
        read()
    return failed.value.errnum


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_fails_what_needs_it_and_nothing_else(disk: Path, name: str) -> None:
    harm, snapshot, lost, extents_too, said = DAMAGES[name]
    expected = {s: qemu.content(disk, s) for s in ("plain", "packed")}
    harm(disk)
    other = {"plain": "packed", "packed": "plain"}[snapshot]
    with serve(file=disk) as server:
        with server.connect(snapshot, extents=True) as client:
            for n in range(SIZE // CLUSTER):
                at = n * CLUSTER
                if n not in lost:
                    assert client.pread(CLUSTER, at) == expected[snapshot][at : at + CLUSTER]
                elif n % 50 == BAD:
                    assert error(lambda at=at: client.pread(100, at + 7)) == errno.EIO
                    line = server.log.splitlines()[-1]
                    assert re.search(f"guest offset {at + 7:#x}: {said}", line), line
            failed = sum(n % 50 == BAD for n in lost)
            assert len(server.log.splitlines()) == failed
            assert error(lambda: client.pread(3 * CLUSTER, (BAD - 2) * CLUSTER + 1)) == errno.EIO
            if extents_too:
                assert error(lambda: block_status(client, lost[0] * CLUSTER, 1)) == errno.EIO
                assert error(lambda: block_status(client, 0, SIZE)) == errno.EIO
                if lost is ONE:
                    assert block_status(client, 0, CLUSTER) == [(0, CLUSTER, 0)]
            else:
                assert block_status(client, lost[0] * CLUSTER, CLUSTER)[0][2] == 0
            after = lost[-1] + 1
            assert client.pread(CLUSTER, after * CLUSTER)
        assert server.copy(other) == expected[other]


def test_a_file_truncated_under_the_server(disk: Path) -> None:
    """The snapshot table was behind the data: nobody can tell any more whose data it is."""
    expected = qemu.content(disk, "packed")
    end = damage.stream(disk, "packed", 12 * CLUSTER)[0] // CLUSTER * CLUSTER
    with serve(file=disk) as server:
        with server.connect("packed") as early, server.connect("plain") as other:
            assert early.pread(512, 0) == expected[:512]
            os.truncate(disk, end)
            assert error(lambda: early.pread(512, 0)) == errno.EIO
            assert error(lambda: other.pread(CLUSTER, SIZE - CLUSTER)) == errno.EIO
        assert "past the end of the file" in server.log
        assert "Traceback" not in server.log


def test_data_truncated_under_the_server(disk: Path) -> None:
    """One cluster is moved behind the tables, so that it alone is cut off."""
    expected = qemu.content(disk, "plain")
    at = damage.l2_entry(disk, "plain", BAD * CLUSTER)
    end = -(-disk.stat().st_size // CLUSTER) * CLUSTER
    qemu.patch(disk, end, expected[:CLUSTER])
    damage.put64(disk, at, end)
    with serve(file=disk) as server, server.connect("plain") as client:
        read = lambda: client.pread(CLUSTER, BAD * CLUSTER)  # noqa: E731
        assert read() == expected[:CLUSTER]
        os.truncate(disk, end)
        assert error(read) == errno.EIO
        assert client.pread(CLUSTER, 0) == expected[:CLUSTER]
        assert f"the data cluster at host offset {end:#x} lies past the end" in server.log


@pytest.mark.parametrize(("offset", "length"), [(0, CLUSTER), (1, 1), (1000, CLUSTER - 1000)])
def test_no_part_of_a_cluster_past_the_end_reads_as_zeros(
    disk: Path, offset: int, length: int
) -> None:
    past = -(-disk.stat().st_size // CLUSTER) * CLUSTER
    damage.put64(disk, damage.l2_entry(disk, "plain", BAD * CLUSTER), past)
    with serve(file=disk) as server, server.connect("plain") as client:
        assert error(lambda: client.pread(length, BAD * CLUSTER + offset)) == errno.EIO


def test_the_rest_of_the_files_last_cluster_is_lost(disk: Path) -> None:
    """QEMU takes it for zeros; no QEMU leaves a cluster so (docs/validation.md)."""
    end = -(-disk.stat().st_size // CLUSTER) * CLUSTER
    qemu.patch(disk, end, b"short")
    damage.put64(disk, damage.l2_entry(disk, "plain", BAD * CLUSTER), end)
    expected = b"short".ljust(CLUSTER, b"\0")
    assert qemu.content(disk, "plain")[BAD * CLUSTER :][:CLUSTER] == expected
    with serve(file=disk) as server, server.connect("plain", extents=True) as client:
        assert client.pread(5, BAD * CLUSTER) == b"short"
        assert block_status(client, BAD * CLUSTER, 5) == [(BAD * CLUSTER, 5, 0)]
        for offset, length in ((0, CLUSTER), (0, 6), (4, 2), (1000, 100)):
            assert error(lambda o=offset, n=length: client.pread(n, BAD * CLUSTER + o)) == errno.EIO
            request = lambda o=offset, n=length: block_status(client, BAD * CLUSTER + o, n)  # noqa: E731
            assert error(request) == errno.EIO
        said = f"the data cluster at host offset {end:#x} is cut off at the end of the file"
        assert said in server.log


def test_a_stream_may_end_inside_the_files_last_sector(disk: Path) -> None:
    """QEMU does not write out what fills it; but none of the stream's data may be missing."""
    expected = qemu.content(disk, "packed")[BAD * CLUSTER :][:CLUSTER]
    offset, sectors = damage.stream(disk, "packed", BAD * CLUSTER)
    data = qemu.peek(disk, offset, (sectors + 1) * 512 - offset % 512)
    decoder = zlib.decompressobj(-12)
    decoder.decompress(data)
    length = len(data) - len(decoder.unused_data)
    start = -(-disk.stat().st_size // CLUSTER) * CLUSTER + 512 - length % 512 - 8
    total = -(-(start % 512 + length) // 512)  # it ends 8 bytes before its last sector does
    entry = 1 << 62 | (total - 1) << 58 | start
    l2(disk, lambda _: entry, "packed")
    qemu.patch(disk, start, data[:length])
    assert disk.stat().st_size % 512 == 504
    assert qemu.content(disk, "packed")[BAD * CLUSTER :][:CLUSTER] == expected
    with serve(file=disk) as server, server.connect("packed", extents=True) as client:
        assert client.pread(CLUSTER, BAD * CLUSTER) == expected
        assert block_status(client, BAD * CLUSTER, CLUSTER) == [(BAD * CLUSTER, CLUSTER, 0)]
    for missing in (20, 504, 505, length):
        os.truncate(disk, start + length - missing)
        with serve(file=disk) as server, server.connect("packed") as client:
            assert error(lambda: client.pread(CLUSTER, BAD * CLUSTER)) == errno.EIO


@pytest.mark.parametrize(
    ("offset", "said"),
    [(0x201, "is not one of a cluster"), (PAST, "lies past the end of the file")],
)
def test_a_damaged_l1_table_refuses_that_snapshot_only(disk: Path, offset: int, said: str) -> None:
    expected = qemu.content(disk, "packed")
    damage.put64(disk, qemu.snapshots(disk)["plain"].entry_offset, offset)
    with serve(file=disk) as server:
        with pytest.raises(nbd.Error):
            server.read("plain")
        assert said in server.log.splitlines()[0]
        assert server.copy("packed") == expected


def test_damage_to_the_active_state_refuses_nothing(disk: Path) -> None:
    expected = {s: qemu.content(disk, s) for s in ("plain", "packed")}
    qemu.patch(disk, 36, b"\xff" * 4)  # size of the active L1 table
    qemu.patch(disk, 40, b"\xff" * 8)  # where it is
    qemu.patch(disk, 48, b"\xff" * 12)  # and the refcount table
    qemu.patch(disk, damage.INCOMPATIBLE + 7, b"\1")  # dirty
    with serve(file=disk) as server:
        assert {s: server.copy(s) for s in expected} == expected


# --- What clients are told, and may not do ---


def refusals(server: Server) -> dict[str, int]:
    with server.connect("plain") as client:
        return {
            "write": error(lambda: client.pwrite(b"x" * 512, 0)),
            "zero": error(lambda: client.zero(512, 0)),
            "trim": error(lambda: client.trim(512, 0)),
        }


def test_writes_are_refused_by_the_protocol(disk: Path) -> None:
    before = disk.read_bytes()
    with serve(file=disk) as server:
        assert set(refusals(server).values()) == {errno.EPERM}
    assert disk.read_bytes() == before


@pytest.mark.parametrize(("cluster", "preferred"), [(512, 4096), (64 * KiB,) * 2, (2 * MiB,) * 2])
def test_what_clients_are_told(tmp_path: Path, cluster: int, preferred: int) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB + 512, cluster_size=cluster)
    qemu.take(path, "s")
    with serve(file=path) as server, server.connect("s") as client:
        assert client.is_read_only()
        assert client.can_multi_conn()
        sizes = (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
        assert [client.get_block_size(s) for s in sizes] == [1, preferred, 0xFFFFFFFF]
        assert client.get_size() == MiB + 512


@pytest.mark.parametrize("where", [(SIZE, 1), (SIZE - 1, 2), (1 << 62, 512)])
def test_a_read_outside_the_disk_is_refused(disk: Path, where: tuple[int, int]) -> None:
    with serve(file=disk) as server, server.connect("plain") as client:
        assert error(lambda: client.pread(where[1], where[0])) == errno.EINVAL
        assert client.pread(1, SIZE - 1)
