"""``diff --files``: a letter and a path for each file that changed."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import escaped
from ..files.compare import Change, compare
from .common import open_from, print_json
from .guest import filesystem

_LETTERS = {"added": "A", "removed": "D", "content": "M", "metadata": "m"}


def run_files(args: argparse.Namespace) -> int:
    """Print the changes; the exit status is 0 whether or not there are any, as of ``diff``."""
    with open_from(args) as image:
        old, new = (filesystem(image, name, args) for name in (args.old, args.new))
        found = compare((old, old.root()), (new, new.root()), content=args.content)
        if args.json:
            print_json(_object(change) for change in found)
        else:
            for change in found:
                fields = f"  ({', '.join(change.fields)})" if change.fields else ""
                print(f"{_LETTERS[change.change]} /{escaped(change.path)}{fields}")
    return 0


def _object(change: Change) -> dict[str, Any]:
    return {
        "path": "/" + change.path.decode("utf-8", "surrogateescape"),
        "change": change.change,
        "type": change.kind.name.lower(),
        "fields": list(change.fields),
    }
