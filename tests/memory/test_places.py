"""Where the memory of a machine lies: by QEMU's own account of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.vm import machine

from qcow2snap_core.errors import ImageError, UsageError
from qcow2snap_core.memory.blocks import Block
from qcow2snap_core.memory.places import Wish, layout

GiB = 1 << 30


@pytest.mark.parametrize("size", [16 * MiB, 3 * GiB - MiB, 5 * GiB])
@pytest.mark.parametrize("kind", ["pc", "q35"])
def test_memory_lies_where_qemu_has_it(tmp_path: Path, kind: str, size: int) -> None:
    """It takes no memory: nothing is written to it."""
    image = qemu.create(tmp_path / "disk.qcow2", MiB)
    with machine(image, kind=kind, memory=size) as vm:
        said = vm.hmp("info mtree")
        name = vm.qmp("qom-get", path="/machine", property="type").removesuffix("-machine")
    ranges = re.findall(r"ram-(?:below|above)-4g @pc.ram ([0-9a-f]+)-([0-9a-f]+)", said)
    where = re.findall(r"([0-9a-f]{16})-[0-9a-f]{16} .*: alias ram-(?:below|above)-4g", said)
    expected = sorted(
        {
            (int(at, 16), int(end, 16) + 1 - int(first, 16), 0, int(first, 16))
            for at, (first, end) in zip(where, ranges, strict=True)
        }
    )
    found = layout(name, [Block("pc.ram", size)], Wish())
    assert found.placed == expected
    assert found.below_4g + found.above_4g == size


@pytest.mark.parametrize(
    ("machine_type", "size", "low"),
    [
        ("pc-i440fx-7.2", 0xDFFF_F000, 0xDFFF_F000),
        ("pc-i440fx-rhel7.6.0", 0xE000_0000, 0xC000_0000),
        ("pc-q35-9.2+pve1", 0xAFFF_F000, 0xAFFF_F000),
        ("pc-q35-jammy", 0xB000_0000, 0x8000_0000),
        (None, 0xAFFF_F000, 0xAFFF_F000),
    ],
)
def test_the_sizes_at_which_it_is_split(machine_type: str | None, size: int, low: int) -> None:
    found = layout(machine_type, [Block("pc.ram", size)], Wish())
    assert (found.below_4g, found.above_4g) == (low, size - low)


def test_nodes_are_split_in_the_middle() -> None:
    blocks = [Block("ram-node10", GiB), *(Block(f"ram-node{n}", GiB // 2) for n in range(10))]
    found = layout("pc-q35-9.0", blocks, Wish())
    assert found.placed[0] == (0, GiB // 2, 1, 0)
    assert found.placed[3:5] == [(3 * GiB // 2, GiB // 2, 4, 0), (4 * GiB, GiB // 2, 5, 0)]
    assert found.placed[-1] == (4 * GiB + 3 * GiB, GiB, 0, 0)
    across = layout("pc-q35-9.0", blocks, Wish(below_4g=3 * GiB // 4))
    assert across.placed[:3] == [
        (0, GiB // 2, 1, 0),
        (GiB // 2, GiB // 4, 2, 0),
        (4 * GiB, GiB // 4, 2, GiB // 4),
    ]


def test_what_belongs_to_devices_is_left_out() -> None:
    names = "pc.bios pc.rom vga.vram /rom@etc/acpi/tables 0000:00:02.0/vga.vram system.flash0"
    blocks = [Block("pc.ram", GiB), *(Block(name, MiB) for name in names.split())]
    assert layout("pc-q35-9.0", blocks, Wish()).placed == [(0, GiB, 0, 0)]


@pytest.mark.parametrize(
    ("machine_type", "size", "names", "error"),
    [
        (None, 0xB000_0000, ["pc.ram"], UsageError),
        ("microvm", MiB, ["pc.ram"], UsageError),
        ("pc-q35-9.0", MiB, ["pc.ram", "/objects/mem1"], UsageError),
        ("pc-q35-9.0", MiB, ["pc.ram", "mem1"], UsageError),
        ("pc-q35-9.0", MiB, ["ram-node0", "ram-node2"], UsageError),
        ("pc-q35-9.0", 0xFD_0000_0000, ["pc.ram"], ImageError),
    ],
)
def test_what_cannot_be_told(
    machine_type: str | None, size: int, names: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        layout(machine_type, [Block(name, size) for name in names], Wish())
