"""The writes that QEMU makes for a guest and its snapshots, as a list.

:class:`Qemu` mirrors the functions of QEMU 7.2 that its methods name, as far as they write what a
snapshot consists of; where the first free cluster is matters as well, since it decides what is
overwritten when.  The image is one that qemu-img created, and what becomes of it can be given back
to QEMU (:meth:`Qemu.image`).
"""

from __future__ import annotations

import random
import struct
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from support import qemu

from qcow2snap_core.format.snapshots import Identity

CLUSTER = 512
SIZE = 64 << 10  # of the disk: two L2 tables
GUEST = (0, 1, 2, 64)  # the guest clusters that are written, of two L2 tables
COPIED = 1 << 63
NAMES = ("a", "b", "longer " * 60, "twice " * 140)  # a table of one cluster, of two, of three


class Write(NamedTuple):
    """A write to the file; a flush of all before it if it has no data."""

    offset: int = 0
    data: bytes = b""
    operation: int = 0  # writes of one command have the same number
    listed: frozenset[Identity] | None = None  # by the header that this is


@dataclass(frozen=True)
class Snapshot:
    """An entry of the table, and what the guest saw then."""

    id: int
    name: str
    time: int
    l1: int
    extra: int  # bytes of extra data
    content: dict[int, bytes]

    @property
    def identity(self) -> Identity:
        return Identity(str(self.id), self.name, 1, self.time, self.time, self.l1, 2)

    def fields(self) -> list[bytes]:
        """The pieces that qcow2_write_snapshots writes."""
        id_, name = str(self.id).encode(), self.name.encode()
        extra = struct.pack(">QQQ", 0, SIZE, (1 << 64) - 1)[: self.extra]
        head = start_of_entry(self.identity) + struct.pack(">II", 0, self.extra)
        return [head, extra, id_, name + bytes(-len(head + extra + id_ + name) % 8)]


def start_of_entry(s: Identity) -> bytes:
    """As far as it tells a snapshot from all others."""
    lengths = len(s.id.encode()), len(s.name.encode())
    times = s.date_sec, s.date_nsec, s.vm_clock_nsec
    return struct.pack(">QIHHIIQ", s.l1_table_offset, s.l1_size, *lengths, *times)


@cache
def created() -> bytes:
    """An empty image."""
    with tempfile.TemporaryDirectory() as directory:
        path = qemu.create(Path(directory) / "disk.qcow2", SIZE, cluster_size=CLUSTER)
        return path.read_bytes()


