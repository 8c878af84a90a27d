"""The command ``qcow2snap``: one module per sub-command, each thin.

A command module has ``HELP`` (a line), ``EXAMPLE`` (a command that works), ``arguments`` (adds
them to its parser) and ``run`` (does it and returns the exit status; ``args.usage_error`` ends it
with a line and the status of those).  This file only finds the
module, and turns errors into one line and a status: 0 done, 1 an error, 2 a usage error, 3 what
``check`` found, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise

from .. import __version__
from .._native.loaded import ENGINE
from ..errors import Error, reason
from ..util.interrupts import Interrupted, ending
from .parser import Parser
from .streams import OUTPUT_NAMES, OutputLost, failed, give_up_output, say, settle_errors, take

COMMANDS = (
    "list",
    "map",
    "diff",
    "check",
    "take",
    "prune",
    "copy",
    "compact",
    "backup",
    "restore",
    "verify",
    "split",
    "join",
    "mount",
    "serve",
    "ls",
    "cat",
    "extract",
    "memory",
    "help",
)

#: Those that do something; what the others print is what they are called for.
_DOING = (
    *("prune", "copy", "compact", "backup", "restore", "split", "join", "mount", "serve"),
    *("extract", "memory"),
)

#: The statuses of what was printed whole: done, and what ``check`` and ``verify`` found.
_WITH_OUTPUT = (0, 3)


def command() -> int:
    """What is installed as ``qcow2snap``: :func:`main` in a process of its own."""
    take(reports_only=_only_reports(sys.argv[1:]))
    with ending():
        try:
            status = main()
        finally:
            settle_errors()
    # All is done: a late Ctrl-C ends Python at once, instead of in the middle of its own clean-up.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def _only_reports(argv: Sequence[str]) -> bool:
    """Whether what a command line prints is less than what it is for."""
    if not argv:
        return False
    written = any(
        word in OUTPUT_NAMES and not before.startswith("--passphrase")
        for before, word in pairwise(argv)
    )
    return argv[0] in _DOING and not written and not {"-h", "--help", "--dry-run"} & set(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if none is given); returns the exit status."""
    status = _run(sys.argv[1:] if argv is None else argv)
    try:
        sys.stdout.flush()
    except OutputLost as e:
        if status in _WITH_OUTPUT:
            return _lost(e)
        give_up_output()  # the error or the signal that ended it is what counts
    return status


def _run(argv: Sequence[str]) -> int:
    try:
        args = whole_parser(_needed(argv)).parse_args(argv)
        status: int = args.run(args)
        return status
    except SystemExit as e:  # of argparse: help, version, or a usage error that it has printed
        return int(e.code or 0)
    except Error as e:
        return _fail(str(e))
    except ModuleNotFoundError as e:
        if e.name != "construct":  # all others are optional, and asked for where they are used
            raise
        return _fail("Python's module construct is missing: install python3-construct")
    except Interrupted as e:
        return e.status
    except KeyboardInterrupt:
        return 130
    except OutputLost as e:
        return _lost(e)
    except OSError as e:
        return _fail(failed(e))


def _lost(e: OutputLost) -> int:
    give_up_output()
    # Whoever closed a pipe has seen enough.
    return 1 if e.errno == errno.EPIPE else _fail(f"write error: {reason(e)}")


def _fail(message: str) -> int:
    say(message)
    return 1


def _needed(argv: Sequence[str]) -> Sequence[str]:
    """The commands whose modules a command line takes: to import all of them takes longer than
    most commands, and only help and complaints are about all."""
    if argv[:1] in (["--version"], ["-V"]):
        return ()
    return argv[:1] if argv and argv[0] in COMMANDS and argv[0] != "help" else COMMANDS


def whole_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    parser = Parser(
        prog="qcow2snap",
        description="List, compare, copy, serve and back up internal snapshots of qcow2 images.",
    )
    engine = "no" if ENGINE is None else "yes"
    version = f"qcow2snap {__version__} (native engine: {engine})"
    parser.add_argument("-V", "--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in names:
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(command)
        command.set_defaults(run=module.run, usage_error=command.error)
        command.set_defaults(parsers=commands.choices, whole=parser)
    return parser
