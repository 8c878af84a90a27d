"""A file behind NBD behaves as a file: short reads at its end only, its growth is seen."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.qemu import KiB, MiB
from support.remote import remote
from support.running import eventually

from qcow2snap_core.errors import StorageError, UsageError
from qcow2snap_core.storage import remote as module
from qcow2snap_core.storage.remote import RemoteFile

DATA = random.Random(1).randbytes(256 * KiB + 512)


@contextmanager
def opened(directory: Path, *filters: str) -> Iterator[RemoteFile]:
    path = directory / "disk.raw"
    path.write_bytes(DATA)
    with remote(*filters, "file", path) as server:
        file = RemoteFile(server.uri)
        try:
            yield file
        finally:
            file.close()


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (1, 1), (4095, 8193), (len(DATA) - 1, 9), (len(DATA), 5), (MiB, 5), (5, MiB)],
)
def test_it_gives_its_bytes_and_fewer_only_at_the_end(
    tmp_path: Path, offset: int, length: int
) -> None:
    with opened(tmp_path) as file:
        expected = DATA[offset : offset + length]
        buffer = bytearray(b"x" * length)
        assert file.read(length, offset) == expected
        assert file.read_into(buffer, offset) == len(expected)
        assert buffer == expected.ljust(length, b"x")


def test_large_reads_are_split(tmp_path: Path) -> None:
    limit = ("--filter=blocksize-policy", "blocksize-error-policy=error", "blocksize-maximum=64K")
    path = tmp_path / "disk.raw"
    path.write_bytes(DATA)
    with remote(limit[0], "file", path, *limit[1:]) as server:
        file = RemoteFile(server.uri)
        assert file.read(len(DATA), 0) == DATA
        file.close()


def test_threads_read_at_once(tmp_path: Path) -> None:
    with opened(tmp_path) as file, ThreadPoolExecutor(20) as pool:
        places = [random.Random(n).randrange(len(DATA) - 5000) for n in range(400)]
        found = pool.map(lambda at: file.read(5000, at), places)
        assert list(found) == [DATA[at : at + 5000] for at in places]


def test_growth_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIZE_HOLDS_FOR", 0)
    with opened(tmp_path) as file:
        assert file.size() == len(DATA)
        os.truncate(tmp_path / "disk.raw", MiB)
        assert file.size() == MiB
        assert file.read(512, MiB - 512) == bytes(512)


@pytest.mark.parametrize(
    "filters", [(), ("--filter=multi-conn", "multi-conn-mode=disable")], ids=["many", "one"]
)
def test_a_read_across_the_end_is_short_only_at_the_present_end(
    tmp_path: Path, filters: tuple[str, ...]
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(DATA)
    with remote(*filters[:1], "file", path, *filters[1:]) as server:
        file = RemoteFile(server.uri)
        assert file.size() == len(DATA)  # and it was asked for a moment ago
        path.write_bytes(DATA + b"more" * 256)
        assert file.read(2048, len(DATA) - 1024) == DATA[-1024:] + b"more" * 256
        file.close()


def test_a_server_that_ends_with_its_last_client_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SIZE_HOLDS_FOR", 0)
    with opened(tmp_path, "--filter=exitlast") as file:
        for _ in range(5):
            assert file.size() == len(DATA)
            assert file.read(9, 7) == DATA[7:16]


def test_pieces_are_compared(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        assert file.holds(((DATA[:12], 0), (DATA[600:700], 600)))
        assert not file.holds(((DATA[:12], 0), (DATA[600:700], 601)))


def test_a_hint_is_followed_by_reads(tmp_path: Path) -> None:
    with opened(tmp_path, "--filter=cache") as file:
        for _ in range(3):
            file.will_need(0, len(DATA) + 1)
            file.will_need(MiB, 1)
        assert file.read(len(DATA), 0) == DATA


def test_no_two_are_the_same_file(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as two:
        assert one.inode != two.inode


def test_an_error_names_the_uri_and_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(DATA)
    with remote("--filter=error", "file", path, "error-pread-rate=100%") as server:
        file = RemoteFile(server.uri)
        with pytest.raises(StorageError, match=f"^reading 9 bytes of '.*{server.socket}' at .*0x7"):
            file.read(9, 7)
        file.close()


@pytest.mark.parametrize(
    "uri", ["nbd://h\udcff", "nbd+unix://?socket=\udcff", "nbd://\0", "nbd://[", "nbd+x://y"]
)
def test_an_odd_uri_is_one_error(uri: str) -> None:
    with pytest.raises(UsageError, match="^cannot open '[ -~]*': .+$"):
        RemoteFile(uri)


def test_all_connections_that_were_lost_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(DATA)
    with remote("--filter=delay", "file", path, "rdelay=100ms") as server:
        file = RemoteFile(server.uri)
        with ThreadPoolExecutor(4) as pool:  # slow enough that each needs a connection
            assert set(pool.map(lambda _: file.read(9, 7), range(4))) == {DATA[7:16]}
        server.kill()
        server.start()
        assert file.read(9, 7) == DATA[7:16]
        file.close()


def test_the_size_is_asked_for_where_there_is_no_room_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SIZE_HOLDS_FOR", 0)
    monkeypatch.setattr(module, "_PAUSE_AFTER_FAILURE", -1)
    path = tmp_path / "disk.raw"
    path.write_bytes(DATA)
    with remote("--filter=limit", "file", path, "limit=2") as server:
        file = RemoteFile(server.uri)
        for size in (MiB, 2 * MiB, 3 * MiB, 4 * MiB):
            os.truncate(path, size)
            # nbdkit counts a connection until a moment after its end.
            eventually(lambda size=size: file.size() == size)
        file.close()


def test_no_connection_from_before_is_used_once_the_file_was_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "disk.raw", tmp_path / "other.raw"
    path.write_bytes(DATA)
    other.write_bytes(DATA[::-1] + b"end")
    with remote("--filter=delay", "file", path, "rdelay=100ms") as server:
        file = RemoteFile(server.uri)
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: file.read(9, 7), range(3))) == {DATA[7:16]}
            other.replace(path)
            # One more than there are: it leads to the new file, and so must all from now on.
            list(pool.map(lambda _: file.read(9, 7), range(4)))
            new = DATA[::-1][7:16]
            assert set(pool.map(lambda _: file.read(9, 7), range(4))) == {new}
        file.close()


@pytest.mark.parametrize("rest", ["[::1/x", "host:port:x/", "ho st/"])
def test_a_uri_that_libnbd_repeats_shows_no_password(rest: str) -> None:
    with pytest.raises(UsageError) as caught:
        RemoteFile(f"nbd://alice:secret@{rest}")
    assert "cannot open 'nbd://" in str(caught.value)
    assert "secret" not in str(caught.value)
