"""List files in a snapshot, in the format of ls -l: mode, links, owner, group, size, date and name.

A library reads the filesystem; nothing is mounted. PATH and its symbolic links are looked up
inside the guest; without PATH the root directory is listed. Characters that cannot be printed
are escaped."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..errors import escaped
from ..files.tree import Filesystem, Kind, Node, Unreadable, find, walk
from .common import open_from, print_json
from .guest import add_guest_options, add_max_files, add_place, filesystem, guest_path, long_line
from .text import print_table

HELP = "list the files in a snapshot"
EXAMPLE = "qcow2snap ls disk.qcow2 nightly:1 /etc"

_TITLES = ["MODE", "LINKS", "UID", "GID", "SIZE", "DATE", "NAME"]


def arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser, needed=False)
    parser.add_argument("-R", "--recursive", action="store_true", help="list everything below PATH")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    add_max_files(parser, "give up after so many entries")
    add_guest_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_from(args) as image:
        fs = filesystem(image, args.snapshot, args)
        found = _listed(fs, guest_path(args.path), args)
        if args.json:
            print_json(_object(fs, name, node) for name, node in found)
        else:
            rows = [[*long_line(node), _name(fs, name, node)] for name, node in found]
            print_table([_TITLES, *rows], right=(1, 2, 3, 4))
    return 0


def _listed(fs: Filesystem, path: bytes, args: argparse.Namespace) -> Iterator[tuple[bytes, Node]]:
    top = find(fs, path)
    if top.kind is not Kind.DIRECTORY:
        yield top.name, top
    elif args.recursive:
        for names, node in walk(fs, top, args.max_files):
            yield b"/".join(names), node
    else:
        for node in sorted(fs.children(top), key=lambda each: each.name):
            yield node.name, node


def _name(fs: Filesystem, name: bytes, node: Node) -> str:
    target = _target(fs, node)
    return escaped(name) + ("" if target is None else f" -> {escaped(target)}")


def _target(fs: Filesystem, node: Node) -> bytes | None:
    try:
        return fs.link(node) if node.kind is Kind.LINK else None
    except Unreadable:
        return None


def _object(fs: Filesystem, name: bytes, node: Node) -> dict[str, Any]:
    found = {
        "path": name.decode("utf-8", "surrogateescape"),
        "type": node.kind.name.lower(),
        "size": node.size,
        "mode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
        "links": node.links,
        "mtime-sec": node.mtime // 10**9,
        "mtime-nsec": node.mtime % 10**9,
        "inode": node.key[1],
    }
    target = _target(fs, node)
    if target is not None:
        found["target"] = target.decode("utf-8", "surrogateescape")
    return found
