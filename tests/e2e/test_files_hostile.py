"""What a hostile guest may have put into its filesystem, and qcow2snap extract does not do."""

from __future__ import annotations

import os
import socket
import stat
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from support import filesystems, qemu
from support.command import fails, qcow2snap, run
from support.filesystems import make_filesystem, needs, snapshot_of
from support.qemu import KiB, MiB

import qcow2snap_core
from qcow2snap_core import cli
from qcow2snap_core.errors import ImageError, SnapshotGone
from qcow2snap_core.files.extract import stays_inside
from qcow2snap_core.files.tree import find
from qcow2snap_core.files.volumes import How, open_filesystem

BACKENDS = ["tsk", "dissect"]
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def with_dissect(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystems.use_dissect(monkeypatch)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """An image of what is in ``tree``, after bytes of the raw filesystem were exchanged and
    commands of debugfs were run on it."""

    def made(*commands: str, patches: dict[bytes, bytes] | None = None) -> Path:
        features = ["-O", "^metadata_csum"]
        raw = make_filesystem("ext4", tmp_path / "tree", tmp_path / "disk.raw", *features)
        data = raw.read_bytes()
        for old, new in (patches or {}).items():
            assert data.count(old) == 1, old
            data = data.replace(old, new)
        raw.write_bytes(data)
        if commands:
            script = "\n".join(commands) + "\n"
            qemu.run("debugfs", "-w", "-f", "/dev/stdin", raw, input=script)
        return snapshot_of(raw)

    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    return made


def extracted(image: Path, backend: str, *more: object, status: int = 0) -> list[str]:
    """What it says while it extracts everything into ``out/top``."""
    needs("ext4", backend)
    how = ["--backend", backend, "--as", "top", *more]
    done = run("extract", *how, image, "one", "/", image.parent / "out")
    assert done.returncode == status, done
    return done.stderr.splitlines()


def below(top: Path) -> list[str]:
    return sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.name != "lost+found")


@both
def test_names_that_lead_elsewhere(tmp_path: Path, make: Callable[..., Path], backend: str) -> None:
    names = {b"aa-escape": b"../escape", b"bb-under": b"bb/under", b"cc-nul": b"cc\0nul"}
    for name in (*names, b"dd"):
        (tmp_path / "tree" / os.fsdecode(name)).write_text("bad")
    (tmp_path / "tree" / "ee-folder").mkdir()
    (tmp_path / "tree" / "ee-folder" / "inside").write_text("bad")
    (tmp_path / "tree" / "good").write_text("good")
    image = make(patches={**names, b"ee-folder": b"../folder"})
    said = extracted(image, backend)
    for name in ("../escape", "bb/under", "../folder"):
        assert f"qcow2snap: left out: 'top/{name}' cannot be the name of a file" in said
    assert not [line for line in said if "inside" in line]
    assert "good" in below(tmp_path / "out" / "top")
    assert "ee" not in "".join(below(tmp_path / "out"))
    assert below(tmp_path / "out") == ["top"] + [
        f"top/{p}" for p in below(tmp_path / "out" / "top")
    ]
    assert not (tmp_path / "escape").exists()
    assert not (tmp_path / "out" / "escape").exists()


LINKS = {
    "/etc/passwd": False,
    "..": True,
    "../..": False,
    "../sub": True,
    ".": True,
    "good": True,
    "./../sub/./good": True,
    "sub/../good": False,  # what `sub` leads to is not known
    "x/x/../../..": False,
    "": False,
    "a\0b": False,
}


@pytest.mark.parametrize(("target", "inside"), LINKS.items())
def test_which_links_stay_inside(target: str, inside: bool) -> None:
    assert stays_inside(target.encode(), 1) is inside


