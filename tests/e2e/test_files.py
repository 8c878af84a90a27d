"""qcow2snap ls, cat and extract: what was put into a real filesystem comes out of its snapshot."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support import filesystems, qemu, secret
from support.command import fails, qcow2snap, qcow2snap_json, run
from support.filesystems import digests, make_filesystem, make_tree, mounted, needs, snapshot_of
from support.qemu import MiB
from support.server import ROOT

from qcow2snap_core.files.volumes import How
from qcow2snap_core.fuse.tree import Root
from qcow2snap_core.image.opener import open_image

READ = [
    ("ext4", "tsk"),
    ("ext2", "dissect"),
    ("ext4", "dissect"),
    ("xfs", "dissect"),
    ("btrfs", "dissect"),
    ("ntfs", "tsk"),
    ("fat", "tsk"),
]
OWN = ("lost+found",)


@pytest.fixture(autouse=True)
def with_dissect(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystems.use_dissect(monkeypatch)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", "ext4")


def cat(*arguments: object) -> bytes:
    line = [sys.executable, "-m", "qcow2snap_core", "cat", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, timeout=60, check=True).stdout


def assert_is(found: Path, tree: Path, kind: str) -> None:
    expected = digests(tree)
    if kind == "xfs":  # what mkfs.xfs's prototype cannot have
        expected.pop("ünïcode ☃")
    assert digests(found, without=OWN) == expected
    if kind in ("ext4", "btrfs"):
        for name in expected:
            a, b = (tree / name).lstat(), (found / name).lstat()
            assert a.st_mtime_ns == b.st_mtime_ns, name
            assert stat.S_IMODE(a.st_mode) == stat.S_IMODE(b.st_mode), name


@pytest.mark.parametrize(("kind", "backend"), READ)
def test_what_was_put_in_comes_out(tmp_path: Path, kind: str, backend: str) -> None:
    needs(kind, backend)
    tree = make_tree(tmp_path / "tree", kind)
    image = snapshot_of(make_filesystem(kind, tree, tmp_path / "disk.raw"))
    how = ["--backend", backend, image, "one"]
    listed = {e["path"]: e for e in qcow2snap_json("ls", "-R", *how)}
    there = digests(tree)
    if kind != "xfs":
        assert set(listed) - set(OWN) == set(there)
    assert listed["big"]["size"] == 3 * MiB + 17
    assert listed["big"]["type"] == "file"
    assert cat(*how, "/big") == (tree / "big").read_bytes()
    if "sparse" in there:
        assert cat(*how, "sparse") == (tree / "sparse").read_bytes()
    qcow2snap("extract", *how, "/", tmp_path, "--as", "found")
    assert_is(tmp_path / "found", tree, kind)


KERNEL = [
    ("ext4", "tsk", []),
    ("ext4", "dissect", []),
    ("ext2", "dissect", ["-b", 4096]),
    ("xfs", "dissect", []),
    ("btrfs", "dissect", []),
]


@pytest.mark.parametrize(("kind", "backend", "options"), KERNEL)
def test_what_the_kernel_shows_comes_out(
    tmp_path: Path, kind: str, backend: str, options: list[object]
) -> None:
    """Holes, and preallocated space over old bytes, which mkfs makes none of."""
    needs(kind, backend)
    tree = make_tree(tmp_path / "tree", kind)
    raw = make_filesystem(kind, tree, tmp_path / "disk.raw", *options)
    driver = "ext4" if kind == "ext2" else kind
    with mounted(driver, raw, *(["compress=zstd"] if kind == "btrfs" else [])) as top:
        with suppress(OSError), open(top / "old", "wb", buffering=0) as f:
            while True:  # until nothing is free
                f.write(b"\xee" * MiB)
        os.sync()
        (top / "old").unlink()
        os.sync()
        if kind != "ext2":
            with open(top / "allocated", "wb") as f:
                os.posix_fallocate(f.fileno(), 0, 6 * MiB)
                os.pwrite(f.fileno(), b"data", 3 * MiB)
        with open(top / "holes", "wb") as f:
            f.write(b"x" * 10_000)
            f.seek(MiB)
            f.write(b"y" * 5000)
            f.truncate(3 * MiB + 5)
        (top / "text2").write_bytes((tree / "text").read_bytes())
        for i in range(300):
            (top / "etc" / f"a rather long name {i}").touch()
        for i in range(0, 300, 2):
            (top / "etc" / f"a rather long name {i}").unlink()
    image = snapshot_of(raw)
    qcow2snap("extract", "--backend", backend, image, "one", "/", tmp_path, "--as", "found")
    oracle = tmp_path / "oracle.raw"
    qemu.run("qemu-img", "convert", "-l", "one", "-O", "raw", image, oracle)
    with mounted(driver, oracle, "ro") as top:
        assert digests(tmp_path / "found", without=OWN) == digests(top, without=OWN)


@pytest.mark.parametrize("what", ["compressed", "encrypted"])
def test_out_of_a_compressed_or_encrypted_image(tmp_path: Path, tree: Path, what: str) -> None:
    needs("ext4", "tsk")
    raw = make_filesystem("ext4", tree, tmp_path / "disk.raw")
    image, options = tmp_path / "disk.qcow2", []
    if what == "compressed":
        qemu.run("qemu-img", "convert", "-c", "-O", "qcow2", raw, image)
        qemu.take(image, "one")
    else:
        secret.create(image, 48 * MiB, ("x",), **{"encrypt.format": "luks"})
        words = ["convert", "-n", "--target-image-opts", *secret.objects(("x",))]
        qemu.run("qemu-img", *words, raw, secret.opened(image, ("x",))[1])
        secret.take(image, ("x",), "one")
        options = ["--passphrase", "x"]
    assert cat("--backend", "tsk", *options, image, "one", "/big") == (tree / "big").read_bytes()


def table(raw: Path, script: str, parts: dict[int, Path], size: int = 160 * MiB) -> Path:
    """A disk with a partition table by sfdisk, and content by the partition's start in MiB."""
    with open(raw, "wb") as f:
        f.truncate(size)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    qemu.run("sfdisk", "-q", raw, input=script, env=environment)
    for start, part in parts.items():
        qemu.patch(raw, start * MiB, part.read_bytes())
    return raw


