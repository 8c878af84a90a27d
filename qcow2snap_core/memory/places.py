"""Where a PC has its RAM.

A saved state says which RAM blocks there are and nothing of where the machine sees them.  That
follows from the machine's type and the size of its memory: it begins at 0 and leaves a hole below
4 GiB for devices; what has no room below the hole goes on at 4 GiB (QEMU: pc_init1 in
hw/i386/pc_piix.c, pc_q35_init in hw/i386/pc_q35.c).  ``max-ram-below-4g`` can move the hole, and is
not in the state; :mod:`.cmos` has what the machine itself said of it.  With an AMD processor what
is above may be at 1 TiB instead; :mod:`.acpi` knows when, and mostly whether.

Memory that was plugged in (DIMMs, virtio-mem) may lie anywhere above, and a state does not say
where.  So every block has to be known: as main memory, as a device's own, or by its user's word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from ..errors import UsageError, shown
from ..util.units import binary
from .blocks import MOST_RAM, PAGE, Block

ABOVE_4G: Final = 1 << 32
ABOVE_1T: Final = 1 << 40  # AMD_ABOVE_1TB_START
_MOST: Final = 1 << 52  # bytes that x86 can address
# Behind the memory comes the PCI devices' window, of 32 GiB if nothing else was asked for; what
# ends higher is moved where the processor is AMD's (AMD_HT_START).
_MOVED_FROM: Final = 0xFD_0000_0000 - (32 << 30)
_FIRST_TO_MOVE: Final = 7, 1  # the machine types' version
_VERSION: Final = re.compile(r"pc-(?:i440fx|q35)-(\d{1,3})\.(\d{1,3})(?:\+.*)?")
_MOST_NAMED: Final = 10

#: QEMU's own name of a PC's memory, and libvirt's names of that of NUMA nodes.
_MAIN: Final = "pc.ram"
_NODE: Final = re.compile(r"ram-node(0|[1-9][0-9]{0,3})")
#: A device's: either its path is in the name, or it is one of those that have none.
_DEVICE: Final = re.compile(
    r"(?!/objects/).*/.*|pc\.(?:bios|rom)|system\.flash[01]|vga\.vram|tpm-ppi|tpm-crb-cmd"
)


class Placed(NamedTuple):
    """A part of a RAM block that lies together in the machine's memory."""

    address: int
    length: int
    block: int  # its number
    offset: int  # in the block


class Layout(NamedTuple):
    """A machine's memory."""

    placed: Sequence[Placed]  # by address; at least one
    below_4g: int  # bytes of the main memory
    above_4g: int
    is_sure: bool  # where the latter begins


class Wish(NamedTuple):
    """What a user says of a machine's memory, because its state does not."""

    below_4g: int | None = None  # bytes
    above_4g: int | None = None  # where the rest begins
    ram: Sequence[str] = ()  # the blocks that are its main memory, in order
    addresses: Mapping[str, int | None] = {}  # of blocks; None: it is to be left out


def layout(machine: str | None, blocks: Sequence[Block], wish: Wish) -> Layout:
    """Where a machine of that type has its blocks.

    Raises UsageError, which says what to add, where that cannot be told.
    """
    numbers = {block.name: n for n, block in enumerate(blocks)}
    for name in (*wish.ram, *wish.addresses):
        if name not in numbers:
            raise UsageError(f"there is no RAM block {shown(name)}: there are {_names(blocks)}")
    main = wish.ram or _main(blocks)
    if twice := [name for name in main if main.count(name) > 1 or name in wish.addresses]:
        raise UsageError(f"RAM block {shown(twice[0])} is given two places: give it one")
    for block in blocks:
        if not (block.name in main or block.name in wish.addresses or _is_device(block)):
            name = block.name
            raise UsageError(
                f"the state does not say where the machine had the {binary(block.size)} of "
                f"{shown(name)}: add --place {name}=ADDRESS, or --place {name}=none to leave it out"
            )
    total = sum(blocks[numbers[name]].size for name in main)
    low = _below_4g(machine, total, wish)
    start, is_sure = _above_4g(machine, total - low, wish)
    placed = _split([numbers[name] for name in main], blocks, low, start)
    for name, address in wish.addresses.items():
        if address is not None:
            n = numbers[name]
            placed.append(Placed(address, blocks[n].size, n, 0))
    return Layout(_checked(sorted(placed), blocks), low, total - low, is_sure)


