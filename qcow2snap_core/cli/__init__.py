"""The command ``qcow2snap``: one module per sub-command, each thin.

A command module has ``HELP`` (a line), ``EXAMPLE`` (a command that works), ``arguments`` (adds
them to its parser) and ``run`` (does it and returns the exit status).  This file only finds the
module, and turns errors into one line and a status: 0 done, 1 an error, 2 a usage error, 3 what
``check`` found, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import Error, escaped, reason
from ..native import ENGINE

COMMANDS = ("list", "map", "diff", "check", "take", "copy", "split", "join", "mount", "serve")


def command() -> int:
    """What is installed as ``qcow2snap``: :func:`main` in a process of its own."""
    status = main()
    # All is done: a late Ctrl-C ends Python at once, instead of in the middle of its own clean-up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if none is given); returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except Error as e:
        return _fail(str(e))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever was reading has seen enough; Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        where = f"{escaped(str(e.filename))}: " if e.filename else ""
        return _fail(f"{where}{reason(e)}")


def _fail(message: str) -> int:
    print(f"qcow2snap: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qcow2snap",
        description="List, compare, check and convert the internal snapshots of qcow2 images.",
    )
    engine = "no" if ENGINE is None else "yes"
    version = f"qcow2snap {__version__} (native engine: {engine})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(command)
        command.set_defaults(run=module.run)
    return parser
