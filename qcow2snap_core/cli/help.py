"""Show what the commands are, or how one of them is used: the same as --help."""

from __future__ import annotations

import argparse

HELP = "show how a command is used"
EXAMPLE = "qcow2snap help copy"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "command", metavar="COMMAND", nargs="?", help="a command; if omitted, all are listed"
    )


def run(args: argparse.Namespace) -> int:
    parsers: dict[str, argparse.ArgumentParser] = args.parsers
    if args.command is None:
        args.whole.print_help()
    elif args.command in parsers:
        parsers[args.command].print_help()
    else:
        args.usage_error(f"give one of {', '.join(parsers)}")
    return 0