TABLES = {
    "GPT": ("label: gpt\nsize=50M,type=L\nsize=50M,type=L\nsize=10M,type=U\n", 51, 2),
    "MBR": ("label: dos\nsize=50M,type=83\nsize=50M,type=83\nsize=10M,type=c\n", 51, 2),
    "logical": (
        "label: dos\nd1: size=10M,type=83\nd2: start=22528,size=130M,type=5\n"
        "d5: size=10M,type=83\nd6: size=50M,type=83\n",
        23,
        6,
    ),
}


@pytest.mark.parametrize(("script", "start", "number"), TABLES.values(), ids=TABLES.keys())
def test_a_partition_is_named(
    tmp_path: Path, tree: Path, script: str, start: int, number: int
) -> None:
    part = make_filesystem("ext4", tree, tmp_path / "part.raw")
    image = snapshot_of(table(tmp_path / "disk.raw", script, {start: part}))
    assert cat(image, f"one:{number}", "etc/hostname") == b"guest1\n"
    line = fails("ls", image, "one")
    assert "this disk has 3 partitions: name one, one:1 (Linux, " in line
    assert f"one:{number} (Linux, 50 MiB)" in line
    assert f"name one, one:1, one:{5 if number == 6 else 2}" in fails("ls", image, "one:9")
    assert "there is no filesystem" in fails("ls", image, "one:1")
    # The same in the command that shows a filesystem with other programs.
    (tmp_path / "mnt").mkdir()
    said = fails("mount", "--filesystem", image, "one", tmp_path / "mnt")
    assert f"{number} (Linux, 50 MiB)" in said
    assert "--partition" in said


def test_the_only_partition_need_not_be_named(tmp_path: Path, tree: Path) -> None:
    part = make_filesystem("ext4", tree, tmp_path / "part.raw")
    image = snapshot_of(table(tmp_path / "disk.raw", "label: gpt\nsize=50M\n", {1: part}))
    assert cat(image, "one", "etc/hostname") == cat(image, "1:1", "etc/hostname") == b"guest1\n"


