"""A disk with sectors that cannot be read: nbdkit's ddrescue filter over the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.remote import Remote, remote

SECTOR = 512


@contextmanager
def bad_sectors(path: Path, bad: Iterable[tuple[int, int]], *filters: str) -> Iterator[Remote]:
    """The file on an NBD server, EIO for these ranges of it (offset, length); ``filters`` are
    further ones in front of that, with their parameters."""
    at, lines = 0, ["# Mapfile. Created by GNU ddrescue version 1.27", "0x0  +  1"]
    for offset, length in sorted(bad):
        lines += [f"{at:#x}  {offset - at:#x}  +"] * (offset > at)
        lines.append(f"{offset:#x}  {length:#x}  -")
        at = offset + length
    lines += [f"{at:#x}  {path.stat().st_size - at:#x}  +"]
    with tempfile.TemporaryDirectory() as directory:
        mapfile = Path(directory, "map")
        mapfile.write_text("\n".join(lines) + "\n")
        names = [word for word in filters if word.startswith("--")]
        keys = [word for word in filters if not word.startswith("--")]
        with remote(
            *names, "--filter=ddrescue", "file", path, f"ddrescue-mapfile={mapfile}", *keys
        ) as server:
            yield server
