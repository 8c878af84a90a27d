"""Chains of backing files: deep and mixed ones, every way to write a layer's name, and chains
that lead nowhere or round in a circle."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support import damage, qemu
from support.qemu import KiB, MiB
from support.server import refused, serve

SIZE = 2 * MiB


def layer(path: Path, number: int, backing: tuple[str, str] | None, size: int) -> None:
    """A layer with data, zeros and holes of its own, and every second one with a snapshot."""
    rng = random.Random(number)
    options = {"cluster_size": 512 << number % 8, "compat": ("1.1", "0.10")[number % 2]}
    qemu.create(path, size, backing=backing, **options)
    places = [rng.randrange(size // 512) * 512 for _ in range(6)]
    commands = [f"write -P {1 + (number * 11 + n) % 250} {at} 512" for n, at in enumerate(places)]
    commands += [f"write -z {places[0]} {min(2048, size - places[0])}"]
    qemu.io(path, *commands)


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("bottom", ["raw", "qcow2"])
def test_a_chain_of_some_layers(tmp_path: Path, depth: int, bottom: str) -> None:
    """Longer and shorter ones in turn, of every cluster size; names absolute and relative."""
    below: tuple[str, str] | None = None
    for number in range(depth - 1):
        path = tmp_path / f"layer {number}"
        size = SIZE + (-1) ** number * (number + 1) * 32 * KiB
        if number == 0 and bottom == "raw":
            path.write_bytes(random.Random(1).randbytes(SIZE // 2 + 77))
            below = (path.name, "raw")
            continue
        layer(path, number, below, size)
        below = (str(path) if number % 3 else path.name, "qcow2")
    top = tmp_path / "top.qcow2"
    layer(top, depth, below, SIZE)
    qemu.take(top, "s")
    qemu.io(top, f"write -P 255 0 {SIZE}")
    copy = qemu.as_active(top, "s")
    with serve(file=top) as server:
        assert server.copy("s") == qemu.content(top, "s")
        assert server.extents("s") == qemu.extents(copy)


def test_a_layer_that_is_used_twice_is_no_loop_and_is_opened_once(tmp_path: Path) -> None:
    layer(tmp_path / "base", 1, None, SIZE)
    layer(tmp_path / "top", 2, ("base", "qcow2"), SIZE)
    for name in "abc":
        qemu.take(tmp_path / "top", name)
    with serve(file=tmp_path / "top") as server:
        for name in "abc":
            with server.connect(name) as client:
                client.pread(512, 0)
        opened = [os.readlink(f) for f in Path(f"/proc/{server.pid}/fd").iterdir()]
    assert opened.count(str(tmp_path / "base")) == 1


NAMES = [
    "base",
    "{dir}/base",
    "./base",
    "file:base",
    "file:{dir}/base",
    "file:./base",
    "sub/../base",
    "a base with spaces",
    "./a:b",
    "{dir}/a:b",
    "./10:30 backup.qcow2",
    "file:a:b",
    "b\u00e4se",
    "link",
    "sub/link",
    "-base",
    "base%20",
    "n" * 200,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_name_leads_where_it_leads_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fmt: str
) -> None:
    """QEMU takes `file:` with a relative path from where it runs, we from where the image is."""
    monkeypatch.chdir(tmp_path)
    name = name.format(dir=tmp_path)
    (tmp_path / "sub").mkdir()
    plain = tmp_path / name.removeprefix("file:")
    real = tmp_path / "base" if plain.name == "link" else plain
    qemu.run("qemu-img", "create", "-q", "-f", fmt, real, SIZE)
    qemu.run("qemu-io", "-f", fmt, "-c", "write -P 5 0 1M", real)
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "sub" / "link").symlink_to("../base")
    top = qemu.create(tmp_path / "top.qcow2", SIZE, backing=(name, fmt))
    qemu.io(top, "write -P 6 4k 4k")
    qemu.take(top, "s")
    expected = qemu.content(top, "s")
    assert expected[0] == 5
    monkeypatch.chdir("/")
    with serve(file=top) as server:
        assert server.read("s") == expected


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_format_that_is_not_recorded_is_that_of_the_key(tmp_path: Path, fmt: str) -> None:
    """Down the whole chain; the content is never looked at."""
    base = tmp_path / "base"
    layer(base, 1, None, SIZE)
    top = qemu.create(tmp_path / "top.qcow2", SIZE, backing=("base", "qcow2"))
    qemu.take(top, "s")
    damage.drop_backing_format(top)
    with serve(file=top, backing_format=fmt) as server:
        expected = base.read_bytes() if fmt == "raw" else qemu.content(base)
        assert server.read("s") == expected.ljust(SIZE, b"\0")[:SIZE]


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_chain_that_loops_is_told_by_the_file_that_comes_again(
    tmp_path: Path, length: int
) -> None:
    for n in range(length):
        qemu.create(tmp_path / f"{n}.qcow2", SIZE)
    for n in range(length):
        back = ["-u", "-b", f"{(n + 1) % length}.qcow2", "-F", "qcow2"]
        qemu.run("qemu-img", "rebase", *back, tmp_path / f"{n}.qcow2")
    line = refused(file=tmp_path / "0.qcow2")
    assert "loops" in line
    assert f"{tmp_path / '0.qcow2'}' comes up twice" in line


def test_a_loop_through_a_link_and_below_the_first_layer(tmp_path: Path) -> None:
    for name, below in (("top", "middle"), ("middle", "link"), ("bottom", "middle")):
        qemu.create(tmp_path / name, SIZE)
        qemu.run("qemu-img", "rebase", "-u", "-b", below, "-F", "qcow2", tmp_path / name)
    (tmp_path / "link").symlink_to("bottom")
    line = refused(file=tmp_path / "top")
    assert "loops" in line
    assert "middle' comes up twice" in line
