"""``qcow2snap mount FILE DIR``: all snapshots as one tree, read through the kernel's own FUSE."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from support import command, damage, qemu, secret
from support.filesystems import digests, make_filesystem, make_tree, needs
from support.live import running
from support.qemu import KiB, MiB
from support.remote import remote
from support.running import eventually, processes_with, started, until
from support.server import ROOT
from support.vm import machine

pytestmark = pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK) or importlib.util.find_spec("pyfuse3") is None,
    reason="no FUSE here",
)

SIZE = 4 * MiB


@contextmanager
def shown(image: object, where: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    """The image's snapshots are there until the block ends; nothing may be said on stderr then."""
    with started("mount", *options, image, where) as process:
        until(lambda: os.path.ismount(where), process)
        yield process
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert not os.path.ismount(where)


def said(process: subprocess.Popen[str]) -> list[str]:
    """What it has said on stderr, after it was ended."""
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[1].splitlines()


def raises(number: int) -> pytest.RaisesContext[OSError]:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mount") / "disk.qcow2"
    qemu.RandomImage(path, seed=9, size=SIZE).make(["one", "two"])
    return path.rename(path.with_name("disk,of,100%.qcow2"))


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with an ext4 filesystem, swap space, and a partition with neither."""
    needs("ext4", "tsk")
    folder = tmp_path_factory.mktemp("guests")
    (folder / "tree").mkdir()
    tree = make_tree(folder / "tree", "ext4")
    links = {"absolute": "/etc/hostname", "above": "../../../../../etc/hostname", "root": "/"}
    links |= {"through": "into/../../../../etc/../tmp", "missing": "/no/../such"}
    for name, target in links.items():
        os.symlink(target, tree / "etc" / name)
    os.mkfifo(tree / "fifo")
    (tree / "setuid").write_text("x")
    (tree / "setuid").chmod(0o4711)
    return partitioned(folder, make_filesystem("ext4", tree, folder / "ext4.raw"))


def partitioned(folder: Path, filesystem: Path) -> Path:
    """An image with the snapshot ``one`` of a disk with that in its first partition."""
    sectors = filesystem.stat().st_size // 512
    swap = bytes(4086) + b"SWAPSPACE2"
    entries = [(0x83, 2048, sectors), (0x82, 2048 + sectors, 2048), (0x83, 4096 + sectors, 2048)]
    mbr = bytes(446)
    for kind, first, count in entries:
        mbr += bytes([0, 0, 0, 0, kind, 0, 0, 0])
        mbr += first.to_bytes(4, "little") + count.to_bytes(4, "little")
    raw = folder / "whole.raw"
    content = (mbr.ljust(510, b"\0") + b"\x55\xaa").ljust(MiB, b"\0") + filesystem.read_bytes()
    raw.write_bytes(content + swap.ljust(2 * MiB, b"\0"))
    path = folder / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, "one")
    qemu.io(path, "write -P 7 0 1M")
    return path


# --- Disks ---


def test_every_snapshot_is_a_directory_with_its_disk(image: Path, where: Path) -> None:
    with shown(image, where):
        assert sorted(os.listdir(where)) == ["one", "two"]
        for name in ("one", "two"):
            disk = where / name / "disk"
            assert disk.read_bytes() == qemu.content(image, name)
            taken = qemu.snapshots(image)[name]
            for path in (disk, disk.parent):
                assert path.stat().st_mtime_ns // 1000 == taken.date_nsec // 1000 + (
                    taken.date_sec * 10**6
                )
            assert disk.stat().st_size == SIZE
            assert disk.stat().st_uid == os.getuid()
        assert os.statvfs(where).f_blocks * 512 >= image.stat().st_size
        assert os.statvfs(where).f_bfree == 0


def test_nothing_can_be_written(image: Path, where: Path) -> None:
    with shown(image, where):
        for path in (where / "one" / "disk", where / "new", where / "one" / "new"):
            with raises(errno.EROFS):
                path.write_bytes(b"x")
        with raises(errno.EROFS):
            (where / "one").rmdir()


def test_what_the_system_says_of_it(image: Path, where: Path) -> None:
    with shown(image, where):
        (line,) = (x for x in Path("/proc/mounts").read_text().splitlines() if str(where) in x)
    source, _, kind, options, *_ = line.split()
    assert (source, kind) == (f"{image.parent}/disk%2Cof%2C100%25.qcow2", "fuse.qcow2snap")
    assert {"ro", "nosuid", "nodev"} <= set(options.split(","))


def test_a_disk_that_is_no_multiple_of_anything(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB + 512)
    qemu.io(path, "write -P 5 1M 512")
    qemu.take(path, "one")
    with shown(path, where):
        assert (where / "one" / "disk").read_bytes() == bytes(MiB) + b"\5" * 512


def test_vm_states_stand_beside_their_disks(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 3 * MiB)
    with machine(path) as vm:
        vm.save("live")
    command.qcow2snap("copy", path, "live/vmstate", tmp_path / "state")
    with shown(path, where):
        assert {"disk", "vmstate"} <= set(os.listdir(where / "live"))
        assert (where / "live" / "vmstate").read_bytes() == (tmp_path / "state").read_bytes()


NAMES = [b"a/b", b"a\nb", b"..", b".", b"", b"\xff", b"twice", b"twice", b"n" * 300, b"-x", b"50%"]
EXPECTED = ["a%2Fb", "a%0Ab", "%2E%2E", "%2E", "5", "%FF", "7", "8", "9", "%2Dx", "50%25"]


def test_names_are_escaped_and_choose_the_right_disk(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for number in range(len(NAMES)):
        qemu.io(path, f"write -P {number + 1} 0 64k")
        qemu.take(path, f"s{number}")
    damage.rename(path, {f"s{number}": name for number, name in enumerate(NAMES)})
    with shown(path, where):
        assert sorted(os.listdir(where)) == sorted(EXPECTED)
        for number, name in enumerate(EXPECTED):
            with open(where / name / "disk", "rb") as disk:
                assert set(disk.read(64 * KiB)) == {number + 1}


def test_an_encrypted_image(tmp_path: Path, where: Path) -> None:
    path = tmp_path / "disk.qcow2"
    secret.create(path, SIZE, ("horse",), **{"encrypt.format": "aes"})
    secret.io(path, ("horse",), "write -P 7 0 64k")
    secret.take(path, ("horse",), "one")
    with shown(path, where, "--passphrase", "horse"):
        assert (where / "one" / "disk").read_bytes() == b"\7" * 64 * KiB + bytes(SIZE - 64 * KiB)


# --- Damage ---


def test_a_damaged_snapshot_says_why_and_the_others_are_there(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 3 0 64k")
    for name in ("good", "bad"):
        qemu.take(path, name)
    entry = qemu.snapshots(path)["bad"].entry_offset
    damage.put64(path, entry, 12345)  # the L1 table's offset
    with shown(path, where):
        assert os.listdir(where / "bad") == ["disk.error"]
        (line,) = (where / "bad" / "disk.error").read_text().splitlines()
        assert "0x3039 is not one of a cluster" in line
        assert (where / "good" / "disk").read_bytes()[:3] == b"\3\3\3"


def test_a_damaged_table_is_told_on_stderr_too(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    for name in ("good", "bad"):
        qemu.take(path, name)
    qemu.patch(path, 60, b"\0\0\0\x03")
    with shown(path, where) as process:
        assert sorted(os.listdir(where)) == ["bad", "good", "snapshots.error"]
        lines = said(process)
    assert len(lines) == 1, lines
    line = lines[0]
    assert line.startswith(f"qcow2snap: warning: '{path}': the snapshot table is damaged: entry 3 ")


def test_an_image_without_snapshots(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    with shown(path, where) as process:
        qemu.take(path, "one")
        eventually(lambda: os.listdir(where) == ["one"])
        (line,) = said(process)
    assert f"'{path}' has no snapshots yet" in line


def test_a_server_that_hangs(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.take(path, "one")
    with (
        remote("file", path) as server,
        shown(server.uri, where, "--remote-timeout", "1") as process,
    ):
        assert os.listdir(where) == ["one"]
        server.freeze()
        with raises(errno.EIO):
            os.listdir(where)
        server.thaw()
        lines = said(process)
    assert lines
    for line in lines:
        assert line.startswith("qcow2snap: reading ")
        assert line.endswith("the server has not answered for 1 s")


def test_a_bad_cluster_is_an_error_of_its_own_bytes(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write -P 3 0 1M")
    qemu.take(path, "one")
    damage.put64(path, damage.l2_entry(path, "one", 512 * KiB), 1 << 50)
    with shown(path, where) as process:
        with open(where / "one" / "disk", "rb", buffering=0) as disk:
            assert disk.read(4096) == b"\3" * 4096
            disk.seek(512 * KiB)
            with raises(errno.EIO):
                disk.read(4096)
            disk.seek(768 * KiB)
            assert disk.read(4096) == b"\3" * 4096
        (line,) = said(process)
    assert line.startswith("qcow2snap: one/disk: ")
    assert "guest offset 0x80000" in line


# --- Files ---


def test_the_files_of_a_guest(guests: Path, where: Path) -> None:
    tree = guests.parent / "tree"
    with shown(guests, where) as process:
        top = where / "one"
        assert sorted(os.listdir(top)) == ["disk", "p1", "p2.error", "p3.error"]
        assert "swap space" in (top / "p2.error").read_text()
        assert "no filesystem that is known" in (top / "p3.error").read_text()
        links = {f"etc/{name}" for name in ("absolute", "above", "root", "through", "missing")}
        left_out = (*links, "fifo", "lost+found")
        assert digests(top / "p1", without=left_out) == digests(tree, without=left_out)
        for path in (Path(), *(p.relative_to(tree) for p in tree.rglob("*"))):
            here, there = (top / "p1" / path).lstat(), (tree / path).lstat()
            assert (here.st_mode, here.st_uid, here.st_gid) == (
                (there.st_mode, there.st_uid, there.st_gid)
            ), path
            if path.is_file():
                assert here.st_size == there.st_size
        assert (top / "p1" / "big").stat().st_mtime_ns == 10**18
        one, two = ((top / "p1" / name).stat() for name in ("text", "etc/again"))
        assert (one.st_ino, one.st_nlink) == (two.st_ino, 2)
        assert said(process) == []


def test_an_open_directory_of_a_deleted_snapshot_is_not_listed(
    guests: Path, tmp_path: Path, where: Path
) -> None:
    path = Path(shutil.copy(guests, tmp_path / "disk.qcow2"))
    with shown(path, where):
        etc = os.open(where / "one" / "p1" / "etc", os.O_RDONLY)
        qemu.delete(path, "one")
        with raises(errno.EIO):
            os.listdir(etc)
        os.close(etc)


def test_a_directory_is_listed_from_any_place(guests: Path, where: Path) -> None:
    """Whole, by several at once, each of which goes on where it was."""
    tree = guests.parent / "tree"
    with shown(guests, where), ExitStack() as several:
        etc = where / "one" / "p1" / "etc"
        listings = [several.enter_context(os.scandir(etc)) for _ in range(3)]
        found = [[(e.name, e.inode()) for e in both] for both in zip(*listings, strict=True)]
        assert all(len(set(each)) == 1 for each in found)
        assert sorted(each[0][0] for each in found) == sorted(os.listdir(tree / "etc"))
        assert all((etc / name).lstat().st_ino == inode for (name, inode), *_ in found)


def test_links_lead_where_the_guest_would_arrive(guests: Path, where: Path) -> None:
    etc = where / "one" / "p1" / "etc"
    with shown(guests, where):
        assert (etc / "absolute").read_text() == "guest1\n"
        assert (etc / "above").read_text() == "guest1\n"
        assert (etc / "root").samefile(where / "one" / "p1")
        assert os.readlink(etc / "absolute") == "../etc/hostname"
        assert os.readlink(etc / "through") == "../tmp"
        assert os.readlink(etc / "link") == "../text"
        with raises(errno.ENOENT):
            (etc / "missing").stat()
        for link in etc.iterdir():
            if link.is_symlink():
                assert (where / "one" / "p1").resolve() in (link.resolve(), *link.resolve().parents)


def test_a_disk_that_is_one_filesystem(guests: Path, tmp_path: Path, where: Path) -> None:
    path = tmp_path / "disk.qcow2"
    raw = guests.parent / "ext4.raw"
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, "one")
    with shown(path, where):
        assert sorted(os.listdir(where / "one")) == ["disk", "files"]
        assert (where / "one" / "files" / "etc" / "hostname").read_text() == "guest1\n"


def test_a_file_with_a_bad_cluster_is_an_error_and_the_others_go_on(
    guests: Path, tmp_path: Path, where: Path
) -> None:
    path = Path(shutil.copy(guests, tmp_path / "disk.qcow2"))
    content = qemu.content(path, "one")
    text = (guests.parent / "tree" / "big").read_bytes()
    place = content.index(text[2 * MiB : 2 * MiB + 4096])
    damage.put64(path, damage.l2_entry(path, "one", place), 1 << 50)
    with shown(path, where) as process:
        top = where / "one" / "p1"
        with open(top / "big", "rb") as big:
            with raises(errno.EIO):
                big.read()
            big.seek(0)
            assert big.read(64 * KiB) == text[: 64 * KiB]
        assert (top / "text").read_bytes() == (guests.parent / "tree" / "text").read_bytes()
        lines = said(process)
    assert lines
    assert all(line.startswith("qcow2snap: one/p1/big: ") for line in lines)


# --- A running QEMU ---


def after_a_moment(read: Callable[[], bytes]) -> bytes:
    """What there is when the kernel has forgotten which snapshot had that name: until then it is an
    error."""
    for _ in range(100):
        try:
            return read()
        except OSError as e:
            if e.errno not in (errno.EIO, errno.ENOENT):
                raise
            time.sleep(0.05)
    raise AssertionError


def test_snapshots_come_and_go_and_none_gives_other_bytes(tmp_path: Path, where: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    with running(path) as live, live.guest() as guest, shown(path, where):
        guest.pwrite(b"\1" * MiB, 0)
        live.take("old")
        guest.pwrite(b"\2" * SIZE, 0)
        assert os.listdir(where) == ["old"]
        with open(where / "old" / "disk", "rb", buffering=0) as disk:
            assert disk.read(64 * KiB) == b"\1" * 64 * KiB
            folder = os.open(where / "old", os.O_PATH)
            live.delete("old")
            live.take("old")  # another one
            guest.pwrite(b"\3" * SIZE, 0)
            disk.seek(512 * KiB)
            with raises(errno.EIO):
                disk.read(64 * KiB)
            assert set(after_a_moment((where / "old" / "disk").read_bytes)) == {2}
            live.take("new")
            assert sorted(os.listdir(where)) == ["new", "old"]
            assert set((where / "new" / "disk").read_bytes()) == {3}
            with raises(errno.EIO):
                os.open(".", os.O_RDONLY, dir_fd=folder)
            with raises(errno.EIO):
                os.open("disk", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            live.delete("old")
            assert os.listdir(where) == ["new"]
            eventually(lambda: not (where / "old").exists())


def test_what_the_kernel_keeps_of_a_deleted_snapshot_goes_within_seconds(
    tmp_path: Path, where: Path
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    with running(path) as live, live.guest() as guest, shown(path, where):
        guest.pwrite(b"\1" * SIZE, 0)
        live.take("old")
        with open(where / "old" / "disk", "rb", buffering=0) as disk:
            assert disk.read(4096) == b"\1" * 4096
            live.delete("old")

            def gone() -> bool:
                disk.seek(0)
                try:
                    assert disk.read(4096) == b"\1" * 4096
                except OSError as e:
                    return e.errno == errno.EIO
                return False

            eventually(gone)


# --- Many at once ---


def test_many_read_at_once(image: Path, guests: Path, where: Path, tmp_path: Path) -> None:
    expected = qemu.content(image, "two")

    def read(number: int) -> bool:
        start = number * 7919 % (SIZE - 100_000)
        with open(where / "two" / "disk", "rb", buffering=0) as disk:
            return os.pread(disk.fileno(), 99_991, start) == expected[start : start + 99_991]

    with shown(image, where), ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(300)))
    names = [f"etc/file{i}" for i in range(60)] * 5
    digest = {name: sha256((guests.parent / "tree" / name).read_bytes()) for name in set(names)}

    def same(name: str) -> bool:
        data = (where / "one" / "p1" / name).read_bytes()
        return sha256(data).digest() == digest[name].digest()

    with shown(guests, where), ThreadPoolExecutor(16) as pool:
        assert all(pool.map(same, names))


def test_a_slow_filesystem_keeps_no_disk_waiting(guests: Path, where: Path) -> None:
    with shown(guests, where), ThreadPoolExecutor(16) as pool:
        slow = [pool.submit(digests, where / "one" / "p1" / "etc") for _ in range(12)]
        with open(where / "one" / "disk", "rb", buffering=0) as disk:
            for number in range(20):
                began = time.monotonic()
                assert len(os.pread(disk.fileno(), 4096, number * MiB)) == 4096
                if all(each.done() for each in slow):
                    break
                assert time.monotonic() - began < 10
        assert len({str(each.result()) for each in slow}) == 1


# --- The end ---

DEFECT = """
import sys
from qcow2snap_core import cli
from qcow2snap_core.fuse.tree import Root

