"""Where the memory of a machine lies: by QEMU's own account of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.vm import machine

from qcow2snap_core.errors import UsageError
from qcow2snap_core.memory.blocks import Block
from qcow2snap_core.memory.places import ABOVE_1T, Wish, layout

GiB = 1 << 30


# The processor and the room for more memory with which QEMU moves it to 1 TiB.
MOVED = ("-cpu", "EPYC,phys-bits=46", "-m", "slots=2,maxmem=1100G")


@pytest.mark.parametrize(
    ("kind", "size", "more"),
    [
        *[(kind, 16 * MiB, ()) for kind in ("pc", "q35")],
        *[(kind, 3 * GiB - MiB, ()) for kind in ("pc", "q35")],
        *[(kind, 5 * GiB, more) for kind in ("pc", "q35") for more in ((), MOVED)],
    ],
)
def test_memory_lies_where_qemu_has_it(
    tmp_path: Path, kind: str, size: int, more: tuple[str, ...]
) -> None:
    """It takes no memory: nothing is written to it."""
    image = qemu.create(tmp_path / "disk.qcow2", MiB)
    with machine(image, *more, kind=kind, memory=size) as vm:
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
    wish = Wish(above_4g=ABOVE_1T) if more else Wish()
    found = layout(name, [Block("pc.ram", size)], wish)
    assert found.placed == expected
    assert found.is_sure == (bool(more) or len(expected) == 1)
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
    ("machine_type", "size", "names"),
    [
        (None, 0xB000_0000, ["pc.ram"]),
        ("microvm", MiB, ["pc.ram"]),
        ("pc-q35-9.0", MiB, ["pc.ram", "/objects/mem1"]),
        ("pc-q35-9.0", MiB, ["pc.ram", "mem1"]),
        ("pc-q35-9.0", MiB, ["ram-node0", "ram-node2"]),
        ("pc-q35-7.1", 0xF6_0000_0000, ["pc.ram"]),
        ("pc-q35-9.0", 0xFD_0000_0000, ["pc.ram"]),
        ("pc-q35-rhel9.2.0", 0xFD_0000_0000, ["pc.ram"]),
    ],
)
def test_what_cannot_be_told(machine_type: str | None, size: int, names: list[str]) -> None:
    with pytest.raises(UsageError):
        layout(machine_type, [Block(name, size) for name in names], Wish())


@pytest.mark.parametrize(
    ("machine_type", "is_sure"),
    [
        (None, True),
        ("pc-i440fx-2.12", True),
        ("pc-q35-7.0", True),
        ("pc-q35-7.1", False),
        ("pc-i440fx-10.0", False),
        ("pc-q35-9.2+pve1", False),
        ("pc-i440fx-rhel7.6.0", False),
        ("pc-q35-noble", False),
    ],
)
def test_old_machine_types_move_no_memory(machine_type: str | None, is_sure: bool) -> None:
    found = layout(machine_type, [Block("pc.ram", 5 * GiB)], Wish(below_4g=2 * GiB))
    assert found.placed[1].address == 4 * GiB
    assert found.is_sure == is_sure


def test_the_largest_machine_of_an_old_type() -> None:
    found = layout("pc-q35-7.0", [Block("pc.ram", 2 << 40)], Wish())
    assert found.placed[1] == (4 * GiB, (2 << 40) - 2 * GiB, 0, 2 * GiB)
