"""An image is not overwritten through whatever the kernel can put between two names of its bytes.

What device mapper and md do is in tests/storage/test_samefile.py, and here where the machine has
them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import qemu
from support.command import fails, qcow2snap
from support.devices import attached, mounted, partition
from support.qemu import MiB

SAME = "which is being copied"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 8 MiB with a snapshot of 1 MiB, so that the snapshot fits on what the image is
    on."""
    path = qemu.create(tmp_path / "la.qcow2", MiB)
    qemu.io(path, "write -P 7 0 1M")
    qemu.take(path, "s")
    with open(path, "r+b") as f:
        f.truncate(8 * MiB)
    return path


def refused(image: object, target: object, *held: Path) -> str:
    """The line with which a copy and a join are refused; what is held stays as it was."""
    before = [path.read_bytes() for path in held]
    said = fails("copy", "--force", image, "s", target)
    if not str(target).startswith("/dev/"):  # join takes files only
        assert SAME in fails("join", "--force", image, target)
    assert [path.read_bytes() for path in held] == before
    return said


def test_a_loop_device_and_its_file(image: Path) -> None:
    with attached(image) as device:
        said = refused(image, device, image)
        assert f"'{device}' lies on the same storage as '{image}', {SAME}: give another" in said
        assert SAME in refused(device, image, image)
        with attached(device) as second:
            for one, other in ((image, second), (second, image), (device, second)):
                assert SAME in refused(one, other, image)


def test_two_loop_devices_of_one_file(image: Path, tmp_path: Path) -> None:
    """They collide where they overlap only."""
    with open(image, "ab") as f:
        f.truncate(16 * MiB)
    first, rest = ["--sizelimit", str(8 * MiB)], ["--offset", str(8 * MiB)]
    with attached(image, *first) as a, attached(image) as b, attached(image, *rest) as c:
        for one, other in ((a, b), (b, a), (b, c)):
            assert SAME in refused(one, other, image)
        qcow2snap("copy", a, "s", c)
    qemu.run("qemu-img", "check", "-q", image)
    assert image.read_bytes()[8 * MiB : 9 * MiB] == bytes([7]) * MiB


@pytest.mark.parametrize("deleted", [False, True])
def test_a_loop_device_whose_file_has_no_name_or_another(
    image: Path, tmp_path: Path, deleted: bool
) -> None:
    """The kernel tells the inode, where the path in /sys leads nowhere or to something else."""
    other = tmp_path / "other name"
    other.hardlink_to(image)
    with attached(image) as device:
        image.unlink()
        if not deleted:
            image.write_bytes(b"something else")
        assert SAME in refused(other, device, other)
        assert SAME in refused(device, other, other)


def test_a_backing_file_behind_a_loop_device(image: Path, tmp_path: Path) -> None:
    top = qemu.create(tmp_path / "top.qcow2", None, backing=(image.name, "qcow2"))
    qemu.take(top, "s")
    with attached(image) as device:
        said = refused(top, device, image, top)
        assert f"'{device}' lies on the same storage as '{image}'" in said


def test_a_disk_and_its_partitions(image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB) + image.read_bytes() + bytes(8 * MiB))
    with attached(disk, "-P") as device:
        first = partition(device, 1, MiB, 8 * MiB)
        second = partition(device, 2, 9 * MiB, 8 * MiB)
        for target in (device, disk):
            assert SAME in refused(first, target, disk)
        with attached(disk, "--offset", str(MiB), "--sizelimit", str(MiB)) as overlapping:
            assert SAME in refused(first, overlapping, disk)
        qcow2snap("copy", first, "s", second)
    assert disk.read_bytes()[9 * MiB : 10 * MiB] == bytes([7]) * MiB
    assert disk.read_bytes()[MiB : 9 * MiB] == image.read_bytes()


