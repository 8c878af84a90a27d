"""A guest's filesystem by its paths: right bytes at any offset, and nothing that a hostile one says
leads the host's kernel anywhere."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from support import damage, filesystems, qemu
from support.filesystems import make_filesystem, make_tree, needs, snapshot_of
from support.qemu import MiB

from qcow2snap_core.errors import ImageError, SnapshotGone
from qcow2snap_core.files.tree import Node
from qcow2snap_core.files.volumes import How
from qcow2snap_core.fuse import volume as module
from qcow2snap_core.fuse.tree import Root
from qcow2snap_core.fuse.volume import Damaged, NotThere, Volume
from qcow2snap_core.image.opener import open_image

BACKENDS = ["tsk", "dissect"]
both = pytest.mark.parametrize("backend", BACKENDS)
KINDS = [("ext4", "tsk"), ("ext4", "dissect"), ("ntfs", "tsk"), ("fat", "tsk")]
KINDS += [("btrfs", "dissect"), ("xfs", "dissect")]


@pytest.fixture(autouse=True)
def with_dissect(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystems.use_dissect(monkeypatch)


@contextmanager
def opened(path: Path, backend: str) -> Iterator[Volume]:
    with open_image(str(path)) as image:
        yield Volume(image.snapshot("one"), "one", None, How(backend))


@pytest.mark.parametrize(("kind", "backend"), KINDS)
def test_a_file_is_read_at_any_offset(tmp_path: Path, kind: str, backend: str) -> None:
    needs(kind, backend)
    tree, noise = tmp_path / "tree", Random(3)
    tree.mkdir()
    make_tree(tree, kind)
    with opened(snapshot_of(make_filesystem(kind, tree, tmp_path / "disk.raw")), backend) as volume:
        for name in ("big", "text", "etc/hostname", "etc/file7", "sparse"):
            if not (tree / name).exists():
                continue
            expected = (tree / name).read_bytes()
            file = volume.open(tuple(name.encode().split(b"/")))
            places = [(0, len(expected) + 10), (len(expected), 10), (len(expected) - 5, 100)]
            for _ in range(40):
                start = noise.randrange(len(expected))
                places.append((start, noise.choice([1, 511, 4096, 131072, 500_000])))
            for start, length in places:
                assert file.pread(start, length) == expected[start : start + length], name


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """An image of what is in ``tree``, with bytes of the filesystem exchanged, after commands of
    debugfs."""
    (tmp_path / "tree" / "sub" / "deep").mkdir(parents=True)

    def made(*commands: str, patches: dict[bytes, bytes] | None = None) -> Path:
        features = ["-O", "^metadata_csum"]
        raw = make_filesystem("ext4", tmp_path / "tree", tmp_path / "disk.raw", *features)
        if commands:
            script = "\n".join(commands) + "\n"
            qemu.run("debugfs", "-w", "-f", "/dev/stdin", raw, input=script)
        data = raw.read_bytes()
        for old, new in (patches or {}).items():
            assert data.count(old) == 1, old
            data = data.replace(old, new)
        raw.write_bytes(data)
        return snapshot_of(raw)

    return made


@both
def test_names_that_no_file_can_have(
    tmp_path: Path, make: Callable[..., Path], backend: str
) -> None:
    needs("ext4", backend)
    names = {b"aa-escape": b"../escape", b"bb-nul": b"bb\0nul", b"cc-twice": b"dd-twice"}
    for name in (*names, b"dd-twice"):
        (tmp_path / "tree" / "sub" / os.fsdecode(name)).write_text("x")
    (tmp_path / "tree" / "sub" / "ee\nff").write_text("x")
    patches = {name: new for name, new in names.items() if name != b"cc-twice"}
    with opened(make(patches=patches | {b"cc-twice": b"dd-twice"}), backend) as volume:
        found = volume.listing((b"sub",))
        assert {b"..%2Fescape", b"ee\nff", b"dd-twice", b"deep"} <= set(found)
        assert not any(b"/" in name or b"\0" in name for name in found)
        assert isinstance(volume.node((b"sub", b"..%2Fescape")), Node)
        if backend == "tsk":  # dissect gives one of the two
            assert found[b"dd-twice"] == Damaged("the name is there twice")
            with pytest.raises(ImageError, match="the name is there twice"):
                volume.open((b"sub", b"dd-twice"))


@both
def test_no_tree_without_end(make: Callable[..., Path], backend: str) -> None:
    needs("ext4", backend)
    with opened(make("ln /sub /sub/deep/again"), backend) as volume:
        again = (b"sub", b"deep", b"again")
        assert volume.listing(again[:2])[b"again"] == Damaged("the directory is in two places")
        with pytest.raises(ImageError, match="in two places"):
            volume.listing(again)
        assert set(volume.listing((b"sub",))) == {b"deep"}


@both
def test_a_size_that_no_file_has(tmp_path: Path, make: Callable[..., Path], backend: str) -> None:
    needs("ext4", backend)
    (tmp_path / "tree" / "sub" / "file").write_text("x")
    image = make("set_inode_field /sub/file size 0xffffffffffffff00")
    with opened(image, backend) as volume:
        found = volume.listing((b"sub",))[b"file"]
        assert isinstance(found, Damaged)
        assert "no file has" in found.why


ROOTS = {
    "mode 0": "unknown kind",
    "mode 0100644": "no directory",
    "mode 0120777": "no directory",
    "size 0xffffffffffffff00": "no file has",
}


@both
@pytest.mark.parametrize("field", ROOTS)
def test_a_root_that_is_none(make: Callable[..., Path], backend: str, field: str) -> None:
    """In place of the filesystem there is a note that says so."""
    needs("ext4", backend)
    if backend == "tsk" and field.startswith("size"):
        pytest.skip("libtsk takes only the lower half of a directory's size")
    with open_image(str(make(f"set_inode_field <2> {field}"))) as image:
        snapshot = Root(image, How(backend)).child(b"one")
        assert b"files" not in snapshot.children().names
        note = snapshot.child(b"files.error").open()
        assert ROOTS[field].encode() in note.pread(0, 1000)


LINKS = {  # in the directory sub, where `up` leads to / and `there` to deep
    "/etc/passwd": "../etc/passwd",
    "/": "../",
    "../../../../tmp/x": "../tmp/x",
    "up/../../../etc": "../etc",
    "there/../../../..": "../",
    "there/x": "there/x",
    "/sub/there/x/../y": "../sub/deep/x/y",
    "/up/./up/file": "../up/up/file",
    "/sub/up/sub/there": "../sub/there",
    "/sub/file/..": "../sub/file/.",
    "/none/..": "../none/.",
    "/sub/file/x": "../sub/file/x",
    "/sub/loop/x/..": None,
}


@both
def test_where_links_lead(tmp_path: Path, make: Callable[..., Path], backend: str) -> None:
    needs("ext4", backend)
    sub = tmp_path / "tree" / "sub"
    (sub / "file").write_text("x")
    for name, target in (("up", "/"), ("there", "deep"), ("loop", "/sub/loop")):
        os.symlink(target, sub / name)
    for number, target in enumerate(LINKS):
        os.symlink(target, sub / f"link{number}")
    with opened(make(), backend) as volume:
        for number, (target, expected) in enumerate(LINKS.items()):
            path = (b"sub", f"link{number}".encode())
            if expected is None:
                with pytest.raises(ImageError, match="too many symbolic links"):
                    volume.target(path)
            else:
                assert volume.target(path) == expected.encode(), target


@both
def test_a_failure_is_not_for_ever(tmp_path: Path, make: Callable[..., Path], backend: str) -> None:
    needs("ext4", backend)
    content = Random(5).randbytes(3 * MiB)
    for name in ("bad", "good"):
        (tmp_path / "tree" / name).write_bytes(content)
    path = make()
    place = qemu.content(path, "one").index(content[2 * MiB : 2 * MiB + 4096])
    damage.put64(path, damage.l2_entry(path, "one", place), 1 << 50)
    with opened(path, backend) as volume:
        files = {name: volume.open((name.encode(),)) for name in ("bad", "good")}
        failed = []
        for _ in range(2):
            for name, file in files.items():
                try:
                    assert file.pread(0, 4 * MiB) == content
                except ImageError as e:
                    failed.append((name, "past the end of the file" in str(e)))
            assert set(volume.listing((b"sub",))) == {b"deep"}
        assert failed in ([("bad", True)] * 2, [("good", True)] * 2)


@both
def test_of_a_deleted_snapshot_nothing_is_said(make: Callable[..., Path], backend: str) -> None:
    needs("ext4", backend)
    path = make()
    with opened(path, backend) as volume:
        assert b"sub" in volume.listing(())
        qemu.delete(path, "one")
        for ask in (
            lambda: volume.listing(()),
            lambda: volume.node((b"none",)),
            lambda: volume.target((b"sub",)),
            lambda: volume.node(()),
            volume.confirm,
        ):
            with pytest.raises(SnapshotGone):
                ask()


@both
def test_a_failure_does_not_make_room_for_trees_without_end(
    tmp_path: Path, make: Callable[..., Path], backend: str
) -> None:
    """A directory that two others have is in the first one, and in no other after a bad file was
    read.  What the filesystem has in memory can be given back all the same."""
    needs("ext4", backend)
    content = Random(5).randbytes(3 * MiB)
    (tmp_path / "tree" / "bad").write_bytes(content)
    (tmp_path / "tree" / "other").mkdir()
    path = make("ln /sub/deep /other/deep")
    place = qemu.content(path, "one").index(content[2 * MiB : 2 * MiB + 4096])
    damage.put64(path, damage.l2_entry(path, "one", place), 1 << 50)
    twice = Damaged("the directory is in two places")
    with opened(path, backend) as volume:
        assert isinstance(volume.node((b"sub", b"deep")), Node)
        assert volume.node((b"other", b"deep")) == twice
        with pytest.raises(ImageError):
            volume.open((b"bad",)).pread(0, 4 * MiB)
        assert volume.node((b"other", b"deep")) == twice
        volume.close()
        assert isinstance(volume.node((b"other", b"deep")), Node)
        assert volume.node((b"sub", b"deep")) == twice


def test_a_directory_has_so_many_entries_and_no_more(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("ext4", "tsk")
    for number in range(9):
        (tmp_path / "tree" / "sub" / str(number)).touch()
    with opened(make(), "tsk") as volume:
        monkeypatch.setattr(module, "_MOST_ENTRIES", 10)
        assert len(volume.listing((b"sub",))) == 10
        volume.close()
        monkeypatch.setattr(module, "_MOST_ENTRIES", 9)
        with pytest.raises(ImageError, match="more than 9 entries: qcow2snap ls lists it"):
            volume.listing((b"sub",))


def test_a_directory_that_is_opened_again_needs_little_memory(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    needs("ext4", "tsk")
    count, times = 1000, 20
    for number in range(count):
        (tmp_path / "tree" / "sub" / f"file{number}").touch()
    with open_image(str(make())) as image:
        sub = Root(image, How("tsk")).child(b"one").child(b"files").child(b"sub")
        first = sub.children()
        tracemalloc.start()
        again = [sub.children() for _ in range(times)]
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert all(each.names == first.names for each in again)
        assert len(first.names) == count + 1
        assert used < times * count * 20, "a name's place in a list"


def test_directories_that_were_met_need_no_more_memory_where_they_are_deep(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    needs("ext4", "tsk")
    used = []
    for depth in (1, 300):
        where = (b"sub", *[b"d"] * depth)
        bottom = tmp_path / "tree" / os.fsdecode(b"/".join(where))
        bottom.mkdir(parents=True, exist_ok=True)
        for number in range(1000):
            (bottom / f"n{number}").mkdir()
        with opened(make(), "tsk") as volume:
            volume.listing(where[:-1])
            tracemalloc.start()
            volume.listing(where)
            volume._drop()  # which keeps in mind what was met
            used.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
        shutil.rmtree(bottom)
    assert used[1] < 1.5 * used[0]


def test_only_so_many_entries_are_kept(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("ext4", "tsk")
    for folder in range(6):
        (tmp_path / "tree" / f"d{folder}").mkdir()
        for number in range(10):
            (tmp_path / "tree" / f"d{folder}" / str(number)).touch()
    monkeypatch.setattr(module, "_KEPT", 25)
    with opened(make(), "tsk") as volume:
        for _ in range(2):
            for folder in range(6):
                path = (f"d{folder}".encode(),)
                assert len(volume.listing(path)) == 10
                assert isinstance(volume.node((*path, b"7")), Node)
                assert volume._kept == sum(map(len, volume._listings.values())) <= 30
        with pytest.raises(NotThere):
            volume.node((b"d9", b"7"))
