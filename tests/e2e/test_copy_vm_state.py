"""``NAME/vmstate`` as what is copied, where there may be no VM: which snapshot it means."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import command, damage, qemu
from support.qemu import MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image without any VM state."""
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 1 0 64k")
    qemu.take(path, "s")
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s/vmstate", "snapshot 's' has no VM state"),
        ("1/vmstate", "snapshot 's' has no VM state"),
        ("t/vmstate", "'t'"),
    ],
)
def test_what_has_none_is_one_line(image: Path, name: str, said: str) -> None:
    assert said in command.fails("copy", image, name, image.with_name("out"))


def test_a_snapshot_that_really_has_such_a_name_wins(image: Path) -> None:
    qemu.take(image, "other")
    damage.rename(image, {"other": b"s/vmstate"})
    command.qcow2snap("copy", image, "s/vmstate", image.with_name("out"))
    assert image.with_name("out").read_bytes() == b"\1" * 65536 + bytes(MiB - 65536)
