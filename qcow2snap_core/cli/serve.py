"""Serve an image's snapshots, or one of them, over NBD: nbdkit with the plugin.

Whatever follows FILE and SNAPSHOT is nbdkit's or the plugin's: options like -U SOCKET, -i ADDRESS,
-f, --filter=NAME, and KEY=VALUE like allow-dir=DIR. Without any, nbdkit listens on all addresses
and goes into the background."""

from __future__ import annotations

import argparse

from ..host.nbdkit import check_options, execute, nbdkit_to_run

HELP = "serve snapshots over NBD, with nbdkit"
EXAMPLE = "qcow2snap serve disk.qcow2 nightly -f -U /tmp/nightly.sock"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="[SNAPSHOT] ...", help="and options for nbdkit"
    )


def run(args: argparse.Namespace) -> int:
    rest: list[str] = args.rest
    snapshot = []
    if rest and not rest[0].startswith("-") and "=" not in rest[0]:
        snapshot = [f"snapshot={rest.pop(0)}"]
    check_options(rest)
    execute([*nbdkit_to_run(), f"file={args.file}", *snapshot, *rest])
    return 0
