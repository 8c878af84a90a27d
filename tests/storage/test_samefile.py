"""What lies on what: a /sys made of files for what a machine seldom has, real devices for the rest.

Devices here are called as Linux numbers them: 8:x disks, 7:x loop devices, 253:x device mapper.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.devices import opened

from qcow2snap_core.errors import UsageError
from qcow2snap_core.storage.ground import System
from qcow2snap_core.storage.samefile import ensure_apart

NUMBERS = {
    "sda": "8:0",
    "sda1": "8:1",
    "sda2": "8:2",
    "sdb": "8:16",
    "lv": "253:0",
    "other_lv": "253:1",
    "crypt": "253:2",
    "crypt_again": "253:3",
    "mpath": "253:4",
    "mpath_part1": "253:5",
    "mpath_part2": "253:6",
    "linear": "253:7",
    "md": "9:0",
    "loop": "7:0",
    "loop_start": "7:1",
    "loop_rest": "7:2",
    "loop_deleted": "7:3",
    "loop_disk": "7:4",
    "loop_part": "259:0",
}
UUIDS = {
    "lv": "LVM-Ktb1QmBm",
    "other_lv": "LVM-Ktb1QmBn",
    "crypt": "CRYPT-LUKS2-0a-a",
    "crypt_again": "CRYPT-LUKS2-0a-b",
    "mpath": "mpath-3600508b4",
    "mpath_part1": "part1-mpath-3600508b4",
    "mpath_part2": "part2-mpath-3600508b4",
    "linear": "",
}
SLAVES = {
    "lv": ["sda2"],
    "other_lv": ["sda2"],
    "crypt": ["lv"],
    "crypt_again": ["lv"],
    "mpath": ["sda", "sdb"],
    "mpath_part1": ["mpath"],
    "mpath_part2": ["mpath"],
    "linear": ["sda"],
    "md": ["sda1", "sdb"],
}
PARTITIONS = {"sda1": ("sda", 2048, 8192), "sda2": ("sda", 10240, 8192)}
PARTITIONS["loop_part"] = ("loop", 2048, 2048)  # the second MiB
LOOPS = {
    "loop": ("disk.img", 0, 0),
    "loop_start": ("disk.img", 0, 1 << 20),
    "loop_rest": ("disk.img", 1 << 20, 0),
    "loop_deleted": ("gone.img (deleted)", 0, 0),
    "loop_disk": ("other.img", 0, 0),
}


@pytest.fixture
def system(tmp_path: Path) -> System:
    """The devices above, and the files behind the loop devices in the root directory."""
    block = tmp_path / "sys/devices/block"
    links = tmp_path / "sys/dev/block"
    links.mkdir(parents=True)

    def put(path: Path, content: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")

    for name, number in NUMBERS.items():
        directory = block / name
        if name in PARTITIONS:
            parent, start, size = PARTITIONS[name]
            directory = block / parent / name
            put(directory / "partition", 1)
            put(directory / "start", start)
            put(directory / "size", size)
        put(directory / "dev", number)
        (links / number).symlink_to(directory)
        (directory / "slaves").mkdir()
        if name in UUIDS:
            put(directory / "dm/uuid", UUIDS[name])
        if name in LOOPS:
            file, offset, limit = LOOPS[name]
            put(directory / "loop/backing_file", f"/{file}")
            put(directory / "loop/offset", offset)
            put(directory / "loop/sizelimit", limit)
    for name, slaves in SLAVES.items():
        for slave in slaves:
            (block / name / "slaves" / slave).symlink_to(os.readlink(links / NUMBERS[slave]))
    for name in ("disk.img", "other.img"):
        (tmp_path / name).write_bytes(bytes(4096))
    # What the files really lie on.
    os.makedirs(block / "real")
    put(block / "real/dev", "")
    here = os.stat(tmp_path).st_dev
    real = links / f"{os.major(here)}:{os.minor(here)}"
    if os.major(here) and not real.is_dir():
        real.symlink_to(block / "real")
    return System(str(tmp_path))


def ground(system: System, name: str):
    if name.endswith(".img"):
        return system.of_path(str(system.path(name)))
    major, minor = map(int, NUMBERS[name].split(":"))
    return system.of_device(os.makedev(major, minor))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        *((name, name, True) for name in NUMBERS),
        ("sda", "sda1", True),
        ("sda1", "sda2", False),
        ("sda", "sdb", False),
        # LVM keeps its volumes apart; what is below one is not.
        ("lv", "sda2", True),
        ("lv", "sda", True),
        ("lv", "sda1", False),
        ("lv", "other_lv", False),
        ("crypt", "lv", True),
        ("crypt", "sda", True),
        ("crypt", "other_lv", False),
        ("crypt", "crypt_again", True),
        ("mpath", "sdb", True),
        ("mpath_part1", "sda", True),
        ("mpath_part1", "mpath", True),
        ("mpath_part1", "mpath_part2", False),
        # One made by hand: nobody says which part of the disk it has.
        ("linear", "sda", True),
        ("linear", "sda1", True),
        ("linear", "lv", True),
        ("linear", "sdb", False),
        ("md", "sdb", True),
        ("md", "sda1", True),
        ("md", "sda", True),
        ("md", "sda2", False),
        ("md", "lv", False),
        # Loop devices lie where they say in the file.
        ("loop", "disk.img", True),
        ("loop", "other.img", False),
        ("loop", "loop_disk", False),
        ("loop", "loop_start", True),
        ("loop", "loop_rest", True),
        ("loop_start", "loop_rest", False),
        ("loop_part", "disk.img", True),
        ("loop_part", "loop_start", False),
        ("loop_part", "loop_rest", True),
        ("disk.img", "disk.img", True),
        ("disk.img", "other.img", False),
    ],
)
def test_what_has_bytes_in_common(system, one, other, same):
    assert ground(system, one).collides(ground(system, other)) is same
    assert ground(system, other).collides(ground(system, one)) is same
    assert not ground(system, one).unknown or one == "loop_deleted"


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (os.makedev(7, 3), "/dev/loop_deleted lies on a file that has no name"),
        (os.makedev(8, 99), "/sys says nothing of the device 8:99"),
    ],
)
def test_what_is_unknown_is_said(system, number, why):
    assert system.of_device(number).unknown == why


@pytest.mark.parametrize("field", ["start", "size"])
def test_a_partition_of_which_sys_says_nonsense_is_unknown(system, field):
    Path(system.path("/sys/devices/block/sda/sda1", field)).write_text("?\n")
    assert "/sys is not clear about the device 8:1" in ground(system, "sda1").unknown


def test_a_loop_of_slaves_ends(system):
    slaves = Path(system.path("/sys/devices/block/lv/slaves"))
    (slaves / "crypt").symlink_to("../../crypt")
    assert ground(system, "crypt").collides(ground(system, "lv"))


def test_links_to_one_file_are_that_file(tmp_path):
    for name in ("image", "other"):
        (tmp_path / name).write_bytes(bytes(512))
    os.link(tmp_path / "image", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("image")
    with opened(tmp_path / "image") as image:
        for name in ("image", "hard", "soft"):
            with pytest.raises(UsageError, match=f"'{name}' is .*, which is being copied"):
                ensure_apart(str(tmp_path / name), [image], name)
        ensure_apart(str(tmp_path / "other"), [image], "other")
        ensure_apart(str(tmp_path), [image], "new", new=True)


def test_an_image_that_was_replaced_is_still_known_by_its_inode(tmp_path):
    (tmp_path / "image").write_bytes(bytes(512))
    os.link(tmp_path / "image", tmp_path / "hard")
    with opened(tmp_path / "image") as image:
        (tmp_path / "new").write_bytes(bytes(512))
        os.rename(tmp_path / "new", tmp_path / "image")
        with pytest.raises(UsageError, match="which is being copied"):
            ensure_apart(str(tmp_path / "hard"), [image], "hard")
        with pytest.raises(UsageError, match="no telling .* its name leads elsewhere now"):
            ensure_apart(str(tmp_path / "image"), [image], "image")
        ensure_apart(str(tmp_path), [image], "new", new=True)
