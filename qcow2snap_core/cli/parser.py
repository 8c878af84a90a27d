"""The command line's parser: argparse, but no line of it repeats what a user typed.

What follows a misspelt option may be a passphrase, and error lines end up in logs.  So options
are never abbreviated, and an error names the option that is unknown or wrong, never a value.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NoReturn, TypeVar

from ..errors import UsageError, escaped
from ..util.spelling import nearest
from ..util.units import parse_seconds, parse_size
from .streams import say

# A word that is "--" itself, behind the one that ends the options: argparse (3.11) drops that too.
# No word of a command line can hold a NUL.
_DASHES = "\0--"

_T = TypeVar("_T")

_PASSPHRASE = re.compile(r"--(passphrase\.[1-9][0-9]{0,3})(?:=.*)?", re.ASCII | re.DOTALL)


class Parser(argparse.ArgumentParser):
    """Errors are one line, with status 2; ``--passphrase.N`` is there for every layer N."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        known = self._option_string_actions
        for word in args or ():
            layer = _PASSPHRASE.fullmatch(word)
            if layer and "--passphrase" in known and f"--{layer[1]}" not in known:
                dest = layer[1].replace(".", "_")
                self.add_argument(f"--{layer[1]}", dest=dest, help=argparse.SUPPRESS)
        if args is not None:
            args = self._in_order(self._with_values(_with_dashes(args)))
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:
            self._refuse(extra)
        return parsed, extra

    def _with_values(self, args: Sequence[str]) -> list[str]:
        """An option whose value may be left out takes the next word only if it is such a value:
        argparse would take a file's name as well."""
        found: list[str] = []
        for word in args:
            before = self._option_string_actions.get(found[-1]) if found else None
            if before and before.nargs == "?" and before.choices and word in before.choices:
                found[-1] += f"={word}"
            else:
                found.append(word)
        return [
            f"{word}={action.const}" if action and action.nargs == "?" else word
            for word, action in ((word, self._option_string_actions.get(word)) for word in found)
        ]

    def _in_order(self, args: Sequence[str]) -> list[str]:
        """Options first, where an argument may be left out: argparse (3.11) gives that up at the
        first option that stands before it, although it comes behind."""
        if not any(a.nargs == "?" for a in self._get_positional_actions()):
            return list(args)
        words = iter(args)
        options, arguments = [], []
        for word in words:
            if word == "--":
                arguments += [word, *words]
            elif not word.startswith("-") or word == "-":
                arguments.append(word)
            else:
                options.append(word)
                action = self._option_string_actions.get(word)
                if action is not None and action.nargs is None:
                    options += islice(words, 1)
        return options + arguments

    def _refuse(self, extra: Sequence[str]) -> NoReturn:
        options = [word.partition("=")[0] for word in extra if word.startswith("-")]
        if not options:
            self.error("more arguments than it takes")
        name = options[0] if options[0].startswith("--") else options[0][:2]
        meant = nearest(name, self._option_string_actions)
        self.error(
            f"unknown option {escaped(name)}" + (f" (did you mean {meant}?)" if meant else "")
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            meant = nearest(str(value), action.choices)
            perhaps = f" (did you mean {meant}?)" if meant else ""
            raise argparse.ArgumentError(
                action, f"give one of {', '.join(action.choices)}{perhaps}"
            )

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, "--" if arg_string == _DASHES else arg_string)
        except UsageError as e:
            raise argparse.ArgumentError(action, str(e)) from e
        except argparse.ArgumentError as e:
            raise argparse.ArgumentError(action, "give a whole number") from e

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(?s)ignored explicit argument .*", "takes no value", message)
        say(f"{escaped(message)}: {self.prog} --help says what there is")
        self.exit(2)


def value(parse: Callable[[str], _T], advice: str) -> Callable[[str], _T]:
    """The ``type`` of an option: ``parse``, whose UsageError or ValueError becomes an error of the
    command line that says what to give, in place of what was given."""

    def parsed(text: str) -> _T:
        try:
            return parse(text)
        except (UsageError, ValueError):
            raise UsageError(advice) from None

    return parsed


SIZE = value(parse_size, "give bytes, or a number with a unit, like 64M")
SECONDS = value(parse_seconds, "give seconds, more than 0, like 30 or 0.5")


def _with_dashes(args: Sequence[str]) -> list[str]:
    """The words, those that are ``--`` as a value out of argparse's sight."""
    end = args.index("--") if "--" in args else len(args)
    options = [re.sub(r"^(--[a-z.0-9-]+=)--$", rf"\1{_DASHES}", word) for word in args[:end]]
    rest = [_DASHES if word == "--" else word for word in args[end + 1 :]]
    return [*options, *args[end : end + 1], *rest]
