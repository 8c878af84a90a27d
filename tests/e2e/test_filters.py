"""nbdkit's filters before all exports of an image: what docs/recipes.md says of each version."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.qemu import KiB, MiB
from support.server import Server, has_filter, serve

VERSION = tuple(map(int, re.findall(r"\d+", qemu.run("nbdkit", "--version"))[:2]))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = qemu.create(tmp_path_factory.mktemp("filters") / "disk.qcow2", MiB)
    for name, byte in (("one", 1), ("two", 2)):
        qemu.io(path, f"write -P {byte} 0 {MiB}")
        qemu.take(path, name)
    return path


def first(server: Server, export: str) -> int:
    """The first byte, read with 64 KiB."""
    with server.connect(export) as client:
        return client.pread(64 * KiB, 0)[0]


def test_cow_has_an_overlay_for_each_export_since_1_44(disk: Path) -> None:
    with serve(file=disk, filters=("cow",)) as server:
        with server.connect("one") as client:
            client.pwrite(bytes([9]) * 64 * KiB, 0)
        assert first(server, "one") == 9
        assert first(server, "two") == (2 if VERSION >= (1, 44) else 9)


def test_what_cow_read_is_kept_for_each_export_since_1_44(disk: Path) -> None:
    with serve(file=disk, filters=("cow",), cow_on_read="true") as server:
        assert first(server, "one") == 1
        assert first(server, "two") == (2 if VERSION >= (1, 44) else 1)


def test_cache_keeps_what_was_read_for_all_exports(disk: Path) -> None:
    """No version is known that does not; where this fails, the recipe has to say since when."""
    with serve(file=disk, filters=("cache",), cache_on_read="true") as server:
        assert first(server, "one") == 1
        assert first(server, "two") == 1


def test_with_one_snapshot_they_keep_what_is_right(disk: Path) -> None:
    options = {"cache_on_read": "true", "cow_on_read": "true", "snapshot": "two"}
    with serve(file=disk, filters=("cow", "cache"), **options) as server:
        assert [first(server, name) for name in ("", "two", "2", "")] == [2] * 4


def test_openonce_opens_each_export_once(disk: Path, tmp_path: Path) -> None:
    if not has_filter("openonce"):
        pytest.skip("nbdkit has it since 1.44")
    image = tmp_path / "disk.qcow2"
    image.write_bytes(disk.read_bytes())
    with serve(file=image, filters=("openonce",)) as server:
        assert [first(server, name) for name in ("one", "two", "one")] == [1, 2, 1]
        with pytest.raises(nbd.Error), server.connect("three"):
            pass
        qemu.delete(image, "one")
        qemu.take(image, "one")  # another one: the active disk, which is as "two"
        with server.connect("one") as client, pytest.raises(nbd.Error):
            client.pread(512, 0)
        assert "was deleted" in server.log
        assert first(server, "two") == 2


def test_readahead_goes_on_after_a_snapshot_was_deleted(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(disk.read_bytes())
    with serve(file=image, filters=("readahead",)) as server, server.connect("one") as client:
        for at in range(0, 4 * 64 * KiB, 64 * KiB):
            assert client.pread(64 * KiB, at) == bytes([1]) * 64 * KiB
        qemu.delete(image, "one")
        for at in range(4 * 64 * KiB, MiB, 64 * KiB):
            with pytest.raises(nbd.Error, match="EIO"):
                client.pread(64 * KiB, at)
        assert first(server, "two") == 2


def test_scan_does_nothing_and_says_so(disk: Path) -> None:
    with serve(file=disk, filters=("scan",), snapshot="one") as server:
        assert first(server, "") == 1
        assert "scan: warning: not the default export" in server.log


@pytest.mark.parametrize("prefetching", ["readahead", "scan"])
@pytest.mark.parametrize("rate", ["0", "100%"])
def test_nbdkit_does_not_survive_a_prefetch_that_fails(prefetching: str, rate: str) -> None:
    """With its own plugin.  Where this fails, the recipe has to say since when."""
    line = ["prlimit", "--core=0", "nbdkit", "-U", "-", f"--filter={prefetching}"]
    line += ["--filter=error", "memory", "16M", f"error-cache-rate={rate}"]
    line += ["--run", 'nbdcopy --no-extents --connections=1 "$uri" null:']
    done = subprocess.run(line, capture_output=True, timeout=60, check=False)
    assert (done.returncode == 0) is (rate == "0"), done.stderr