class Qemu:
    """The image as it is after all writes so far."""

    def __init__(
        self, rng: random.Random, discard: bool = False, first_fit: bool = True, first: int = 0
    ) -> None:
        """``discard``: clusters that are freed become zeros.  Without ``first_fit`` clusters are
        taken from anywhere, as a QEMU of another version might.  Those before the ``first`` one
        are taken already."""
        self.file = bytearray(created())
        self.writes: list[Write] = []
        self.snapshots: list[Snapshot] = []
        self.known: dict[Identity, dict[int, bytes]] = {}  # content of all there ever were
        self.guest: dict[int, bytes] = {}  # guest cluster -> content
        self._rng, self._discard, self._first_fit = rng, discard, first_fit
        self._operation = self._time = self._next_free = 0
        self._l1 = self._number(40)
        block = self._number(self._number(48))
        self._block = block
        self._refs = list(struct.unpack(">256H", self.file[block : block + CLUSTER]))
        self._refs[:first] = [refs or 1 for refs in self._refs[:first]]
        self._table = 0, 0  # offset and bytes

    # --- Commands ---

    def write(self, cluster: int, content: bytes) -> None:
        """A guest's write of a whole cluster (handle_copied, handle_alloc, l2_allocate)."""
        self._operation += 1
        at = self._l1 + cluster // 64 * 8
        entry = self._number(at)
        if not entry & COPIED:
            new = self._allocate(CLUSTER)
            old = entry
            self._put(new, self.file[old : old + CLUSTER] if old else bytes(CLUSTER))
            self._put_number(at, new | COPIED)
            if old:
                self._free(old, CLUSTER)
        at = (self._number(at) & ~COPIED) + cluster % 64 * 8
        entry = self._number(at)
        if entry & COPIED:
            self._put(entry & ~COPIED, content)
        else:
            new = self._allocate(CLUSTER)
            self._put(new, content)
            self._put_number(at, new | COPIED)
            if entry:
                self._free(entry, CLUSTER)
        self.guest[cluster] = content

    def take(self, name: str, extra: int = 24) -> None:
        """qcow2_snapshot_create"""
        self._operation += 1
        self._time += 1
        copy = self._allocate(16)
        self._put(copy, self._active())
        self._flush()
        self._update_refcounts(self._l1, 1)
        self._flush()
        number = max([s.id for s in self.snapshots], default=0) + 1
        new = Snapshot(number, name, self._time, copy, extra, dict(self.guest))
        self._write_table([*self.snapshots, new])

    def delete(self, number: int) -> None:
        """qcow2_snapshot_delete"""
        self._operation += 1
        gone = self.snapshots[number]
        self._write_table([s for s in self.snapshots if s is not gone])
        self._update_refcounts(gone.l1, -1)
        self._free(gone.l1, 16)
        self._update_refcounts(self._l1, 0)
        self._flush()

    def rename(self, number: int, name: str) -> None:
        """No command of QEMU's: but a table in which one has another name is like any other."""
        self._operation += 1
        old = self.snapshots[number]
        self._write_table([replace(s, name=name) if s is old else s for s in self.snapshots])

    def apply(self, number: int) -> None:
        """qcow2_snapshot_goto"""
        self._operation += 1
        snapshot = self.snapshots[number]
        self._update_refcounts(snapshot.l1, 1)
        self._flush()
        old = self._active()
        self._put(self._l1, self.file[snapshot.l1 : snapshot.l1 + 16])
        self._flush()
        self._update_refcounts(self._l1, -1, old)
        self._update_refcounts(self._l1, 0)
        self._flush()
        self.guest = dict(snapshot.content)

    def image(self) -> bytes:
        """The file with its refcounts written: nobody but QEMU reads them here."""
        image = bytearray(self.file)
        image[self._block : self._block + CLUSTER] = struct.pack(">256H", *self._refs)
        return bytes(image).ljust(-(-len(image) // CLUSTER) * CLUSTER, b"\0")

    # --- What they are made of ---

    def _write_table(self, snapshots: list[Snapshot]) -> None:
        """qcow2_write_snapshots: a new table, flushed; the header, flushed; the old one freed."""
        if len(self.snapshots) <= len(snapshots):  # QEMU adds what old entries lack
            snapshots = [replace(s, extra=24) for s in snapshots[:-1]] + snapshots[-1:]
        entries = [s.fields() for s in snapshots]
        size = sum(len(field) for entry in entries for field in entry)
        table = at = self._allocate(size) if size else 0
        for field in (field for entry in entries for field in entry):
            self._put(at, field)
            at += len(field)
        self._flush()
        header = struct.pack(">IQ", len(snapshots), table)
        self._put(60, header, frozenset(s.identity for s in snapshots))
        self._flush()
        self._free(*self._table)
        self._table, self.snapshots = (table, size), snapshots
        self.known.update({s.identity: s.content for s in snapshots})

    def _update_refcounts(self, l1: int, addend: int, table: bytes | None = None) -> None:
        """qcow2_update_snapshot_refcount; COPIED is set or cleared in place where refcounts
        become or are no longer one.  ``table`` is the L1 where the file has it no more."""
        for n, entry in enumerate(struct.unpack(">2Q", table or self.file[l1 : l1 + 16])):
            l2 = entry & ~COPIED
            if not l2:
                continue
            for at in range(l2, l2 + CLUSTER, 8):
                data = self._number(at) & ~COPIED
                if data:
                    self._add(data, addend)
                    self._mark(at, data)
            self._add(l2, addend)
            if addend >= 0:
                self._mark(l1 + 8 * n, l2)
        self._discard_freed()

    def _mark(self, at: int, host: int) -> None:
        flag = COPIED if self._refs[host // CLUSTER] == 1 else 0
        if self._number(at) != host | flag:
            self._put_number(at, host | flag)

    def _allocate(self, size: int) -> int:
        """alloc_clusters_noref"""
        count = -(-size // CLUSTER)
        at = self._next_free
        if not self._first_fit:
            at = self._rng.randrange(1 + max(n for n, refs in enumerate(self._refs) if refs))
        while any(self._refs[at : at + count]):
            at += 1
        if self._first_fit:
            self._next_free = at + count
        for n in range(at, at + count):
            self._refs[n] += 1
        return at * CLUSTER

    def _free(self, offset: int, size: int) -> None:
        for at in range(offset, offset + size, CLUSTER):
            self._add(at, -1)
        self._discard_freed()

    _freed: tuple[int, ...] = ()

    def _add(self, host: int, addend: int) -> None:
        number = host // CLUSTER
        self._refs[number] += addend
        assert self._refs[number] >= 0
        if not self._refs[number]:
            self._next_free = min(self._next_free, number)
            self._freed += (host,)

    def _discard_freed(self) -> None:
        """qcow2_process_discards: after the refcounts have been changed."""
        for host in self._freed if self._discard else ():
            self._put(host, bytes(CLUSTER))
        self._freed = ()

    def _active(self) -> bytes:
        return bytes(self.file[self._l1 : self._l1 + 16])

    def _number(self, at: int) -> int:
        return int.from_bytes(self.file[at : at + 8], "big")

    def _put_number(self, at: int, value: int) -> None:
        self._put(at, value.to_bytes(8, "big"))

    def _put(self, offset: int, data: bytes, listed: frozenset[Identity] | None = None) -> None:
        if data:
            self.file.extend(bytes(max(0, offset - len(self.file))))
            self.file[offset : offset + len(data)] = data
            self.writes.append(Write(offset, bytes(data), self._operation, listed))

    def _flush(self) -> None:
        self.writes.append(Write(operation=self._operation))


Command = tuple[str, int | str]


def do(qemu: Qemu, rng: random.Random, commands: list[Command]) -> None:
    """Do these things."""
    for name, what in commands:
        rest = (rng.randbytes(8) * (CLUSTER // 8),) if name == "write" else ()
        getattr(qemu, name)(what, *rest)


def some(qemu: Qemu, rng: random.Random, count: int, names: tuple[str, ...], most: int) -> None:
    """Do so many things at random, with snapshots of these names, and at most so many of them."""
    for _ in range(count):
        there = len(qemu.snapshots)
        kinds = ["take"] * 2 * (there < most) + ["write"] * 2
        if there:
            kinds += ["delete"] * (2 if there < most else 4) + ["apply", "rename"] * (
                rng.random() < 0.3
            )
        kind = rng.choice(kinds)
        if kind == "take":
            qemu.take(rng.choice(names), rng.choice((24, 24, 16, 0)))
        elif kind == "write":
            for cluster in rng.sample(GUEST, rng.randrange(1, 4)):
                qemu.write(cluster, rng.randbytes(8) * (CLUSTER // 8))
        elif kind == "rename":
            qemu.rename(rng.randrange(there), rng.choice(names))
        else:
            getattr(qemu, kind)(rng.randrange(there))
