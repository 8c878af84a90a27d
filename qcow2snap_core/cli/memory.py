"""Write the memory of a machine that savevm saved to a file, for volatility3 and the like.

OUT is raw, byte for byte where the machine's processors saw it, what is no RAM being a hole of
zeros; or an ELF file if its name ends in .elf. The machine is a pc or q35. What its state does not
say has to be given: --below-4g if it was started with max-ram-below-4g, --above-4g if QEMU had to
move what lies above, --ram if its memory has another name than QEMU's and libvirt's, and --place
for DIMMs and the like. OUT appears when it is
whole, and no page of RAM may be missing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..errors import UsageError, escaped
from ..memory.places import Wish
from ..transfer.judge import judge
from ..transfer.memoryfile import FORMS, MEMORY_TARGETS, Memory, form_of_memory, save_memory
from ..util.interrupts import deferred
from .common import (
    add_force,
    add_image_options,
    ensure_not_source,
    open_from,
    print_json,
    saved_named,
)
from .parser import SIZE, value
from .streams import OUTPUT_NAMES, warn

HELP = "write the memory of a saved machine to a file"
EXAMPLE = "qcow2snap memory disk.qcow2 live memory.raw"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="with VM state, by ID or name")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--format", choices=FORMS, help="OUT's name decides otherwise")
    add_force(parser, "replace OUT if it is a file that is there")
    parser.add_argument(
        "--below-4g", metavar="SIZE", type=SIZE, help="how much of the memory lies below 4 GiB"
    )
    parser.add_argument(
        "--above-4g",
        metavar="ADDRESS",
        type=value(_address, "give an address, like 0x100000000"),
        help="where the rest begins, 0x10000000000 say",
    )
    parser.add_argument(
        "--ram",
        metavar="BLOCK",
        action="append",
        default=[],
        help="the RAM block that is the main memory; of NUMA nodes each, in order",
    )
    parser.add_argument(
        "--place",
        metavar="BLOCK=ADDRESS",
        type=value(_placed, "give BLOCK=ADDRESS or BLOCK=none"),
        action="append",
        default=[],
        help="where another RAM block lies; none leaves it out",
    )
    parser.add_argument("--json", action="store_true", help="what lies where, as JSON")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    form = args.format or form_of_memory(args.out)
    wish = Wish(args.below_4g, args.above_4g, args.ram, dict(args.place))
    if args.out in OUTPUT_NAMES:
        raise UsageError("pages come in any order, which standard output cannot take: give a file")
    ensure_not_source(args.out, args.file)
    place = judge(args.out, MEMORY_TARGETS, replace=args.force)  # before a passphrase is asked for
    with open_from(args) as image, deferred():
        memory = save_memory(image, saved_named(image, args.snapshot), place, form, wish, warn)
    if args.json:
        print_json(_objects(memory))
    else:
        print(f"{escaped(args.out)}: {memory}")
    return 0


def _placed(text: str) -> tuple[str, int | None]:
    block, _, address = text.rpartition("=")
    if not block:
        raise ValueError
    return block, None if address == "none" else _address(address)


def _address(text: str) -> int:
    at = int(text, 0)
    if at < 0:
        raise ValueError
    return at


def _objects(memory: Memory) -> Iterator[dict[str, Any]]:
    for place in memory.placed:
        yield {
            "address": place.address,
            "length": place.length,
            "block": memory.blocks[place.block].name,
            "offset": place.offset,
        }