def gone(root):
    raise LookupError("a defect")

Root.gone = gone
sys.exit(cli.main(sys.argv[1:]))
"""


def test_nothing_stays_mounted_that_would_not_hear_of_deleted_snapshots(
    image: Path, where: Path
) -> None:
    line = [sys.executable, "-c", DEFECT, "mount", image, where]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "LookupError: a defect"
    assert not os.path.ismount(where)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_also_while_it_is_in_use(image: Path, where: Path, number: int) -> None:
    with started("mount", image, where) as process:
        until(lambda: os.path.ismount(where), process)
        assert process.stdout
        assert process.stdout.readline() == f"{where} is there until Ctrl-C\n"
        disk = os.open(where / "one" / "disk", os.O_RDONLY)
        os.read(disk, 10)
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 128 + number
        assert os.listdir(where) == []
        with raises(errno.ENOTCONN):
            os.close(disk)
    eventually(lambda: not processes_with(str(where)))


def test_unmounting_ends_it(image: Path, where: Path) -> None:
    with started("mount", image, where) as process:
        until(lambda: os.path.ismount(where), process)
        os.listdir(where / "one")
        line = ["fusermount3", "-q", "-u", where]
        eventually(lambda: subprocess.run(line, check=False).returncode == 0)
        assert process.wait(60) == 0
    eventually(lambda: not processes_with(str(where)))


def test_after_a_kill_nothing_stays_mounted(image: Path, where: Path) -> None:
    with started("mount", image, where) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.kill()
        process.wait(60)
        eventually(lambda: str(where) not in Path("/proc/mounts").read_text())
    eventually(lambda: not processes_with(str(where)))


def test_as_an_ordinary_user(image: Path) -> None:
    """Where users may use FUSE, as on most systems, if not on this one."""
    with tempfile.TemporaryDirectory() as name:  # tmp_path is in a directory of root's
        folder, where = Path(name), Path(name, "mnt")
        folder.chmod(0o755)
        where.mkdir()
        os.chown(where, 65534, 65534)
        copy = Path(shutil.copy(image, folder / "copy.qcow2"))
        (folder / "expected").write_bytes(qemu.content(copy, "one"))
        for path in (copy, folder / "expected"):
            path.chmod(0o644)
        user = " ".join(command.NOBODY)
        script = f"""
            set -e
            mknod {folder}/fuse c 10 229
            chmod 666 {folder}/fuse
            mount --bind {folder}/fuse /dev/fuse
            (
                for i in $(seq 100); do grep -q {where} /proc/mounts && break; sleep 0.1; done
                {user} cmp {where}/one/disk {folder}/expected && echo same
                cat {where}/one/disk 2>/dev/null || echo not for others
                {user} fusermount3 -u {where}
            ) &
            "$@"
            wait
        """
        before = ["unshare", "-m", "sh", "-c", script, "sh"]
        done = command.as_nobody("mount", copy, where, before=before)
        assert (done.returncode, done.stderr) == (0, "")
        said = [f"{where} is there until Ctrl-C", "not for others", "same"]
        assert sorted(done.stdout.splitlines()) == said
        assert str(where) not in Path("/proc/mounts").read_text()


# --- The command line ---

REFUSED = {
    "no such directory": (["none"], 1, "there is no directory"),
    "a partition of all": (["--partition", "1", "mnt"], 2, "go with a SNAPSHOT"),
    "files of all": (["--filesystem", "mnt"], 2, "go with a SNAPSHOT"),
    "a back end of one": (["--backend", "tsk", "one", "mnt"], 2, "go without a SNAPSHOT"),
}


@pytest.mark.parametrize(("line", "status", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_mounted_is_one_line(
    image: Path, where: Path, line: list[str], status: int, expected: str
) -> None:
    *options, directory = line
    if "one" in options:
        options = [*options[:-1], str(image), "one"]
    else:
        options.append(str(image))
    done = command.run("mount", *options, where.parent / directory)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1)
    assert expected in done.stderr


@pytest.mark.parametrize("place", range(4))
def test_options_stand_anywhere(tmp_path: Path, where: Path, image: Path, place: int) -> None:
    words = [str(image), "none", str(where)]
    words[place:place] = ["--partition", "1"]
    assert "no snapshot 'none'" in command.fails("mount", *words)


@pytest.mark.parametrize("limit", [8, 12, 16])
def test_too_few_descriptors_are_one_line(image: Path, where: Path, limit: int) -> None:
    script = f'ulimit -n {limit}; exec "$@" 2>&1'
    command_line = [sys.executable, "-m", "qcow2snap_core", "mount", image, where]
    done = subprocess.run(
        ["bash", "-c", script, "-", *command_line], stdout=subprocess.PIPE, check=False, cwd=ROOT
    )
    (line,) = done.stdout.decode().splitlines()
    assert done.returncode == 1
    assert "too many open files: a mount needs " in line


def test_without_the_library_it_says_what_to_install(
    image: Path, where: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyfuse3.py").write_text("raise ModuleNotFoundError(name='pyfuse3')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = command.fails("mount", image, where)
    assert said.startswith("qcow2snap: pyfuse3 is missing: install python3-pyfuse3")
