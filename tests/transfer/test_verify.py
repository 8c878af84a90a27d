"""What was written, compared with what was asked for: where they differ, and what is not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import devices, qemu
from support.qemu import KiB, MiB

from qcow2snap_core.errors import StorageError
from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.extents import HOLE_ZERO
from qcow2snap_core.image.layers import RawLayer
from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.storage.blockdevice import BlockDevice
from qcow2snap_core.transfer.mover import RawSource, whole
from qcow2snap_core.transfer.verify import Differs, State, Written, compare, images

SIZE = 5 * MiB + 512


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk.qcow2"
    qemu.RandomImage(path, seed=3, size=SIZE).make(["s"])
    with open_image(str(path)) as image:
        yield image.snapshot("s")


def content(tmp_path: Path) -> bytearray:
    return bytearray(qemu.content(tmp_path / "disk.qcow2", "s"))


def against(disk: Disk, path: Path) -> int:
    """Compare the disk with a raw file or a device; returns the bytes that it says it has done."""
    done: list[int] = []
    with devices.opened(path) as storage:
        found = RawSource(RawLayer(storage))
        compare(disk, lambda: whole(disk), found, "'it'", done.append)
    return sum(done)


def test_a_right_one_is_gone_through_to_the_end(disk: Disk, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(content(tmp_path))
    assert against(disk, raw) == SIZE


@pytest.mark.parametrize("where", [0, 1, 2 * MiB - 1, 2 * MiB, 3 * MiB + 4097, SIZE - 1])
def test_a_wrong_byte_is_told_by_its_offset(disk: Disk, tmp_path: Path, where: int) -> None:
    raw = tmp_path / "raw"
    data = content(tmp_path)
    data[where] ^= 0x80
    raw.write_bytes(data)
    with pytest.raises(Differs, match=f"^'it' differs .* guest offset {where:#x}:"):
        against(disk, raw)


def test_a_hole_in_place_of_data_and_data_in_place_of_a_hole(disk: Disk, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    data = content(tmp_path)
    at = next(at for at in range(0, SIZE, 4096) if any(data[at : at + 4096]))
    hole = (at, 4096)
    raw.write_bytes(data)
    qemu.io(raw, "discard {} {}".format(*hole), fmt="raw")
    with pytest.raises(Differs) as caught:
        against(disk, raw)
    where = re.search(r"guest offset (0x[0-9a-f]+):", str(caught.value))
    assert where is not None
    assert hole[0] <= int(where[1], 16) < sum(hole)
    empty = next(e.offset for e in whole(disk) if e.type == HOLE_ZERO)
    raw.write_bytes(data)
    qemu.patch(raw, empty + 5, b"x")
    with pytest.raises(Differs, match=f"guest offset {empty + 5:#x}:"):
        against(disk, raw)


def test_a_device_is_read_itself_and_not_what_the_kernel_remembers(
    disk: Disk, tmp_path: Path
) -> None:
    data = content(tmp_path)
    with devices.loop_device(tmp_path, data) as device:
        assert against(disk, device) == SIZE
        with devices.opened(device) as storage:
            assert isinstance(storage, BlockDevice)
        qemu.patch(tmp_path / "device.img", MiB, bytes([data[MiB] ^ 1]))
        with pytest.raises(Differs, match=f"guest offset {MiB:#x}:"):
            against(disk, device)


def test_a_terabyte_of_zeros_is_not_read(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1T")
    qemu.take(path, "s")
    raw = tmp_path / "raw"
    raw.touch()
    with open(raw, "r+b") as f:
        f.truncate(1 << 40)
    with open_image(str(path)) as image:
        assert against(image.snapshot("s"), raw) == 1 << 40


# --- Images ---


def state(name: str, disk: Disk) -> State:
    return State(name, disk.size, disk, lambda: whole(disk))


CHANGES = {
    "nothing": ([], None),
    "the active disk": (["write -P 9 1M 512"], "^'out' differs from its source at .* 0x100000:"),
    "zeros for data": ([f"write -z {3 * MiB} 64k"], "^'out' differs .* 0x300000:"),
}


@pytest.mark.parametrize("same", [True, False], ids=["a snapshot's", "its own"])
@pytest.mark.parametrize(("commands", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_the_active_disk_is_compared_too(
    tmp_path: Path, commands: list[str], expected: str | None, same: bool
) -> None:
    source = qemu.create(tmp_path / "source.qcow2", SIZE)
    qemu.io(source, f"write -P 1 0 {SIZE}")
    qemu.take(source, "s")
    out = tmp_path / "other.qcow2"
    out.write_bytes(source.read_bytes())
    if commands:
        qemu.io(out, *commands)
    with open_image(str(source)) as image:
        snapshot = state("s", image.snapshot("s"))
        active = snapshot if same else state("active", image.active_disk())
        written = [Written(str(out), "out", [snapshot], active)]
        if expected is None:
            images(written, Options())
        else:
            with pytest.raises(Differs, match=expected):
                images(written, Options())


def test_other_snapshots_and_sizes_are_errors(tmp_path: Path) -> None:
    source = qemu.create(tmp_path / "source.qcow2", SIZE)
    qemu.take(source, "s")
    out = qemu.create(tmp_path / "out.qcow2", SIZE + 64 * KiB)
    with open_image(str(source)) as image:
        one = state("s", image.snapshot("s"))
        for snapshots, expected in (([one], "written wrong: it has none"), ([], "5308928 bytes")):
            with pytest.raises(StorageError, match=expected):
                images([Written(str(out), "out", snapshots, one)], Options())