def test_a_snapshot_with_a_colon_in_its_name(tmp_path: Path, tree: Path) -> None:
    image = snapshot_of(make_filesystem("ext4", tree, tmp_path / "disk.raw"), "a:1")
    assert cat(image, "a:1", "etc/hostname") == b"guest1\n"
    assert "no snapshot 'a'" in fails("ls", image, "a:2")
    assert "it has no partitions" in fails("ls", image, "a:1:2")


def test_a_library_that_does_not_load_says_why(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "here" / "dissect" / "target" / "filesystems"
    broken.mkdir(parents=True)
    (broken / "extfs.py").write_text("from glob import for_another_python\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "here"))
    image = snapshot_of(make_filesystem("ext4", tree, tmp_path / "disk.raw"))
    said = fails("ls", image, "one", "--backend", "dissect")
    assert "install dissect.target with dissect.extfs (pip); the dissect that is here" in said
    assert "does not load: cannot import name 'for_another_python' from 'glob'" in said


def test_lvm(tmp_path: Path, tree: Path) -> None:
    needs("ext4", "dissect")
    if os.geteuid() or not os.access("/dev/loop-control", os.W_OK):
        pytest.skip("LVM's tools want a loop device")
    part = make_filesystem("ext4", tree, tmp_path / "part.raw")
    raw = table(tmp_path / "disk.raw", "label: gpt\nsize=8M\nsize=100M,type=V\n", {})
    where = ["-o", str(9 * MiB), "--sizelimit", str(100 * MiB)]
    device = qemu.run("losetup", "-f", "--show", *where, raw).strip()
    how = ["--config", "activation{udev_sync=0 udev_rules=0} backup{backup=0 archive=0}"]
    try:
        for line in (
            ["pvcreate", device],
            ["vgcreate", "guest", device],
            *(
                ["lvcreate", "-an", "-Zn", "-Wn", "-l", n, "-n", v, "guest"]
                for n, v in (("3", "swap"), ("13", "root"))
            ),
        ):
            qemu.run("lvm", line[0], "--driverloaded", "n", *how, "-y", "-q", *line[1:])
    finally:
        qemu.run("losetup", "-d", device)
    qemu.patch(raw, (9 + 1 + 3 * 4) * MiB, part.read_bytes())
    image = snapshot_of(raw)
    assert cat(image, "one:guest/root", "big") == (tree / "big").read_bytes()
    assert "one:guest/swap, one:guest/root" in fails("ls", image, "one:2")
    assert "2 holds LVM volumes" in fails("ls", image, "one")
    with open_image(str(image)) as opened:  # and what mount shows
        one = Root(opened, How()).child(b"one")
        assert set(one.children().names) == {b"disk", b"p1.error", b"lvm"}
        group = one.child(b"lvm").child(b"guest")
        assert set(group.children().names) == {b"root", b"swap.error"}
        big = group.child(b"root").child(b"big")
        assert big.open().pread(0, 4 * MiB) == (tree / "big").read_bytes()


def test_links_are_followed_inside_of_the_guest(tmp_path: Path, tree: Path) -> None:
    for name, target in {
        "absolute": "/etc/hostname",
        "above": "../../../../../../etc/hostname",
        "loop": "loop2",
        "loop2": "loop",
    }.items():
        os.symlink(target, tree / name)
    image = snapshot_of(make_filesystem("ext4", tree, tmp_path / "disk.raw"))
    for path in ("absolute", "/above", "/etc/into/../../hostname", "../../etc/./long"):
        assert cat(image, "one", path) == b"guest1\n", path
    assert "too many symbolic links" in fails("cat", image, "one", "loop")
    assert "there is no 'nothing'" in fails("cat", image, "one", "/etc/nothing")
    assert "'hostname' in '/etc/hostname/x' is no directory" in fails(
        "cat", image, "one", "/etc/hostname/x"
    )
    assert "is no file: it is a directory" in fails("cat", image, "one", "/etc")
    assert " into -> deep/deeper" in qcow2snap("ls", image, "one", "/etc")
    assert "empty" in qcow2snap("ls", image, "one", "/etc/into")


def test_names_are_escaped(tmp_path: Path, tree: Path) -> None:
    (tree / os.fsdecode(b"a\n\x1b[2Jb\xff")).touch()
    image = snapshot_of(make_filesystem("ext4", tree, tmp_path / "disk.raw"))
    assert r"a\n\x1b[2Jb\xff" in qcow2snap("ls", image, "one")
    paths = [e["path"] for e in qcow2snap_json("ls", image, "one")]
    assert "a\n\x1b[2Jb\udcff" in paths


def test_what_a_machine_had_in_its_journal_is_there(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "name").write_text("old")
    for backend in ("tsk", "dissect"):
        needs("ext4", backend)
        raw = make_filesystem("ext4", tree, tmp_path / f"{backend}.raw")
        block = qemu.run("debugfs", "-R", "blocks /name", raw).split()[0]
        # A block that begins as one of the journal does is escaped there.
        new = b"\xc0\x3b\x39\x98new".ljust(1024, b"\0")
        (tmp_path / "block").write_bytes(new)
        journal = f"jo\njw -b {block} {tmp_path}/block\njc\n"
        qemu.run("debugfs", "-w", "-f", "/dev/stdin", raw, input=journal)
        image = snapshot_of(raw)
        how = ["--backend", backend, image, "one", "name"]
        assert cat(*how) == new[:3]
        assert cat("--ignore-journal", *how) == b"old"


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_snapshot_of_a_mounted_filesystem(tmp_path: Path, kind: str) -> None:
    """The kernel's own journal: ext4's is replayed, to what the kernel makes of it."""
    backend = "dissect"
    needs(kind, backend)
    tree = make_tree(tmp_path / "tree", kind)
    raw, crashed = make_filesystem(kind, tree, tmp_path / "disk.raw"), tmp_path / "crashed.raw"
    with mounted(kind, raw) as top:
        for i in range(200):
            (top / f"new{i}").write_text(f"{i}\n" * 500)
        for i in range(0, 200, 3):
            (top / f"new{i}").unlink()
        fd = os.open(top, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        qemu.run("cp", "--sparse=always", raw, crashed)
    image = snapshot_of(crashed)
    if kind == "xfs":
        said = fails("ls", image, "one")
        assert "journal is not replayed here: --ignore-journal" in said
        assert "text" in qcow2snap("ls", "--ignore-journal", image, "one")
        return
    qcow2snap("extract", "--backend", backend, image, "one", "/", tmp_path, "--as", "found")
    with mounted(kind, crashed) as top:
        expected = digests(top, without=OWN)
    assert "new1" in expected
    assert "new0" not in expected
    assert digests(tmp_path / "found", without=OWN) == expected


def test_a_read_error_is_one_line_and_leaves_no_file(tmp_path: Path, tree: Path) -> None:
    raw = make_filesystem("ext4", tree, tmp_path / "disk.raw")
    image = snapshot_of(raw)
    first, *_ = qemu.run("debugfs", "-R", "blocks /big", raw).split()
    guest = (int(first) * 1024 // 65536 + 20) * 65536
    maps = qcow2snap_json("map", image, "one")
    extent = next(e for e in maps if e["offset"] <= guest < e["offset"] + e["length"])
    # The cluster moves behind the end of the file: that host offset stands in one L2 entry.
    host = extent["host"] + guest - extent["offset"]
    data = image.read_bytes()
    entry = (host | 1 << 63).to_bytes(8, "big"), host.to_bytes(8, "big")
    for old in entry:
        data = data.replace(old, (1 << 40).to_bytes(8, "big"))
    image.write_bytes(data)
    for backend in ("tsk", "dissect"):
        needs("ext4", backend)
        line = fails("extract", "--backend", backend, image, "one", "big", tmp_path)
        assert f"offset {guest}" in line or "past the end" in line or "behind" in line, line
        done = run("cat", "--backend", backend, image, "one", "big")
        assert done.returncode == 1
        assert not (tmp_path / "big").exists()
        assert not list(tmp_path.glob(".qcow2snap-*"))


def test_without_a_library_it_says_what_to_install(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = snapshot_of(make_filesystem("ext4", tree, tmp_path / "disk.raw"))
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for module in ("pytsk3", "dissect"):
        (hidden / f"{module}.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    line = fails("ls", image, "one")
    assert "install dissect.target with dissect.extfs (pip) or python3-tsk (Debian)" in line
