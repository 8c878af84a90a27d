"""Show what the commands are, or how one of them is used: what --help shows."""

from __future__ import annotations

import argparse

HELP = "how a command is used"
EXAMPLE = "qcow2snap help copy"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="without, all of them")


def run(args: argparse.Namespace) -> int:
    parsers: dict[str, argparse.ArgumentParser] = args.parsers
    if args.command is None:
        args.whole.print_help()
    elif args.command in parsers:
        parsers[args.command].print_help()
    else:
        args.usage_error(f"give one of {', '.join(parsers)}")
    return 0
