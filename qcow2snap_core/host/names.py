"""What QEMU makes of the names and IDs in a snapshot table.

An entry of the table can hold any bytes.  QEMU compares them as strings of C, up to the first NUL,
and writes no more of them when it writes the table anew; its list of snapshots
(``QEMUSnapshotInfo``), in which it looks first and which it shows, has even less of a long one.  So
two that differ here may be one there.
"""

from __future__ import annotations

from typing import Final

from ..format.snapshots import Identity, Snapshot

#: bytes that the list has of each, ``char name[256]`` and ``char id_str[128]`` without their NUL
LONGEST: Final = {"name": 255, "id": 127}


def seen(word: str) -> bytes:
    """What QEMU compares of a word in an entry, whatever this system's encoding is."""
    return word.encode("utf-8", "surrogateescape").partition(b"\0")[0]


def listed(key: str, word: str) -> str:
    """What QEMU's list has of a word; ``key`` is name or id."""
    return seen(word)[: LONGEST[key]].decode("utf-8", "surrogateescape")


def rewritten(identity: Identity) -> Identity:
    """The same snapshot's, once QEMU has written the table."""
    id_, name = (seen(w).decode("utf-8", "surrogateescape") for w in (identity.id, identity.name))
    return identity._replace(id=id_, name=name)


def fits(key: str, word: str) -> bool:
    """Whether the list has all of it."""
    return listed(key, word) == word


def is_found(snapshot: Snapshot, key: str, word: str) -> bool:
    """Whether a QEMU that looks for a word may stop at this snapshot."""
    has = getattr(snapshot, key)
    return seen(word) in (seen(has), seen(listed(key, has)))
