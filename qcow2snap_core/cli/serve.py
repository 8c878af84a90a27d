"""Serve an image's snapshots, or one of them, over NBD: run nbdkit with the plugin.

Everything after FILE and SNAPSHOT goes to nbdkit and the plugin: options like -U SOCKET, -i
ADDRESS, -f or --filter=NAME, and parameters KEY=VALUE like allow-dir=DIR. Without any, nbdkit
listens on all addresses and goes into the background. If the name of the snapshot looks like an
option or a parameter, put it after --. With libvirt:DOMAIN in place of FILE, --disk TARGET after
it says which disk of the machine is meant."""

from __future__ import annotations

import argparse

from ..host.domains import image_of, is_domain
from ..host.nbdkit import check_options, execute, nbdkit_to_run
from ..serve.settings import is_key

HELP = "serve snapshots over NBD, with nbdkit"
EXAMPLE = "qcow2snap serve disk.qcow2 nightly -f -U /tmp/nightly.sock"


def arguments(parser: argparse.ArgumentParser) -> None:
    # All in one, since argparse would take a "--" that stands behind FILE for itself.
    parser.usage = "%(prog)s [-h] FILE [SNAPSHOT] [NBDKIT-OPTION...]"
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="FILE [SNAPSHOT] ...",
        help="the qcow2 image, the ID or name of a snapshot, and options for nbdkit",
    )


def run(args: argparse.Namespace) -> int:
    words: list[str] = args.words
    if words[:1] == ["--"]:
        del words[0]
    if not words:
        args.usage_error("the following arguments are required: FILE")
    file, *rest = words
    disk = None
    if is_domain(file) and rest[:1] == ["--disk"] and len(rest) > 1:
        disk, rest = rest[1], rest[2:]
    file = image_of(file, disk)
    snapshot = []
    if rest[:1] == ["--"]:
        del rest[0]
        snapshot = rest[:1]
    elif rest and not _is_for_nbdkit(rest[0], rest):
        snapshot = rest[:1]
    rest = rest[len(snapshot) :]
    check_options(rest)
    chosen = [f"snapshot={name}" for name in snapshot]
    execute([*nbdkit_to_run(), f"file={file}", *chosen, *rest])
    return 0


def _is_for_nbdkit(word: str, words: list[str]) -> bool:
    """Whether the word behind FILE is no snapshot: an option, a key of the plugin, or where there
    are filters, whose keys only they know, any KEY=VALUE."""
    if word.startswith("-"):
        return True
    key, equals, _ = word.partition("=")
    filters = any(w.startswith("--filter") for w in words)
    return bool(equals) and (filters or is_key(key))
