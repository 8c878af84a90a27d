"""Files as the core opens them, and real block devices where the machine has any to give."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2snap_core.storage.local import Permit, Storage, open_storage


@contextmanager
def opened(path: Path, permit: Permit | None = None) -> Iterator[Storage]:
    """A file or device as the core opens it."""
    storage = open_storage(str(path), permit)
    try:
        yield storage
    finally:
        storage.close()


@contextmanager
def loop_device(directory: Path, content: bytes, block: int = 512) -> Iterator[Path]:
    """A loop device over a new file with this content; skips the test where there can be none."""
    backing = directory / "device.img"
    backing.write_bytes(content)
    device = attach(backing, block)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=60)


def attach(backing: Path, block: int = 512, *options: str) -> Path:
    """A loop device over a file; whoever calls detaches it (``losetup -d``)."""
    said = _run_or_skip(
        *("losetup", "--find", "--show", "--sector-size", str(block), *options, str(backing))
    )
    return Path(said)


@contextmanager
def attached(backing: Path, *options: str) -> Iterator[Path]:
    """A loop device over a file or device, until the block ends."""
    device = attach(backing, 512, *options)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=60)


def partition(device: Path, number: int, start: int, length: int) -> Path:
    """A partition of a loop device made with ``-P``, in bytes; it goes with the device."""
    _run_or_skip("addpart", str(device), str(number), str(start // 512), str(length // 512))
    return Path(f"{device}p{number}")


@contextmanager
def mounted(directory: Path, *arguments: object) -> Iterator[Path]:
    """Something mounted on a new directory, until the block ends; ``arguments`` are mount's."""
    directory.mkdir()
    _run_or_skip("mount", *map(str, arguments), str(directory))
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True, timeout=60)


def _run_or_skip(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip(f"no {command[0]} here")
    if done.returncode:
        pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")
    return done.stdout.strip()
