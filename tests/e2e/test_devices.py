"""An image on a block device, through a loop device; needs to be root and to have one free."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import command, qemu
from support.qemu import KiB, MiB, RandomImage
from support.server import serve


@contextmanager
def loop(path: Path, *options: str) -> Iterator[Path]:
    """A read-only loop device over a file, in whole sectors."""
    done = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", *options, path],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        qemu.run("losetup", "--detach", device)


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid():
        pytest.skip("only root may set up a loop device")


def to_a_device(path: Path) -> None:
    """Make the file a whole number of blocks, as a volume is, with old data behind the image."""
    with open(path, "ab") as f:
        f.write(b"\xee" * (-f.tell() % MiB + MiB))


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("cluster_size", [512, 64 * KiB])
def test_an_image_on_a_block_device(tmp_path: Path, cluster_size: int, sector: int) -> None:
    image = RandomImage(
        tmp_path / "disk", 3, options={"cluster_size": cluster_size}, compressed=True
    )
    names = image.make()
    expected = {name: qemu.content(image.path, name) for name in names}
    extents = {name: qemu.extents(qemu.as_active(image.path, name)) for name in names}
    to_a_device(image.path)
    with loop(image.path, "--sector-size", str(sector)) as device, serve(file=device) as server:
        for name in names:
            assert server.copy(name) == expected[name]
            assert server.extents(name) == extents[name]
        with server.connect("two") as client:
            for start in range(1, 4 * MiB, 333_333):
                assert client.pread(5001, start) == expected["two"][start : start + 5001]


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_backing_file_on_a_block_device(tmp_path: Path, fmt: str) -> None:
    base = RandomImage(tmp_path / "base", 4, fmt=fmt)
    base.make([], 30)
    overlay = RandomImage(tmp_path / "disk.qcow2", 5, backing=("base", fmt))
    overlay.make(["s"])
    expected = qemu.content(overlay.path, "s")
    if fmt == "qcow2":
        to_a_device(base.path)
    with loop(base.path) as device:
        qemu.run("qemu-img", "rebase", "-u", "-b", device, "-F", fmt, overlay.path)
        with serve(file=overlay.path, allow_dir=device.parent) as server:
            assert server.copy("s") == expected
        with serve(file=overlay.path, allow_file=device) as server:
            assert server.copy("s") == expected


def test_a_chain_on_block_devices(tmp_path: Path) -> None:
    """Also through the command: every device has to be named."""
    base = RandomImage(tmp_path / "base", 4, fmt="raw")
    base.make([], 30)
    overlay = RandomImage(tmp_path / "disk.qcow2", 5, backing=("base", "raw"))
    overlay.make(["s"])
    expected = qemu.content(overlay.path, "s")
    with loop(base.path) as below:
        qemu.run("qemu-img", "rebase", "-u", "-b", below, "-F", "raw", overlay.path)
        to_a_device(overlay.path)
        with loop(overlay.path) as device:
            said = command.fails("copy", device, "s", tmp_path / "raw")
            assert f"add --allow-file {below} if you trust it" in said
            command.qcow2snap("copy", device, "s", tmp_path / "raw", "--allow-file", below)
            assert (tmp_path / "raw").read_bytes() == expected
            with serve(file=device, allow_file=below) as server:
                assert server.copy("s") == expected
