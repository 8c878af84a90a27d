"""Read all metadata, and report what is out of bounds, overlapping or not counted. With SNAPSHOT,
report only what concerns that snapshot. Nothing is changed, and nobody should be writing to the
image. With --data, read and decode every cluster as well, each one once, however many snapshots
use it.

The exit status is 0 if nothing is damaged (there may be leaked clusters), 3 if something is
damaged and 1 if the image could not be checked."""

from __future__ import annotations

import argparse
from typing import Final

from ..errors import escaped, shown
from ..format.choosing import Choice, choose
from ..image.image import Image
from ..storage.locks import is_written
from ..tables.check import check
from ..tables.findings import MOST, Finding
from .common import DAMAGED, add_image_options, open_from, print_json
from .streams import say

HELP = "look for damage in an image"
EXAMPLE = "qcow2snap check disk.qcow2"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "snapshot", metavar="SNAPSHOT", nargs="?", help="ID or name; if omitted, all are checked"
    )
    parser.add_argument("--data", action="store_true", help="read and decode every cluster as well")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    with _opened(args) as image:
        chosen = None
        if args.snapshot is not None:
            chosen = choose(image.table(), Choice(args.snapshot), image.path)
        in_use = is_written(image.storage)
        findings = check(image, chosen, data=args.data)
        if in_use or is_written(image.storage):
            say(
                f"{shown(image.path)} is in use, a QEMU has it open for writing: what it was just "
                f"changing may look damaged, check it again when it is not"
            )
        if image.header.dirty:
            say(
                f"{shown(image.path)} is marked dirty, its refcounts are not up to date and were "
                f"not compared: qemu-img check -r all brings them up to date"
            )
    if args.json:
        print_json(_object(f) for f in findings)
    else:
        for f in findings:
            print(f"{f.problem}: {f.message}{_whose(f)}")
    if len(findings) >= MOST:
        say(f"stopped after {MOST} findings")
    if any(f.is_damage for f in findings):
        return DAMAGED
    if not args.json:
        whose = f" that concerns {shown(chosen.name or chosen.id)}" if chosen else ""
        print(f"no damage found{whose}")
    return 0


def _opened(args: argparse.Namespace) -> Image:
    """Of the files that the image names only the one with its data is needed, and that for it."""
    if not args.data:
        return open_from(args, data=False, layers=False)
    with open_from(args, data=False, layers=False) as image:
        has_data_file = image.header.has_data_file
    return open_from(args, layers=has_data_file)


_MOST_IDS: Final = 50  # in a line


def _whose(finding: Finding) -> str:
    """In brackets; an empty ID as it is written in a shell."""
    ids = [escaped(id_) or "''" for id_ in finding.snapshots[:_MOST_IDS]]
    if len(finding.snapshots) > _MOST_IDS:
        ids.append(f"and {len(finding.snapshots) - _MOST_IDS} more")
    return f" [{', '.join(ids)}]" if ids else ""


def _object(finding: Finding) -> dict[str, object]:
    return {key: value for key, value in finding._asdict().items() if value is not None}