def test_a_file_on_a_filesystem_in_a_file(image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with open(disk, "wb") as f:
        f.truncate(64 * MiB)
    qemu.run("mkfs.ext4", "-q", disk)
    with attached(disk) as device, mounted(tmp_path / "mnt", device) as where:
        inner = where / image.name
        inner.write_bytes(image.read_bytes())
        assert SAME in refused(inner, disk)
        assert "device or resource busy" in refused(inner, device)
        with attached(disk) as unclaimed:
            assert SAME in refused(inner, unclaimed)
        with attached(inner) as nested:
            assert SAME in refused(nested, disk)
            assert SAME in refused(inner, nested, inner)
        # Files of one filesystem, or of this and the one below it, have nothing in common.
        qcow2snap("copy", inner, "s", where / "raw")
        qcow2snap("copy", inner, "s", tmp_path / "raw")
        assert (where / "raw").read_bytes() == (tmp_path / "raw").read_bytes() == bytes([7]) * MiB


def test_a_file_on_a_btrfs_of_two_devices(image: Path, tmp_path: Path) -> None:
    """Its files have an st_dev of no device."""
    disks = [tmp_path / "one", tmp_path / "two"]
    for disk in disks:
        with open(disk, "wb") as f:
            f.truncate(160 * MiB)
    with attached(disks[0]) as a, attached(disks[1]) as b:
        try:
            qemu.run("mkfs.btrfs", "-q", a, b)
        except FileNotFoundError:
            pytest.skip("no mkfs.btrfs here")
        with mounted(tmp_path / "mnt", "-o", f"device={a},device={b}", a) as where:
            qemu.run("btrfs", "-q", "subvolume", "create", where / "sub")
            inner = where / "sub" / image.name
            inner.write_bytes(image.read_bytes())
            for disk in disks:
                assert SAME in refused(inner, disk)
            for device in (a, b):
                assert "device or resource busy" in refused(inner, device)
            with attached(inner) as nested:
                assert SAME in refused(nested, inner, inner)
                assert SAME in refused(nested, disks[1])
            qcow2snap("copy", inner, "s", where / "raw")
            assert (where / "raw").read_bytes() == bytes([7]) * MiB


def test_a_file_seen_through_overlayfs(image: Path, tmp_path: Path) -> None:
    upper, lower, work = (tmp_path / name for name in ("upper", "lower", "work"))
    for directory in (upper, lower, work):
        directory.mkdir()
    (upper / "disk").write_bytes(image.read_bytes())
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    with mounted(tmp_path / "merged", "-t", "overlay", "-o", options, "overlay") as merged:
        for one, other in ((merged, upper), (upper, merged)):
            assert SAME in refused(one / "disk", other / "disk", upper / "disk")
        qcow2snap("copy", merged / "disk", "s", merged / "raw")
        qcow2snap("copy", merged / "disk", "s", tmp_path / "raw")


def test_a_bind_mount_of_the_images_directory(image: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    image.rename(inner / "disk")
    with mounted(tmp_path / "bound", "--bind", inner) as bound:
        assert SAME in refused(inner / "disk", bound / "disk", inner / "disk")


def test_device_mapper(image: Path, tmp_path: Path) -> None:
    """Two linear devices made by hand, of which /sys does not say what they have of the disk."""
    names = [f"qcow2snap-{tmp_path.name}-{n}" for n in (1, 2)]
    with attached(image) as device:
        made = []
        try:
            for name in names:
                table = f"0 {8 * MiB // 512} linear {device} 0"
                done = subprocess.run(
                    ["dmsetup", "create", name, "--table", table],
                    capture_output=True,
                    check=False,
                    timeout=60,
                )
                if done.returncode:
                    pytest.skip("this kernel has no device mapper")
                made.append(name)
            one, two = (Path("/dev/mapper", name) for name in names)
            assert SAME in refused(image, one, image)
            assert SAME in refused(one, image, image)
            assert SAME in refused(one, two, image)
            assert SAME in refused(one, device, image) or "busy" in refused(one, device, image)
        finally:
            for name in made:
                qemu.run("dmsetup", "remove", name)
