"""Files as the core opens them, and real block devices where the machine has any to give."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2snap_core.storage import Storage, open_storage


@contextmanager
def opened(path: Path, permit: Callable[[str], None] | None = None) -> Iterator[Storage]:
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


def attach(backing: Path, block: int = 512) -> Path:
    """A loop device over a file; whoever calls detaches it (``losetup -d``)."""
    command = ["losetup", "--find", "--show", "--sector-size", str(block), str(backing)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no losetup here")
    if done.returncode:
        pytest.skip(f"no loop device can be had: {done.stderr.strip()}")
    return Path(done.stdout.strip())
