"""Write the memory of a machine that savevm saved to a file, for volatility3 and similar programs.

OUT is a raw file, with each byte at the address where the machine's processors saw it, and
holes, which read as zeros, where there is no RAM. If its name ends in .elf it is an ELF file
instead. The machine must be a pc or q35. What its saved state does not say has to be given:
--below-4g if the machine was started with max-ram-below-4g, --above-4g if QEMU put the rest of
the memory elsewhere than at 4 GiB, --ram if the memory has another name than those of QEMU and
libvirt, --place for DIMMs and the like. OUT appears when it is complete; if a page of RAM is
missing, that is an error."""

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
    parser.add_argument(
        "snapshot", metavar="SNAPSHOT", help="ID or name of a snapshot with VM state"
    )
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--format", choices=FORMS, help="the format of OUT, whatever its name is")
    add_force(parser, "replace OUT if it is an existing file")
    parser.add_argument(
        "--below-4g", metavar="SIZE", type=SIZE, help="how much of the memory lies below 4 GiB"
    )
    parser.add_argument(
        "--above-4g",
        metavar="ADDRESS",
        type=value(_address, "give an address, like 0x100000000"),
        help="where the rest of it begins, for example 0x10000000000",
    )
    parser.add_argument(
        "--ram",
        metavar="BLOCK",
        action="append",
        default=[],
        help="the RAM block that is the main memory; repeat it for each NUMA node, in order",
    )
    parser.add_argument(
        "--place",
        metavar="BLOCK=ADDRESS",
        type=value(_placed, "give BLOCK=ADDRESS or BLOCK=none"),
        action="append",
        default=[],
        help="the address of another RAM block; none leaves it out",
    )
    parser.add_argument("--json", action="store_true", help="print where each part lies, as JSON")
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