def _below_4g(machine: str | None, total: int, wish: Wish) -> int:
    """How many bytes of the main memory lie below the hole."""
    if wish.below_4g is not None:
        if not 0 < wish.below_4g <= ABOVE_4G or wish.below_4g % PAGE:
            raise UsageError("--below-4g: give a size of whole pages, up to 4G")
        return min(total, wish.below_4g)
    if machine is None:
        if total >= 0xB000_0000:  # where the two begin to differ
            raise UsageError(
                "the state does not say which machine it is of: add --below-4g SIZE, how much of "
                "its memory lies below 4 GiB"
            )
        return total
    if machine.startswith("pc-i440fx-"):
        return total if total < 0xE000_0000 else 0xC000_0000
    if machine.startswith("pc-q35-"):
        return total if total < 0xB000_0000 else 0x8000_0000
    raise UsageError(
        f"where a machine of type {shown(machine)} has its memory is not known, as it is of pc and "
        f"q35: add --below-4g SIZE, how much of it lies below 4 GiB"
    )


def _above_4g(machine: str | None, size: int, wish: Wish) -> tuple[int, bool]:
    """(where so much memory above the hole begins, whether that is sure)."""
    if wish.above_4g is not None:
        if not size:
            raise UsageError("--above-4g: all of the memory lies below 4 GiB")
        if wish.above_4g < ABOVE_4G or wish.above_4g % PAGE:
            raise UsageError(
                f"--above-4g: give the address of a page, {ABOVE_4G:#x} or {ABOVE_1T:#x} in QEMU"
            )
        return wish.above_4g, True
    if not size or _is_never_moved(machine):
        return ABOVE_4G, True
    if ABOVE_4G + size > _MOVED_FROM:
        raise UsageError(
            f"the state does not say where the {binary(size)} above 4 GiB were: add --above-4g "
            f"{ABOVE_1T:#x} if its processor was AMD's, else --above-4g {ABOVE_4G:#x}"
        )
    return ABOVE_4G, False


def _is_never_moved(machine: str | None) -> bool:
    """By its type.  Distributions' own ones have versions of another kind."""
    if machine is None:
        return True  # older than 2.4
    found = _VERSION.fullmatch(machine)
    return found is not None and (int(found[1]), int(found[2])) < _FIRST_TO_MOVE


def _main(blocks: Sequence[Block]) -> Sequence[str]:
    """The names of the blocks that are the main memory, in order."""
    names = [block.name for block in blocks]
    if _MAIN in names:
        return (_MAIN,)
    nodes = sorted(int(found[1]) for found in map(_NODE.fullmatch, names) if found)
    if nodes and nodes == list(range(len(nodes))):
        return [f"ram-node{n}" for n in nodes]
    raise UsageError(
        f"the state does not say which of its RAM blocks is the main memory: add --ram NAME, for "
        f"NUMA nodes once for each of them in order; there are {_names(blocks)}"
    )


def _is_device(block: Block) -> bool:
    return _DEVICE.fullmatch(block.name) is not None


def _split(main: Sequence[int], blocks: Sequence[Block], low: int, start: int) -> list[Placed]:
    found = []
    at = 0  # in the main memory
    for n in main:
        size = blocks[n].size
        below = min(size, max(0, low - at))
        if below:
            found.append(Placed(at, below, n, 0))
        if below < size:
            found.append(Placed(start + at + below - low, size - below, n, below))
        at += size
    return found


def _checked(found: list[Placed], blocks: Sequence[Block]) -> list[Placed]:
    if sum(place.length for place in found) > MOST_RAM:
        raise UsageError(f"more memory than {binary(MOST_RAM)} is not written to a file")
    end = 0
    for place in found:
        name = shown(blocks[place.block].name)
        if place.address % PAGE or place.address + place.length > _MOST:
            raise UsageError(f"RAM block {name} cannot be at {place.address:#x}")
        if place.address < end:
            raise UsageError(f"RAM block {name} would lie over others at {place.address:#x}")
        end = place.address + place.length
    return found


def _names(blocks: Sequence[Block]) -> str:
    """The first ones, which are the largest."""
    listed = [f"{block.name} ({binary(block.size)})" for block in blocks[:_MOST_NAMED]]
    return ", ".join([*listed, "…"] if len(blocks) > _MOST_NAMED else listed)
