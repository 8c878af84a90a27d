"""Delete the snapshots that no rule keeps. The rules are those of restic forget, in local time:
--keep-daily 7, for example, keeps the newest snapshot of each of the last seven days that have
one. A snapshot that any of the rules keeps is kept.

QEMU does the deleting: the QEMU that has the image open, with --qmp and --device, or qemu-img if
no process uses the image. After each deletion the file is looked at; Ctrl-C stops before the
next deletion. With --dry-run nothing is deleted: it prints what would be kept and why, what
would be deleted, how much space that would free, and what would prevent it. Snapshots that
libvirt knows of a libvirt:DOMAIN are not deleted; use virsh snapshot-delete for them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Final

from ..errors import Error, ImageError, UsageError, escaped, shown
from ..format import ondisk as q
from ..format.snapshots import Snapshot, date
from ..host.delete import Deleter, delete, ensure_deletable
from ..host.domains import ensure_not_known, is_domain, virsh_word
from ..host.qmp import Qmp
from ..host.quiet import THROUGH_QMP, QuietImage
from ..host.running import RunningQemu
from ..image.image import Image
from ..tables.check import check
from ..tables.keep import ALL, Policy, parse_duration, reasons_to_keep
from ..tables.space import Freed, freed_together
from ..util.interrupts import Interrupted, deferred, interrupted
from ..util.passphrase import read_passphrase
from ..util.progress import progress
from ..util.units import binary, counted
from ..util.wording import COMMAND, passphrase_key
from .common import add_image_options, open_from, print_json
from .parser import value
from .streams import say
from .text import fitted, print_table, terminal_width

HELP = "delete the snapshots that no rule keeps"
EXAMPLE = "qcow2snap prune disk.qcow2 --keep-daily 7 --keep-weekly 4 --dry-run"

_KINDS: Final = {
    "last": "the last N",
    "hourly": "the newest of each of the last N hours that have one",
    "daily": "the newest of each of the last N days that have one",
    "weekly": "the same for weeks, which begin on Mondays",
    "monthly": "the same for months",
    "yearly": "the same for years",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    rules = parser.add_argument_group("what to keep; N may be unlimited")
    for kind, what in _KINDS.items():
        rules.add_argument(f"--keep-{kind}", metavar="N", type=_count, default=0, help=what)
    rules.add_argument(
        "--keep-within",
        metavar="DURATION",
        type=value(parse_duration, "give years, months, days and hours, like 2y5m7d3h"),
        help="what is not older than the newest by more than this, like 1y6m7d12h",
    )
    rules.add_argument(
        "--match",
        metavar="GLOB",
        action="append",
        help="consider only snapshots with such names, and keep all others",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="delete nothing, print what would be done"
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="the QMP socket of the QEMU that has the image open"
    )
    parser.add_argument(
        "--device",
        metavar="NODE",
        action="append",
        help="the node or device name of the image in that QEMU; repeat it for other disks "
        "whose snapshots were taken at the same time",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array, with sizes in bytes"
    )
    add_image_options(parser)


def _count(text: str) -> int:
    number = ALL if text == "unlimited" else int(text)
    if number < ALL:
        raise ValueError
    return number


class _Plan:
    """What is to become of the snapshots of an image."""

    def __init__(self, image: Image, policy: Policy, patterns: Sequence[str] | None) -> None:
        table, (self.considered, self.doomed, self.freed) = image.of_all(
            lambda snapshots: self._look(image, snapshots, policy, patterns)
        )
        if table.damage:
            raise ImageError(f"{shown(image.path)}: the snapshot table is damaged: {table.damage}")
        self.there = table.snapshots

    @staticmethod
    def _look(
        image: Image, there: Sequence[Snapshot], policy: Policy, patterns: Sequence[str] | None
    ) -> tuple[list[tuple[Snapshot, tuple[str, ...]]], list[Snapshot], Freed]:
        looked_at = [
            s for s in there if patterns is None or any(fnmatchcase(s.name, p) for p in patterns)
        ]
        reasons = reasons_to_keep(looked_at, policy, time.time())
        considered = list(zip(looked_at, reasons, strict=True))
        doomed = [s for s, why in considered if not why]
        freed = freed_together(image, there, {s.identity for s in doomed})
        if freed is None:
            raise ImageError(f"{shown(image.path)} is damaged: qcow2snap check tells what is wrong")
        return considered, doomed, freed


def run(args: argparse.Namespace) -> int:
    policy = _policy(args)
    gone: list[Snapshot] = []
    with open_from(args, data=False, layers=False) as image:
        if args.passphrase_0 is not None and image.header.crypt_method == q.CRYPT_NONE:
            raise UsageError(f"{shown(image.path)} is not encrypted: leave out the passphrase")
        plan = _Plan(image, policy, args.match)
        if not plan.doomed or args.dry_run:
            _print(plan, args)
            if plan.doomed:
                _tell_what_hinders(args, image, plan)
        else:
            with deferred(), _deleter(args, image, plan) as by:
                _print(plan, args)
                try:
                    _delete(image, plan.doomed, by, gone)
                except (Error, Interrupted):
                    if args.json and gone:
                        print_json([_object(plan, gone)])
                    raise
    if args.json:
        print_json([_object(plan, gone)])
    return 0


def _policy(args: argparse.Namespace) -> Policy:
    if (args.qmp is None) != (args.device is None):
        args.usage_error("--qmp and --device go together")
    if args.qmp is not None and args.passphrase_0 is not None:
        args.usage_error("--passphrase goes without --qmp: the running QEMU has it")
    counts = {kind: getattr(args, f"keep_{kind}") for kind in _KINDS}
    policy = Policy(**counts, within=args.keep_within)
    if policy == Policy():
        args.usage_error("no rule keeps anything: give --keep-last N or another --keep option")
    return policy


@contextmanager
def _deleter(args: argparse.Namespace, image: Image, plan: _Plan) -> Iterator[Deleter]:
    """The QEMU that is to delete them, when nothing is known that hinders it."""
    if is_domain(args.file):
        ensure_not_known(args.file, [s.name for s in plan.doomed])
    with ExitStack() as stack:
        by: Deleter
        if args.qmp is not None:
            by = RunningQemu(stack.enter_context(Qmp(args.qmp)), image, args.device)
        else:
            by = QuietImage(image, _passphrase(args, image), _instead(args.file))
            _ensure_undamaged(image)
        ensure_deletable(by, plan.there, plan.doomed)
        yield by


def _tell_what_hinders(args: argparse.Namespace, image: Image, plan: _Plan) -> None:
    try:
        with deferred(), _deleter(args, image, plan):
            pass
    except Error as e:
        say(f"without --dry-run this would fail: {e}")


def _ensure_undamaged(image: Image) -> None:
    """Raises ImageError for damage: where a cluster in use has no refcount, QEMU writes its new
    snapshot table over it, and a snapshot that was to be kept is lost."""
    if any(finding.is_damage for finding in check(image)):
        raise ImageError(
            f"{shown(image.path)} is damaged, and deleting could lose what is to be kept: "
            f"qcow2snap check tells what is wrong"
        )


def _passphrase(args: argparse.Namespace, image: Image) -> bytes | None:
    if image.header.crypt_method == q.CRYPT_NONE:
        return None
    if args.passphrase_0 is None:
        raise UsageError(
            f"{shown(image.path)} is encrypted, and qemu-img deletes nothing without the "
            f"passphrase: add {COMMAND.passphrase(0)}"
        )
    if args.dry_run:  # nobody is to type it for nothing
        return None
    return read_passphrase(passphrase_key(0), args.passphrase_0, COMMAND)


def _instead(file: str) -> str:
    """What can be done where a QEMU uses the image: libvirt keeps that one's QMP socket."""
    if not is_domain(file):
        return THROUGH_QMP
    return f"shut the virtual machine down first, with virsh shutdown {virsh_word(file)}"


