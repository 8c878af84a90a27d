"""The rooms of the package lie one above the other: each imports from those below it alone."""

from __future__ import annotations

import ast
from pathlib import Path

import qcow2snap_core

PACKAGE = Path(qcow2snap_core.__file__).parent
# From the top down; what stands together has no business with each other.
FLOORS = [
    {"__main__"},
    {"cli", "library"},
    {"fuse"},
    {"transfer", "host", "serve", "files"},
    {"tables", "memory"},
    {"image"},
    {"decode"},
    {"format"},
    {"storage"},
    {"util", "_native"},
    {"errors"},
    {"typed"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(file: Path) -> set[str]:
    """Those that a file names in an import, wherever in it."""
    here = ("qcow2snap_core", *file.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            found.add(base[1] or node.names[0].name)
    return found - {"__version__"}


def test_no_room_imports_from_one_above_or_beside_it() -> None:
    seen = set()
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":  # the front door
            seen.add(room)
            for other in rooms_imported(file) - {room}:
                assert FLOOR[other] > FLOOR[room], f"{file.relative_to(PACKAGE)} imports {other}"
    assert seen == set(FLOOR)


def test_a_room_s_own_file_says_what_it_is_for_and_nothing_else() -> None:
    for file in PACKAGE.glob("*/__init__.py"):
        body = ast.parse(file.read_text()).body
        assert ast.get_docstring(ast.Module(body, [])), file
        assert len(body) == 1 or file.parent.name == "cli", file
