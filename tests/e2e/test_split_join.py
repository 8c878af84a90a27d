"""``qcow2snap split`` and ``join``: the same content in every snapshot and layer, says QEMU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import command, damage, qemu
from support.qemu import KiB, MiB

SIZE = 4 * MiB
FORMATS: dict[str, dict[str, object]] = {
    "plain": {},
    "extended L2": {"extended_l2": "on"},
    "small clusters": {"cluster_size": 4096},
    "version 2": {"compat": "0.10"},
}


def assert_clean(path: Path) -> None:
    qemu.run("qemu-img", "check", "-q", path)


def size_on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def with_backing(directory: Path, fmt: str) -> Path:
    """A random image over a random backing file, with three snapshots."""
    base = directory / "base.img"
    qemu.RandomImage(base, seed=1, size=SIZE - 64 * KiB, fmt=fmt).make([])
    path = directory / "disk.qcow2"
    qemu.RandomImage(path, seed=2, size=SIZE, backing=(base.name, fmt)).make()
    return path


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_there_and_back_every_snapshot_has_its_content(
    tmp_path: Path, options: dict[str, object]
) -> None:
    path, chain, out = tmp_path / "disk.qcow2", tmp_path / "chain", tmp_path / "out.qcow2"
    compressed = options.get("extended_l2") is None
    image = qemu.RandomImage(path, 5, SIZE, options=options, compressed=compressed)
    names = image.make()
    command.qcow2snap("split", path, chain)
    assert sorted(os.listdir(chain)) == sorted([f"{n}.qcow2" for n in names] + ["active.qcow2"])
    command.qcow2snap("join", chain / "active.qcow2", out)
    assert "backing-filename" not in qemu.info(out)
    assert list(qemu.snapshots(out)) == [*names, "active"]
    for name in [*names, None]:
        layer = chain / f"{name or 'active'}.qcow2"
        expected = qemu.content(path, name)
        assert qemu.content(layer) == expected
        assert qemu.content(out, name) == expected
        assert_clean(layer)
    assert_clean(out)


def test_the_chain_can_be_moved_and_records_its_formats(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    qemu.take(path, "one")
    command.qcow2snap("split", path, tmp_path / "chain")
    said = qemu.info(tmp_path / "chain" / "active.qcow2")
    assert said["backing-filename"] == "one.qcow2"
    assert said["backing-filename-format"] == "qcow2"
    (tmp_path / "chain").rename(tmp_path / "moved")
    assert qemu.content(tmp_path / "moved" / "active.qcow2") == bytes(SIZE)


def test_an_overlay_holds_only_what_changed(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", 64 * MiB), tmp_path / "chain"
    qemu.io(path, "write -P 1 0 16M")
    qemu.take(path, "one")
    qemu.io(path, "write -P 2 1M 64k", "write -z -u 2M 8M")
    command.qcow2snap("split", path, chain)
    assert size_on_disk(chain / "one.qcow2") > 16 * MiB
    assert size_on_disk(chain / "active.qcow2") < MiB, "zeros take no space"


def test_snapshots_of_other_sizes(tmp_path: Path) -> None:
    path, chain, out = tmp_path / "disk.qcow2", tmp_path / "chain", tmp_path / "out.qcow2"
    qemu.create(path, SIZE)
    sizes = {"odd": SIZE + 512, "short": MiB + 512, "long": 2 * SIZE}
    for byte, (name, size) in enumerate(sizes.items(), 1):
        qemu.run("qemu-img", "resize", "-q", "--shrink", path, size)
        qemu.io(path, f"write -P {byte} 0 {size // 2}", f"write -P {byte} {size - 512} 512")
        qemu.take(path, name)
    command.qcow2snap("split", path, chain)
    command.qcow2snap("join", chain / "active.qcow2", out)
    for name in sizes:
        expected = qemu.snapshot_content(path, name)
        assert qemu.content(chain / f"{name}.qcow2") == expected
        assert qemu.snapshot_content(out, name) == expected
    assert_clean(out)


def test_a_layer_that_grows_again_reads_zeros_there(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.io(base, f"write -P 1 0 {SIZE}")
    qemu.create(tmp_path / "mid.qcow2", MiB + 512, backing=("base.qcow2", "qcow2"))
    top = qemu.create(tmp_path / "top.qcow2", SIZE, backing=("mid.qcow2", "qcow2"))
    command.qcow2snap("join", top, tmp_path / "out.qcow2")
    expected = qemu.content(top)
    assert expected[MiB + 512 :] == bytes(SIZE - MiB - 512)
    assert qemu.content(tmp_path / "out.qcow2") == expected


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_backing_file_stays_that_of_the_base(tmp_path: Path, fmt: str) -> None:
    path, chain, out = with_backing(tmp_path, fmt), tmp_path / "chain", tmp_path / "out.qcow2"
    command.qcow2snap("split", path, chain)
    said = qemu.info(chain / "one.qcow2")
    assert said["backing-filename"] == "../base.img"
    assert said["backing-filename-format"] == fmt
    command.qcow2snap("join", chain / "active.qcow2", out, "--allow-dir", tmp_path)
    assert list(qemu.snapshots(out)) == ["base", "one", "two", "three", "active"]
    for name in ["one", "two", "three", None]:
        assert qemu.content(chain / f"{name or 'active'}.qcow2") == qemu.content(path, name)
        assert qemu.content(out, name) == qemu.content(path, name)
    base = qemu.run("qemu-img", "convert", "-f", fmt, "-O", "raw", "base.img", "b", cwd=tmp_path)
    assert base == ""
    assert qemu.snapshot_content(out, "base") == (tmp_path / "b").read_bytes()


NAMES = {
    "a slash": (b"a/b", "a%2Fb"),
    "a percent sign": (b"50%", "50%25"),
    "a colon": (b"nbd:x", "nbd:x"),
    "spaces and quotes": (b" it's,a=b", " it's,a=b"),
    "words of any language": ("nächtlich 夜 ночь".encode(), "nächtlich 夜 ночь"),
    "a line feed": (b"a\nb", "a%0Ab"),
    "an escape sequence": (b"\x1b[31mred\x7f", "%1B[31mred%7F"),
    "a C1 control": ("\x9b31m".encode(), "%C2%9B31m"),
    "right to left": ("a\u202eb".encode(), "a%E2%80%AEb"),
    "not UTF-8": (b"a\xff\xfe", "a%FF%FE"),
    "empty": (b"", "1"),
    "dots": (b"..", "%2E%2E"),
    "a hidden one": (b".a.b", "%2Ea.b"),
    "an option": (b"-rf", "%2Drf"),
    "the active one's": (b"active", "1"),
    "another's ID": (b"2", "1"),
    "repeated": (b"second", "1"),
    "too long": (b"n" * 250, "1"),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.values(), ids=NAMES.keys())
def test_overlays_are_named_after_their_snapshots(
    tmp_path: Path, name: bytes, expected: str
) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    qemu.io(path, "write -P 5 0 64k")
    qemu.take(path, "first")
    qemu.take(path, "second")
    damage.rename(path, {"first": name})
    command.qcow2snap("split", path, chain)
    second = "2" if name == b"second" else "second"
    found = {f"{expected}.qcow2", f"{second}.qcow2", "active.qcow2"}
    assert set(os.listdir(chain)) == found
    assert qemu.content(chain / "active.qcow2") == qemu.content(path)


def test_a_chain_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    qemu.take(path, "one")
    command.qcow2snap("split", path, chain)
    chain.chmod(0o750)
    qemu.delete(path, "one")
    qemu.io(path, "write -P 6 0 64k")
    assert "is not empty" in command.fails("split", path, chain)
    assert sorted(os.listdir(chain)) == ["active.qcow2", "one.qcow2"]
    command.qcow2snap("split", "--force", path, chain)
    assert os.listdir(chain) == ["active.qcow2"]
    assert qemu.content(chain / "active.qcow2") == qemu.content(path)
    assert chain.stat().st_mode & 0o777 == 0o750
    assert sorted(os.listdir(tmp_path)) == ["chain", "disk.qcow2"]


@pytest.mark.parametrize("other", ["notes.txt", "directory.qcow2", "link.qcow2", "the image"])
def test_what_is_no_overlay_is_not_replaced_with_a_chain(tmp_path: Path, other: str) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    chain.mkdir()
    if other == "the image":
        path = path.rename(chain / "disk.qcow2")
    elif other == "directory.qcow2":
        (chain / other).mkdir()
    elif other == "link.qcow2":
        (chain / other).symlink_to(path)
    else:
        (chain / other).write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    said = command.fails("split", "--force", path, chain)
    assert "is being copied and lies in" in said or f"'{other}' in it is no overlay" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_is_replaced_by_a_join_only_when_that_is_asked_for(tmp_path: Path) -> None:
    top, out = qemu.create(tmp_path / "top.qcow2", SIZE), tmp_path / "out.qcow2"
    out.write_bytes(b"kept")
    assert "is there already: add --force" in command.fails("join", top, out)
    assert out.read_bytes() == b"kept"
    command.qcow2snap("join", "--force", top, out)
    assert list(qemu.snapshots(out)) == ["top"]


def test_an_empty_directory_is_filled_and_keeps_its_mode(tmp_path: Path) -> None:
    path, chain = qemu.create(tmp_path / "disk.qcow2", SIZE), tmp_path / "chain"
    chain.mkdir(mode=0o750)
    command.qcow2snap("split", path, chain)
    assert os.listdir(chain) == ["active.qcow2"]
    assert chain.stat().st_mode & 0o777 == 0o750


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    assert "is not empty" in command.fails("split", path, tmp_path)
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_without_room_nothing_is_begun(tmp_path: Path) -> None:
    filesystem = os.statvfs(tmp_path)
    size = filesystem.f_blocks * filesystem.f_frsize
    # Clusters that are all allocated, in a data file that is one hole.
    options = {"data_file_raw": "on", "cluster_size": "2M", "preallocation": "metadata"}
    path = qemu.create(tmp_path / "disk.qcow2", size, data_file=tmp_path / "data", **options)
    for name, line in {"chain": ("split", path), "out": ("join", path)}.items():
        assert "free" in command.fails(*line, tmp_path / name)
    assert "free" in command.fails("copy", path, "@active", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["data", "disk.qcow2"]


def test_a_layer_below_whose_data_file_has_a_relative_name(tmp_path: Path) -> None:
    """QEMU looks for it where it runs; the command runs elsewhere."""
    run = {"cwd": tmp_path}
    options = "data_file=base.data,data_file_raw=off"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "base", 4 * MiB, **run)
    qemu.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", "base", **run)
    below = ["-b", "base", "-F", "qcow2"]
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", *below, "disk", **run)
    qemu.run("qemu-img", "snapshot", "-c", "one", "disk", **run)
    qemu.run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", "disk", **run)
    command.qcow2snap("split", tmp_path / "disk", tmp_path / "chain")
    top = tmp_path / "chain" / "active.qcow2"
    qemu.run("qemu-img", "compare", "-q", "disk", top, **run)


def test_out_must_not_be_a_layer(tmp_path: Path) -> None:
    qemu.create(tmp_path / "base.qcow2", SIZE)
    top = qemu.create(tmp_path / "top.qcow2", SIZE, backing=("base.qcow2", "qcow2"))
    for name in (tmp_path / "base.qcow2", top):
        assert "being copied" in command.fails("join", "--force", top, name)