def _delete(image: Image, doomed: Sequence[Snapshot], by: Deleter, gone: list[Snapshot]) -> None:
    """What is deleted is appended to ``gone``, and so is known after an error as well."""
    try:
        with progress("deleting", len(doomed), "snapshots") as advance:
            for snapshot in delete(image, doomed, by):
                gone.append(snapshot)
                advance(1)
    except (Error, Interrupted) as e:
        # The signal may have reached qemu-img too, which then fails.
        if isinstance(e, Interrupted) or interrupted():
            say(f"stopped: {len(gone)} of {counted(len(doomed), 'snapshot')} were deleted")
            raise
        raise type(e)(f"{e}: {len(gone)} of {len(doomed)} were deleted") from e


def _print(plan: _Plan, args: argparse.Namespace) -> None:
    if args.json:
        return
    kept: list[Sequence[str]] = []
    for s, why in plan.considered:
        kept += [(*_row(s), first) for first in why[:1]]
        kept += [("", "", "", more) for more in why[1:]]
    if kept:
        print(f"keep {counted(len(plan.considered) - len(plan.doomed), 'snapshot')}:")
        _print_rows([("ID", "TAG", "DATE", "REASONS"), *kept])
    if not plan.doomed:
        print("there is nothing to delete")
        return
    what = "would delete" if args.dry_run else "delete"
    state = f", {binary(plan.freed.vm_state)} of it VM state" if plan.freed.vm_state else ""
    frees = f"frees {binary(plan.freed.size)}{state}"
    print(f"{what} {counted(len(plan.doomed), 'snapshot')}, which {frees}:")
    _print_rows([("ID", "TAG", "DATE"), *(_row(s) for s in plan.doomed)])


def _row(s: Snapshot) -> tuple[str, str, str]:
    return escaped(s.id), escaped(s.name), date(s)


def _print_rows(rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        rows = fitted(rows, range(len(rows[0])), (1, 0), terminal_width())
    print_table(rows)
    sys.stdout.flush()


def _object(plan: _Plan, gone: Sequence[Snapshot]) -> dict[str, Any]:
    deleted = {s.identity for s in gone}
    return {
        "keep": [_snapshot(s) | {"reasons": list(why)} for s, why in plan.considered if why],
        "delete": [_snapshot(s) | {"deleted": s.identity in deleted} for s in plan.doomed],
        "freed-size": plan.freed.size,
        "freed-disk-size": plan.freed.disk,
        "freed-vm-state-size": plan.freed.vm_state,
        "deleted": bool(gone) and len(gone) == len(plan.doomed),
    }


def _snapshot(s: Snapshot) -> dict[str, Any]:
    return {"id": s.id, "name": s.name, "date-sec": s.date_sec, "date-nsec": s.date_nsec}
