"""Show a snapshot as the raw disk DIR/disk, read-only, until Ctrl-C or until DIR is unmounted.

What reads the disk should not be the host's kernel: a filesystem that a guest wrote is untrusted
input. Programs without privileges read it as well, like guestfish, 7z, debugfs or fuse2fs."""

from __future__ import annotations

import argparse

from ..errors import escaped
from ..mount import mount
from ..snapshots import Choice, choose
from .common import add_image_options, open_from
from .running import terminate_as_interrupt

HELP = "show a snapshot as a raw disk in a directory"
EXAMPLE = "qcow2snap mount disk.qcow2 nightly /mnt/nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--partition", metavar="N", type=int, help="only this partition of it")
    parser.add_argument("file", metavar="FILE", help="the qcow2 image")
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="its ID or name")
    parser.add_argument("directory", metavar="DIR", help="an existing directory")
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    terminate_as_interrupt()

    def ready(path: str) -> None:
        print(f"{escaped(path)} is there until Ctrl-C", flush=True)

    with open_from(args) as image:
        snapshot = choose(image.table(), Choice(args.snapshot), image.path)
        image.disk(snapshot)
        mount(image, snapshot, args.directory, args.partition, ready)
    return 0