@both
def test_links_that_lead_out_are_not_made(
    tmp_path: Path, make: Callable[..., Path], backend: str
) -> None:
    links = {
        "absolute": "/etc/passwd",
        "above": "../outside",
        "here": ".",
        "chain": "here/here/../../..",
        "sub/up": "../good",
        "sub/out": "../../good",
        "long": "../" * 40 + "tmp",
    }
    for name, target in links.items():
        os.symlink(target, tmp_path / "tree" / name)
    (tmp_path / "tree" / "good").write_text("good")
    said = extracted(make(), backend)
    for name in ("absolute", "above", "chain", "sub/out", "long"):
        assert f"qcow2snap: left out: 'top/{name}' leads elsewhere" in said
    top = tmp_path / "out" / "top"
    assert below(top) == ["good", "here", "sub", "sub/up"]
    assert all(top in (p.resolve(), *p.resolve().parents) for p in top.rglob("*"))


@both
def test_devices_and_bits_are_not_made(
    tmp_path: Path, make: Callable[..., Path], backend: str
) -> None:
    tree = tmp_path / "tree"
    os.mkfifo(tree / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        here = os.getcwd()
        os.chdir(tree)  # its name would be too long
        unix.bind("socket")
        os.chdir(here)
    (tree / "program").write_text("x")
    (tree / "program").chmod(0o6755)
    (tree / "sub").chmod(0o1000)
    said = extracted(make("mknod zero c 1 5", "mknod disk b 8 0"), backend)
    for name in ("fifo", "socket", "zero", "disk"):
        assert f"qcow2snap: left out: 'top/{name}' is no file, directory or link" in said
    top = tmp_path / "out" / "top"
    assert below(top) == ["program", "sub"]
    assert stat.S_IMODE((top / "program").stat().st_mode) == 0o755
    assert (top / "program").stat().st_uid == os.geteuid()
    assert stat.S_IMODE((top / "sub").stat().st_mode) == 0o700  # or nobody could remove it


@both
def test_a_directory_in_itself(tmp_path: Path, make: Callable[..., Path], backend: str) -> None:
    (tmp_path / "tree" / "sub" / "deep").mkdir()
    image = make("ln /sub /sub/deep/again")
    needs("ext4", backend)
    for line in (["ls", "-R"], ["extract"]):
        more = [tmp_path / "out"] if line == ["extract"] else []
        said = fails(*line, "--backend", backend, image, "one", "/", *more)
        assert "'sub/deep/again' is in two places" in said
    assert below(tmp_path / "out") == []


@both
def test_a_sparse_file_of_a_terabyte(
    tmp_path: Path, make: Callable[..., Path], backend: str
) -> None:
    with open(tmp_path / "tree" / "lastlog", "wb") as f:
        f.seek(1 << 40)
        f.write(b"end")
    extracted(make(), backend)
    found = tmp_path / "out" / "top" / "lastlog"
    assert found.stat().st_size == (1 << 40) + 3
    assert found.stat().st_blocks * 512 < MiB
    with open(found, "rb") as f:
        f.seek(1 << 40)
        assert f.read() == b"end"


def test_extents_that_lead_to_the_same_ones_again(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    """A tree of three levels with 84 times the same one below each: 2 million runs."""
    needs("ext4", "dissect")
    (tmp_path / "tree" / "file").write_bytes(bytes(range(256)) * 1000)

    def header(count: int, depth: int) -> bytes:
        return struct.pack("<HHHHI", 0xF30A, count, 84, depth, 0)

    def index(count: int, child: int) -> bytes:
        return struct.pack("<IIHH", 0, child, 0, 0) * count

    raw = make().with_suffix(".raw")
    data = bytearray(raw.read_bytes())
    leaf = 40_000  # blocks of 1 KiB behind all that is used
    assert not any(data[leaf * KiB :][: 4 * KiB])
    root = data.index(struct.pack("<HHHHIIH", 0xF30A, 1, 4, 0, 0, 0, 250))
    data[root : root + 60] = header(4, 3) + index(4, leaf + 2)
    extents = b"".join(struct.pack("<IHHI", n, 1, 0, leaf) for n in range(84))
    for block, content in enumerate(
        [
            header(84, 0) + extents,
            header(84, 1) + index(84, leaf),
            header(84, 2) + index(84, leaf + 1),
        ]
    ):
        at = (leaf + block) * KiB
        data[at : at + len(content)] = content
    raw.write_bytes(data)
    tracemalloc.start()
    try:
        with qcow2snap_core.open(snapshot_of(raw)) as image:
            fs = open_filesystem(image._image.snapshot("one"), "one", None, How("dissect"))
            with pytest.raises(ImageError, match="overlap"):
                fs.ranges(find(fs, b"/file"))
        assert tracemalloc.get_traced_memory()[1] < 20 * MiB
    finally:
        tracemalloc.stop()


def test_a_file_of_many_blocks_without_extents(tmp_path: Path, make: Callable[..., Path]) -> None:
    """dissect makes a list of all of them."""
    (tmp_path / "tree" / "file").write_text("x")
    needs("ext4", "dissect")
    image = make("set_inode_field /file flags 0", "set_inode_field /file size 0x400000400")
    line = fails("cat", "--backend", "dissect", image, "one", "/file")
    assert "no extents and too many blocks" in line


def test_limits_hold_before_anything_is_written(tmp_path: Path, make: Callable[..., Path]) -> None:
    for i in range(5):
        (tmp_path / "tree" / f"file{i}").write_bytes(bytes([7]) * 100_000)
    image = make()
    [said] = extracted(image, "tsk", "--max-files", 3, status=1)
    assert "more than 3 entries: allow more by --max-files" in said
    [said] = extracted(image, "tsk", "--max-bytes", "64k", status=1)
    assert said.endswith("488 KiB to write: allow more by --max-bytes")
    assert below(tmp_path / "out") == []
    extracted(image, "tsk", "--max-bytes", "1M")
    assert len(below(tmp_path / "out" / "top")) == 6


def test_more_than_is_free_is_refused(tmp_path: Path, make: Callable[..., Path]) -> None:
    (tmp_path / "tree" / "big").write_bytes(bytes([7]) * 4 * MiB)
    image, out = make(), tmp_path / "small"
    out.mkdir()
    if os.geteuid():
        pytest.skip("only root can mount")
    qemu.run("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", out)
    try:
        assert "it needs 4" in fails("extract", image, "one", "big", out)
        assert list(out.iterdir()) == []
    finally:
        qemu.run("umount", out)


def test_what_is_there_is_replaced_only_with_force(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    (tmp_path / "tree" / "a").write_text("new")
    (tmp_path / "tree" / "z").write_text("new")
    image, out = make(), tmp_path / "out"
    (out / "top").mkdir()
    (out / "top" / "z").write_text("old")
    [said] = extracted(image, "tsk", status=1)
    assert said == "qcow2snap: 'top/z' is there: replace files with --force"
    assert below(out) == ["top", "top/z"]
    assert extracted(image, "tsk", "--force") == []
    assert (out / "top" / "z").read_text() == (out / "top" / "a").read_text() == "new"


def test_what_is_replaced_is_lost_only_when_all_of_the_new_is_on_the_disk(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree" / "a").write_text("new")
    image = make()
    done: list[tuple[str, int]] = []
    synced, renamed = os.fsync, os.rename

    def fsync(fd: int) -> None:
        done.append(("fsync", os.fstat(fd).st_ino))
        synced(fd)

    def rename(old: bytes, new: bytes, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        done.append(("rename", os.stat(old, dir_fd=src_dir_fd).st_ino))
        renamed(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    (tmp_path / "out" / "a").write_text("old")
    words = ["--backend", "tsk", "--force", str(image), "one", "/a", str(tmp_path / "out")]
    assert cli.main(["extract", *words]) == 0
    inode = (tmp_path / "out" / "a").stat().st_ino
    assert done == [("fsync", inode), ("rename", inode)]


def test_a_link_in_the_target_is_not_followed(tmp_path: Path, make: Callable[..., Path]) -> None:
    (tmp_path / "tree" / "sub" / "file").write_text("new")
    image, out = make(), tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    (out / "top").mkdir()
    os.symlink(tmp_path / "elsewhere", out / "top" / "sub")
    for more in ([], ["--force"]):
        [said] = extracted(image, "tsk", *more, status=1)
        assert "'top/sub'" in said
    assert below(tmp_path / "elsewhere") == []
    # A file's own name is replaced, not what it leads to.
    (out / "top" / "sub").unlink()
    (out / "top" / "sub").mkdir()
    (tmp_path / "elsewhere" / "victim").write_text("old")
    os.symlink(tmp_path / "elsewhere" / "victim", out / "top" / "sub" / "file")
    extracted(image, "tsk", "--force")
    assert (tmp_path / "elsewhere" / "victim").read_text() == "old"
    assert (out / "top" / "sub" / "file").read_text() == "new"


@both
def test_damage_is_one_line(make: Callable[..., Path], backend: str) -> None:
    image = make("set_inode_field /sub block[0] 0xfffffff", "set_inode_field /sub flags 0")
    needs("ext4", backend)
    assert "'sub'" in fails("ls", "--backend", backend, image, "one", "/sub")


FEATURES = {
    "bigalloc": (["-O", "bigalloc"], "features that are not known here: bigalloc"),
    "encrypt": (["-O", "encrypt"], "encrypted by the guest"),
}


@pytest.mark.parametrize(("options", "expected"), FEATURES.values(), ids=FEATURES.keys())
def test_what_would_not_be_read_right_is_refused(
    tmp_path: Path, options: list[object], expected: str
) -> None:
    (tmp_path / "tree").mkdir()
    raw = make_filesystem("ext4", tmp_path / "tree", tmp_path / "disk.raw", *options)
    assert expected in fails("ls", snapshot_of(raw), "one")


def test_inline_data_is_read_by_the_one_that_can(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "small").write_bytes(b"y" * 120)
    options = ["-O", "inline_data", "-I", 256]
    raw = make_filesystem("ext4", tmp_path / "tree", tmp_path / "disk.raw", *options)
    image = snapshot_of(raw)
    needs("ext4", "tsk")
    assert qcow2snap("cat", image, "one", "small") == "y" * 120
    assert "use --backend tsk" in fails("cat", "--backend", "dissect", image, "one", "small")


def test_ntfs_files_whose_content_is_elsewhere(tmp_path: Path) -> None:
    needs("ntfs", "tsk")
    (tmp_path / "tree").mkdir()
    (tmp_path / "out").mkdir()
    raw = make_filesystem("ntfs", tmp_path / "tree", tmp_path / "disk.raw")
    # What Windows makes of its own files with "compact /exe": the content is another stream.
    wof = (0x80000017).to_bytes(4, "little") + (16).to_bytes(2, "little") + bytes(2) + bytes(16)
    with filesystems.mounted("ntfs-3g", raw) as top:
        (top / "kernel.exe").write_bytes(b"\1" * 5000)
        os.setxattr(top / "kernel.exe", "system.ntfs_reparse_data", wof)
        (top / "plain").write_text("plain")
    image = snapshot_of(raw)
    assert "reparse tag 0x80000017" in fails("cat", image, "one", "kernel.exe")
    said = extracted(image, "tsk", status=1)
    assert said[-1] == "qcow2snap: 1 file could not be read, as said above"
    assert below(tmp_path / "out" / "top") == ["plain"]
    assert qcow2snap("cat", image, "one", "PLAIN") == "plain"


@both
def test_a_snapshot_that_is_deleted_meanwhile(
    tmp_path: Path, make: Callable[..., Path], backend: str
) -> None:
    needs("ext4", backend)
    (tmp_path / "tree" / "big").write_bytes(os.urandom(8 * MiB))
    path = make()
    with qcow2snap_core.open(str(path)) as image:
        fs = open_filesystem(image.snapshot("one"), "one", None, How(backend))
        chunks = fs.chunks(find(fs, b"/big"))
        next(chunks)
        qemu.delete(path, "one")
        with pytest.raises(SnapshotGone):
            list(chunks)
        with pytest.raises(SnapshotGone):  # and no answer out of a library's cache either
            list(fs.children(fs.root()))
