"""List the snapshots of an image, with the space that deleting each one would free: the clusters
that neither another snapshot nor the active disk uses.

With --tree a strip for each shows which parts of the disk it shares with older and newer ones, and
which are its own. The width is the terminal's."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ..errors import ImageError, escaped, shown
from ..format.entries import oddities
from ..format.snapshot_table import Table
from ..format.snapshots import Snapshot, date
from ..image.image import Image
from ..serve.exports import exports_of
from ..tables.sharing import picture
from ..tables.space import exclusive_sizes
from ..util.units import binary
from .common import ACTIVE, add_image_options, of_all, open_from, print_json, print_table
from .streams import say
from .strips import text

HELP = "the snapshots, and the space that each takes alone"
EXAMPLE = "qcow2snap list disk.qcow2"

_TITLES = ("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT", "DISK SIZE", "EXCLUSIVE")
_NUMBERS = (2, 4, 5, 6, 7)
_NARROWEST = 8  # of a strip, however long the names are


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON array, sizes in bytes")
    form.add_argument("--tree", action="store_true", help="draw what each shares with the others")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_from(args, data=False, layers=False) as image:
        if args.tree:
            table = _print_tree(image)
            sizes: list[int | None] = []
        else:
            table, sizes = of_all(image, partial(exclusive_sizes, image))
        odd = [wrong for _, wrong in oddities(table.snapshots, image.header)]
    listed = list(zip(table.snapshots, sizes, strict=not args.tree))
    if args.json:
        names = {id(e.snapshot): e.name for e in exports_of(table.snapshots) if not e.vm_state}
        print_json(_object(s, size, names.get(id(s))) for s, size in listed)
    elif listed:
        print_table([_TITLES, *(_row(s, size) for s, size in listed)], _NUMBERS)
    if odd:
        more = f" (and {len(odd) - 1} more like this)" if len(odd) > 1 else ""
        say(
            f"{shown(image.path)}: {odd[0]}{more}: it is listed as it stands, "
            f"qcow2snap check tells all that is wrong"
        )
    if table.damage:
        raise ImageError(f"{shown(args.file)}: the snapshot table is damaged: {table.damage}")
    return 0


def _print_tree(image: Image) -> Table:
    columns = shutil.get_terminal_size().columns

    def draw(snapshots: Sequence[Snapshot]) -> Iterator[str]:
        names = [(escaped(s.id), escaped(s.name)) for s in snapshots] + [("", ACTIVE)]
        ids, tags = (max(map(len, column)) for column in zip(*names, strict=True))
        rows = [(id_.ljust(ids), name.ljust(tags)) for id_, name in names]
        width = columns - ids - tags - len("    ")
        return text(picture(image, snapshots, max(width, _NARROWEST)), rows)

    table, lines = of_all(image, draw)
    for line in lines:
        print(line)
    return table


def _object(s: Snapshot, exclusive: int | None, export: str | None) -> dict[str, Any]:
    found = {
        "id": s.id,
        "name": s.name,
        "vm-state-size": s.vm_state_size,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec // 10**9,
        "vm-clock-nsec": s.vm_clock_nsec % 10**9,
        "icount": s.icount,
        "disk-size": s.disk_size,
        "exclusive-size": exclusive,
        "export": export,
    }
    if s.icount is None:
        del found["icount"]
    return found


def _row(s: Snapshot, exclusive: int | None) -> tuple[str, ...]:
    seconds, millis = divmod(s.vm_clock_nsec // 10**6, 1000)
    return (
        escaped(s.id),
        escaped(s.name),
        binary(s.vm_state_size),
        date(s),
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{millis:03}",
        "" if s.icount is None else str(s.icount),
        binary(s.disk_size),
        "?" if exclusive is None else binary(exclusive),
    )
