"""What clients read is what QEMU reads: whole exports and random pieces of them, for seeded images
of every shape; and for snapshots that are older than a resize of their disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.qemu import KiB, MiB, RandomImage
from support.server import Server, serve

# Of the image itself; sizes are no multiples of anything on purpose.
V2: dict[str, Any] = {"compat": "0.10"}
PLAIN = 4 * MiB + 3 * 512

SHAPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "v2": {"options": V2},
    "v2-512": {"options": {**V2, "cluster_size": 512}},
    "v2-compressed": {"options": V2, "compressed": True},
    "512": {"options": {"cluster_size": 512}, "size": MiB + 512},
    "512-compressed": {"options": {"cluster_size": 512}, "size": MiB, "compressed": True},
    "1k": {"options": {"cluster_size": KiB}, "size": 2 * MiB + 512},
    "2k-compressed": {"options": {"cluster_size": 2 * KiB}, "compressed": True},
    "4k": {"options": {"cluster_size": 4 * KiB}},
    "16k-compressed": {"options": {"cluster_size": 16 * KiB}, "compressed": True},
    "64k-compressed": {"compressed": True},
    "256k": {"options": {"cluster_size": 256 * KiB}},
    "2M": {"options": {"cluster_size": 2 * MiB}, "size": 8 * MiB + 512},
    "2M-compressed": {
        "options": {"cluster_size": 2 * MiB},
        "size": 8 * MiB + 512,
        "compressed": True,
    },
    "refcount-1": {"options": {"refcount_bits": 1}, "names": ["one"], "empty": True},
    "refcount-2": {"options": {"refcount_bits": 2}, "names": ["one", "two"]},
    "refcount-4": {"options": {"refcount_bits": 4, "cluster_size": 4 * KiB}},
    "refcount-8": {"options": {"refcount_bits": 8}, "compressed": True},
    "refcount-32": {"options": {"refcount_bits": 32, "cluster_size": 512}},
    "refcount-64": {"options": {"refcount_bits": 64}},
    "sparse-sectors": {"grain": 4 * KiB, "operations": 40},
    "on-raw": {"below": [("raw", PLAIN)]},
    "on-shorter-raw": {"below": [("raw", 2 * MiB + 1234)], "compressed": True},
    "on-longer-raw": {"below": [("raw", 6 * MiB + 512)], "options": {"cluster_size": 4 * KiB}},
    "on-qcow2": {"below": [("qcow2", PLAIN)]},
    "on-shorter-qcow2": {"below": [("qcow2", 2 * MiB + 512)], "options": V2},
    "on-longer-qcow2": {"below": [("qcow2", 7 * MiB)], "compressed": True},
    "on-three": {"below": [("raw", 3 * MiB + 1), ("qcow2", 5 * MiB), ("qcow2", 2 * MiB)]},
    "on-short-middle": {"below": [("raw", 5 * MiB), ("qcow2", MiB + 512), ("qcow2", 4 * MiB)]},
}

SEEDS = (1, 2)
assert len(SHAPES) * len(SEEDS) >= 50


def make(directory: Path, seed: int, shape: dict[str, Any]) -> tuple[Path, list[str]]:
    """One image with the layers below it; returns it and its snapshots' names."""
    shape = {"size": PLAIN, **shape}
    names = shape.pop("names", None)
    empty, operations = shape.pop("empty", False), shape.pop("operations", 14)
    backing = None
    for number, (fmt, size) in enumerate(shape.pop("below", [])):
        layer = directory / f"layer{number}.{fmt}"
        small = {} if fmt == "raw" else {"options": {"cluster_size": 8 * KiB << number}}
        whole = size - size % 512
        image = RandomImage(layer, seed, whole, fmt=fmt, backing=backing, **small)
        image.make([], operations * 2)
        if size > whole:
            layer.write_bytes(layer.read_bytes() + b"end"[: size - whole].ljust(size - whole, b"!"))
        backing = (layer.name, fmt)
    image = RandomImage(directory / "disk.qcow2", seed, backing=backing, **shape)
    return image.path, image.make(names, 0 if empty else operations)


def check(server: Server, export: str, expected: bytes, seed: int) -> None:
    """All of an export by nbdcopy, and pieces of it at any offset by libnbd."""
    assert server.copy(export) == expected
    rng = random.Random(seed)
    with server.connect(export) as client:
        assert client.get_size() == len(expected)
        for _ in range(30):
            start = rng.randrange(len(expected))
            length = min(len(expected) - start, rng.choice((1, 511, 4096, 70_000, 300_001)))
            assert client.pread(length, start) == expected[start : start + length], (start, length)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_snapshot_reads_as_in_qemu(tmp_path: Path, shape: str, seed: int) -> None:
    path, names = make(tmp_path, seed, SHAPES[shape])
    with serve(file=path) as server:
        for name in names:
            check(server, name, qemu.content(path, name), seed)


@pytest.mark.parametrize("cluster_size", [4 * KiB, 64 * KiB])
@pytest.mark.parametrize(
    "sizes",
    [(2 * MiB, 9 * MiB), (9 * MiB, 2 * MiB), (MiB + 512, 5 * MiB, 3 * MiB)],
    ids=["grown", "shrunk", "both"],
)
def test_a_snapshot_keeps_the_size_that_it_was_taken_with(
    tmp_path: Path, sizes: tuple[int, ...], cluster_size: int
) -> None:
    image = RandomImage(tmp_path / "disk.qcow2", 7, options={"cluster_size": cluster_size})
    qemu.create(image.path, sizes[0], cluster_size=cluster_size)
    rng = random.Random(7)
    for size in sizes:
        qemu.run("qemu-img", "resize", "-q", "--shrink", image.path, size)
        for at in range(0, size, MiB):
            qemu.io(image.path, f"write -P {rng.randrange(1, 256)} {at} 512")
        qemu.io(image.path, f"write -P 77 {size - 512} 512")
        qemu.take(image.path, f"of {size}")
    with serve(file=image.path) as server:
        for size in sizes:
            expected = qemu.snapshot_content(image.path, f"of {size}")
            assert len(expected) == size
            check(server, f"of {size}", expected, 1)
