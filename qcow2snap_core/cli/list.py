"""List the snapshots of an image, with the space that deleting each one would free: the clusters
that neither another snapshot nor the active disk uses. On a terminal long names are cut. Columns
that are empty for every snapshot are left out.

With --tree, print a strip for each snapshot that shows which parts of the disk it shares with
older and newer snapshots, and which it has alone. With --free, print how much space deleting
several snapshots together would free. That is more than the sum of the single sizes if they
share clusters that nobody else uses.

For libvirt:DOMAIN, which stands for the machine's image, a last column shows what libvirt knows
of each snapshot: when libvirt took it, the state of the machine at that time, and the
description. FILE may also be a repository made by backup; then the snapshots in it are listed."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

from ..errors import ImageError, UsageError, escaped, shown
from ..format.choosing import Choice, choose
from ..format.oddities import oddities
from ..format.snapshot_table import Table
from ..format.snapshots import Snapshot, date
from ..host.domains import Known, is_domain, known_snapshots
from ..image.image import Image
from ..serve.exports import exports_of
from ..tables.findings import ACTIVE
from ..tables.sharing import picture
from ..tables.space import Freed, exclusive_sizes, freed_together
from ..util.units import binary
from .common import add_image_options, check_disk, open_from, print_json
from .drawing import text
from .streams import say
from .text import cut, fitted, print_table, terminal_width

HELP = "list the snapshots, and the space that each takes alone"
EXAMPLE = "qcow2snap list disk.qcow2"

_TITLES = ("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT", "DISK SIZE", "EXCLUSIVE")
_LIBVIRT = "LIBVIRT"
_NUMBERS = (2, 4, 5, 6, 7)
_NAMES = (1, 0)
_NOTHING: Final = {"0 B", "00:00:00.000", "0", ""}  # in a column that may go
_MAY_GO = (2, 4, 5, 8)
_NARROWEST = 8  # of a strip, however long the names are


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--tree", action="store_true", help="draw which parts each shares with the others"
    )
    form.add_argument(
        "--names", action="store_true", help="print one word for each, by which it can be chosen"
    )
    form.add_argument(
        "--free",
        metavar="SNAPSHOT,...",
        action="append",
        help="print what deleting these together would free",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array, with sizes in bytes"
    )
    parser.add_argument("--wide", action="store_true", help="print all columns, and names in full")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.json and (args.tree or args.names):
        args.usage_error("--json goes without --tree and --names")
    if args.wide and (args.json or args.tree or args.names or args.free):
        args.usage_error("--wide goes with the plain list")
    check_disk(args)
    if os.path.isdir(args.file):
        if args.tree or args.names or args.free or args.wide:
            args.usage_error("of a repository there is the plain list, and --json")
        from .backups import print_repository  # all that writes comes with it

        print_repository(args.file, args.json)
        return 0
    with open_from(args, data=False, layers=False) as image:
        if args.names:
            table = image.table()
            _print_names(table)
        elif args.tree:
            table = _print_tree(image)
        elif args.free:
            table = _print_freed(image, args.free, args.json)
        else:
            known = known_snapshots(args.file) if is_domain(args.file) else None
            table = _print_list(image, args.json, args.wide, known)
        odd = [wrong for _, wrong in oddities(table.snapshots, image.header)]
    if odd:
        more = f" (and {len(odd) - 1} more like this)" if len(odd) > 1 else ""
        say(
            f"{shown(image.path)}: {odd[0]}{more}: it is listed as it stands, "
            f"qcow2snap check tells all that is wrong"
        )
    if table.damage:
        raise ImageError(f"{shown(args.file)}: the snapshot table is damaged: {table.damage}")
    return 0


def _print_list(image: Image, json: bool, wide: bool, known: list[Known] | None) -> Table:
    table, sizes = image.of_all(partial(exclusive_sizes, image))
    listed = list(zip(table.snapshots, sizes, strict=True))
    libvirts = {each.name: each for each in known or ()}
    if json:
        names = {id(e.snapshot): e.name for e in exports_of(table.snapshots) if not e.vm_state}
        objects = (_object(s, freed, names.get(id(s))) for s, freed in listed)
        if known is not None:
            objects = (o | {"libvirt": _libvirt_object(libvirts.get(o["name"]))} for o in objects)
        print_json(objects)
    elif listed:
        rows: list[Sequence[str]] = [(*_TITLES, _LIBVIRT)]
        rows += [_row(s, freed, libvirts.get(s.name)) for s, freed in listed]
        gone = {i for i in _MAY_GO if not wide and {row[i] for row in rows[1:]} <= _NOTHING}
        there_are = len(_TITLES) if known is None else len(rows[0])
        kept = [i for i in range(there_are) if i not in gone]
        if sys.stdout.isatty() and not wide:
            columns = terminal_width()
            rows[:] = fitted(rows, kept, _NAMES, columns)
        right = [at for at, i in enumerate(kept) if i in _NUMBERS]
        print_table([[row[i] for i in kept] for row in rows], right)
    elif not table.damage:
        say(f"{shown(image.path)} has no snapshots" + (f": {table.note}" if table.note else ""))
    there = {s.name for s in table.snapshots}
    for each in known or ():
        if each.name not in there:
            say(f"libvirt knows {shown(each.name)}, {_known(each)}, which is not in this image")
    return table


def _print_names(table: Table) -> None:
    """For shells that complete them: so only what fits on a line and means one snapshot."""
    for name, snapshot, vm_state in exports_of(table.snapshots):
        if vm_state:
            continue
        if name.isprintable():
            print(name)
        elif snapshot.id.isprintable() and choose(table, Choice(snapshot.id), "") is snapshot:
            print(snapshot.id)


def _print_tree(image: Image) -> Table:
    columns = terminal_width()
    longest = max(columns // 3, _NARROWEST) if sys.stdout.isatty() else None

    def draw(snapshots: Sequence[Snapshot]) -> Iterator[str]:
        names = [(escaped(s.id), escaped(s.name)) for s in snapshots] + [("", ACTIVE)]
        if longest is not None:
            names = [(cut(id_, longest // 2), cut(name, longest)) for id_, name in names]
        ids, tags = (max(map(len, column)) for column in zip(*names, strict=True))
        rows = [(id_.ljust(ids), name.ljust(tags)) for id_, name in names]
        width = columns - ids - tags - len("    ")
        return text(picture(image, snapshots, max(width, _NARROWEST)), rows, columns)

    table, lines = image.of_all(draw)
    for line in lines:
        print(line)
    return table


def _print_freed(image: Image, words: Sequence[str], json: bool) -> Table:
    def ask(snapshots: Sequence[Snapshot]) -> tuple[list[Snapshot], Freed | None]:
        chosen = _named(Table(tuple(snapshots), None), words, image.path)
        return chosen, freed_together(image, snapshots, {s.identity for s in chosen})

    table, (chosen, freed) = image.of_all(ask)
    if json:
        named: dict[str, Any] = {"snapshots": [s.id for s in chosen]}
        print_json([named | _sizes("freed", freed)])
        return table
    if freed is None:
        raise ImageError(f"{shown(image.path)} is damaged: qcow2snap check tells what is wrong")
    state = f", {binary(freed.vm_state)} of it VM state" if freed.vm_state else ""
    names = ", ".join(shown(s.name or s.id) for s in chosen)
    together = " together" if len(chosen) > 1 else ""
    print(f"deleting {names}{together} frees {binary(freed.size)}{state}")
    return table


def _named(table: Table, words: Sequence[str], path: str) -> list[Snapshot]:
    """Those that the words name, separated by commas; a name may have commas in it itself.

    Raises UsageError.
    """
    chosen_ids: dict[int, Snapshot] = {}
    for word in words:
        try:
            chosen = [choose(table, Choice(word), path)]
        except UsageError:
            if "," not in word:
                raise
            chosen = [choose(table, Choice(part), path) for part in word.split(",") if part]
        chosen_ids.update((id(s), s) for s in chosen)
    return [s for s in table.snapshots if id(s) in chosen_ids]


def _sizes(what: str, freed: Freed | None) -> dict[str, int | None]:
    return {
        f"{what}-size": None if freed is None else freed.size,
        f"{what}-disk-size": None if freed is None else freed.disk,
        f"{what}-vm-state-size": None if freed is None else freed.vm_state,
    }


def _object(s: Snapshot, exclusive: Freed | None, export: str | None) -> dict[str, Any]:
    fields = {
        "id": s.id,
        "name": s.name,
        "vm-state-size": s.vm_state_size,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec // 10**9,
        "vm-clock-nsec": s.vm_clock_nsec % 10**9,
        "icount": s.icount,
        "disk-size": s.disk_size,
        **_sizes("exclusive", exclusive),
        "export": export,
    }
    if s.icount is None:
        del fields["icount"]
    return fields


def _libvirt_object(known: Known | None) -> dict[str, Any] | None:
    return (
        None
        if known is None
        else {
            "date-sec": known.date,
            "state": known.state,
            "description": known.description,
            "parent": known.parent or None,
            "current": known.current,
        }
    )


def _known(known: Known) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(known.date))
    said = f": {escaped(known.description)}" if known.description else ""
    return f"{when} {escaped(known.state)}{said}"


def _row(s: Snapshot, exclusive: Freed | None, known: Known | None) -> tuple[str, ...]:
    seconds, millis = divmod(s.vm_clock_nsec // 10**6, 1000)
    return (
        escaped(s.id),
        escaped(s.name),
        binary(s.vm_state_size),
        date(s),
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{millis:03}",
        "" if s.icount is None else str(s.icount),
        binary(s.disk_size),
        "?" if exclusive is None else binary(exclusive.size),
        "" if known is None else _known(known),
    )
