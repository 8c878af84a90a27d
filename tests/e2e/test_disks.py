"""Disks and limits that fail under the server: one error for the request, and it goes on."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest
from support import damage, qemu
from support.qemu import KiB, MiB
from support.running import eventually
from support.server import Server, block_status, command, serve

SIZE = 32 * MiB
LARGE = 2 * MiB  # a cluster, which takes that much memory to decode


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE, cluster_size=LARGE)
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(997).hex().encode())
    qemu.io(path, f"write -c -s {noise} 0 {LARGE}", f"write -c -s {noise} {LARGE} {LARGE}")
    qemu.io(path, f"write -s {noise} {2 * LARGE} {SIZE - 2 * LARGE}")
    qemu.take(path, "s")
    return path


def fails_with_eio(server: Server, read: object, said: str) -> None:
    """And with one line, which says why."""
    before = len(server.log.splitlines())
    with pytest.raises(nbd.Error) as caught:
        read()  # type: ignore[operator]
    assert caught.value.errnum == errno.EIO
    (line,) = server.log.splitlines()[before:]
    assert said in line


@contextmanager
def failing(disk: Path, directory: Path) -> Iterator[tuple[Path, Path]]:
    """The image as a FUSE file, every read of which fails while the second file exists."""
    trigger, mounted = directory / "fail", directory / "mounted.qcow2"
    mounted.touch()
    line = ["nbdfuse", "--readonly", mounted, "--command", "nbdkit", "-s", "--filter=error"]
    line += ["file", disk, "error-pread-rate=100%", f"error-file={trigger}"]
    process = subprocess.Popen([str(x) for x in line], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while mounted.stat().st_size != disk.stat().st_size:
            if process.poll() is not None:
                assert process.stderr is not None
                pytest.skip(f"no FUSE here: {process.stderr.read()!r}")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield mounted, trigger
    finally:
        if process.poll() is None:
            subprocess.run(["fusermount3", "-u", mounted], check=False, timeout=60)
            process.wait(20)


def test_a_disk_that_fails_for_a_while(disk: Path, tmp_path: Path) -> None:
    expected = qemu.content(disk, "s")
    with failing(disk, tmp_path) as (mounted, trigger), serve(file=mounted) as server:
        with server.connect("s") as client:
            assert client.pread(4 * KiB, 0) == expected[: 4 * KiB]
            trigger.touch()
            at = SIZE - LARGE
            fails_with_eio(server, lambda: client.pread(4 * KiB, at), "input/output error")
            fails_with_eio(server, lambda: client.pread(4 * KiB, at), "at host offset 0x")
            # What the caches hold is served on.
            assert client.pread(4 * KiB, 0) == expected[: 4 * KiB]
            trigger.unlink()
            assert client.pread(4 * KiB, at) == expected[at : at + 4 * KiB]
        assert server.copy("s") == expected


def test_an_image_that_is_removed_is_served_on(disk: Path) -> None:
    expected = qemu.content(disk, "s")
    with serve(file=disk) as server:
        disk.unlink()
        assert server.copy("s") == expected


def test_an_image_that_is_emptied_gives_errors_and_comes_back(disk: Path) -> None:
    whole = disk.read_bytes()
    expected = qemu.content(disk, "s")
    with serve(file=disk) as server, server.connect("s", extents=True) as client:
        os.truncate(disk, 0)
        fails_with_eio(server, lambda: client.pread(512, SIZE - 512), "cannot tell whether snap")
        fails_with_eio(server, lambda: block_status(client, 0, SIZE), "cannot tell whether snap")
        with pytest.raises(nbd.Error):
            server.read("s")
        with open(disk, "r+b") as f:
            f.write(whole)
        assert client.pread(512, SIZE - 512) == expected[-512:]


def test_serving_takes_no_more_descriptors(disk: Path) -> None:
    expected = qemu.content(disk, "s")
    with serve(file=disk) as server, server.connect("s", extents=True) as client:
        open_now = len(os.listdir(f"/proc/{server.pid}/fd"))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (open_now, 4096))
        assert client.pread(SIZE, 0) == expected
        assert block_status(client, 0, SIZE) == [(0, SIZE, 0)]


def test_a_chain_longer_than_the_descriptors_is_refused_in_one_line(tmp_path: Path) -> None:
    names = [f"{n}.qcow2" for n in range(40)]
    for below, name in zip([None, *names], names, strict=False):
        qemu.create(tmp_path / name, MiB, backing=below and (below, "qcow2"))
    line = command("--run", "true", file=tmp_path / names[-1])
    done = subprocess.run(
        ["prlimit", "--nofile=24", *line], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    (said,) = done.stderr.splitlines()
    assert "too many open files" in said


def test_no_memory_is_an_error_of_the_request(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One thread of nbdkit for a connection: others would need memory before they come to us.
    monkeypatch.setenv("QCOW2SNAP_NATIVE", "0")
    expected = qemu.content(disk, "s")
    with serve(file=disk) as server:
        wait_until_it_can_word_errors(server)
        fails_for_lack_of_memory(server, expected)


def wait_until_it_can_word_errors(server: Server) -> None:
    """A thread that the first client starts imports what is needed for it."""
    threads = server.threads()
    with server.connect("s"):
        pass
    eventually(lambda: server.threads() <= threads)


def fails_for_lack_of_memory(server: Server, expected: bytes) -> None:
    with server.connect("s") as client:
        assert client.pread(4 * KiB, SIZE - LARGE) == expected[SIZE - LARGE :][: 4 * KiB]
        # Of address space malloc has reserved enough; of data it gets not another page.
        resource.prlimit(server.pid, resource.RLIMIT_DATA, (4096, resource.RLIM_INFINITY))
        fails_with_eio(server, lambda: client.pread(4 * KiB, LARGE), "out of memory")
        resource.prlimit(server.pid, resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        assert client.pread(4 * KiB, LARGE) == expected[LARGE:][: 4 * KiB]


def test_a_prefetch_for_which_there_is_no_memory_is_no_error(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under nbdkit's readahead one that fails would end the server with a SIGSEGV."""
    monkeypatch.setenv("QCOW2SNAP_NATIVE", "0")
    with serve(file=disk) as server:
        wait_until_it_can_word_errors(server)
        with server.connect("s") as client:
            client.pread(4 * KiB, SIZE - LARGE)  # loads the tables
            status = Path(f"/proc/{server.pid}/status").read_text()
            data = int(status.split("VmData:")[1].split()[0]) * KiB
            resource.prlimit(server.pid, resource.RLIMIT_DATA, (data + MiB // 2, -1))
            client.cache(4 * KiB, LARGE)
            assert not server.log
            fails_with_eio(server, lambda: client.pread(4 * KiB, LARGE), "out of memory")


def test_a_dirty_image_is_served_and_that_is_said(disk: Path) -> None:
    expected = qemu.content(disk, "s")
    qemu.patch(disk, damage.INCOMPATIBLE + 7, b"\1")
    with serve(file=disk) as server:
        assert server.copy("s") == expected
        (line,) = server.log.splitlines()
    assert line == (
        f"qcow2snap: '{disk}' is marked dirty: its refcounts may be wrong, "
        f"its snapshots do not depend on them"
    )
