"""A file with the RAM of a saved machine, for programs that look into memory.

Raw, it is what the machine's processors could address, from 0 on: what is no RAM, like the hole
below 4 GiB, is a hole in the file and reads as zeros.  As ELF it has the RAM alone, in segments
that know their addresses.  Zero pages take no space in either.

The pages come in the order in which QEMU sent them; a page that comes again replaces what was
written of it.  None may be missing.  The file gets its name when all is there.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Final, NamedTuple

from ..errors import ImageError, UsageError, shown
from ..format import ondisk as q
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.image import Image
from ..memory.acpi import AcpiTables
from ..memory.blocks import PAGE, Block, Run
from ..memory.cmos import find_end, read_cmos
from ..memory.elf import elf_header
from ..memory.places import ABOVE_1T, ABOVE_4G, Layout, Placed, Wish, layout
from ..memory.savedram import SavedRam
from ..memory.sent import Sent
from ..memory.stream import Stream
from ..storage.libnbd import is_uri
from ..util.interrupts import raise_if_interrupted
from ..util.progress import progress
from ..util.units import binary
from .job import Warn, warn_of_encryption
from .judge import Kind, Place
from .mover import THREADS, THREADS_REMOTE, between, count, ordered
from .outputs import output, permissions
from .rawfile import give_size, opened
from .room import check_space
from .targets import RawTarget

MEMORY_TARGETS: Final = Kind.FILE
FORMS: Final = ("raw", "elf")
_ELF: Final = ".elf"


def form_of_memory(target: str) -> str:
    """The form that a file of that name has."""
    return "elf" if target.lower().endswith(_ELF) else "raw"


class Memory(NamedTuple):
    """What was written."""

    machine: str | None  # its type
    blocks: Sequence[Block]
    placed: Sequence[Placed]
    data: int  # bytes that are not zero pages

    def __str__(self) -> str:
        of = self.machine or "a machine"
        total = sum(place.length for place in self.placed)
        return f"{binary(total)} of memory of {of}, {binary(self.data)} of it in pages with data"


class _Shape(NamedTuple):
    """What a file is made of."""

    header: bytes
    offsets: Sequence[int]  # in the file, of each place
    size: int


def save_memory(
    image: Image, snapshot: Snapshot, place: Place, form: str, wish: Wish, warn: Warn
) -> Memory:
    """Write the RAM in the VM state of a snapshot to the file ``place``.

    ``form`` is one of FORMS.  Raises UsageError before anything is written when that cannot be
    done; ImageError for what is damaged, missing, or not understood; what :meth:`.Disk.pread_into`
    raises, and StorageError when the file cannot be written.
    """
    place.ensure_apart(image.files)
    threads = THREADS_REMOTE if is_uri(image.path) else THREADS
    name = place.name
    state = _all_that_may_be(image, snapshot)

    def pieces(start: int, end: int) -> Generator[memoryview, None, None]:
        return ordered(state, lambda: between(state, start, end), threads)

    with closing(Stream(state.name, snapshot.vm_state_size, state.size, pieces)) as stream:
        saved = SavedRam(stream)
        memory = layout(saved.machine, saved.blocks, wish)
        shape = _shape(form, memory.placed)
        if wish.below_4g is None:
            size: int | None = snapshot.vm_state_size
            if saved.end is not None:
                size = find_end(state.pread, saved.end, state.size)
            _ask_machine(state, size, memory, warn)
        warn_of_encryption(image, warn)
        with output(name, most=permissions(image.files), replace=place.replace) as part:
            needed = count(lambda: between(state, 0, stream.size)).data
            check_space(os.path.dirname(part), needed, f"writing {shown(name)}")
            with opened(part) as fd:
                give_size(name, fd, shape.size)
                tables = AcpiTables(saved.blocks)
                written = _write(saved, memory.placed, shape, stream, RawTarget(name, fd), tables)
            if not memory.is_sure:
                _ask_tables(tables, memory, warn)
    return Memory(saved.machine, saved.blocks, memory.placed, written)


def _all_that_may_be(image: Image, snapshot: Snapshot) -> Disk:
    """The VM state, and what the snapshot's tables have behind it: its recorded size counts the
    bytes that were written, and not where (:meth:`.Stream.seek`)."""
    state = image.disk(snapshot, vm_state=True)
    reach = state.tables.l1_size * state.tables.bytes_per_l1_entry - state.base
    if not snapshot.vm_state_size < reach <= q.MAX_DISK_SIZE:
        return state
    more = snapshot._replace(vm_state_size=reach)
    return image.disk(more, vm_state=True, guard=image.guard([snapshot]))


def _shape(form: str, placed: Sequence[Placed]) -> _Shape:
    header, offsets = b"", [place.address for place in placed]
    if form == "elf":
        header, offsets = elf_header(placed)
    return _Shape(header, offsets, offsets[-1] + placed[-1].length)


def _ask_machine(state: Disk, size: int | None, memory: Layout, warn: Warn) -> None:
    """Raises UsageError when the machine itself says that its memory lies elsewhere.  ``size`` is
    that of its state, if that is known."""
    below, above = memory.below_4g, memory.above_4g
    said = None if size is None else read_cmos(state.pread, size)
    if said is None:
        warn(
            f"the state does not say how much of the memory lay below 4 GiB: {binary(below)} is "
            f"what the type of its machine has, unless max-ram-below-4g was given to QEMU"
        )
    elif not said.agrees(below, above):
        raise UsageError(
            f"of the memory {binary(below)} should lie below 4 GiB and {binary(above)} above, but "
            f"the machine's CMOS says {binary(said.below_4g)} and {binary(said.above_4g)}: add "
            f"--below-4g with what its max-ram-below-4g was, or {below} if it had none"
        )


def _ask_tables(tables: AcpiTables, memory: Layout, warn: Warn) -> None:
    """Raises UsageError when the memory above 4 GiB was not there, as has been assumed."""
    said = tables.above_4g(memory.above_4g)
    if said is None:
        warn(
            f"the state does not say whether the {binary(memory.above_4g)} above 4 GiB were at "
            f"{ABOVE_4G:#x}, as in most machines: if the processor was AMD's, and maxmem or the "
            f"PCI hole reached 1010 GiB, add --above-4g {ABOVE_1T:#x}"
        )
    elif said != ABOVE_4G:
        raise UsageError(
            f"the machine had the memory above 4 GiB at {said:#x}, as its ACPI tables say: add "
            f"--above-4g {said:#x}"
        )


def _write(
    saved: SavedRam,
    placed: Sequence[Placed],
    shape: _Shape,
    stream: Stream,
    target: RawTarget,
    tables: AcpiTables,
) -> int:
    """Write the file; returns the bytes in pages that are not zero."""
    target.write(memoryview(shape.header), 0)
    sent = {place.block: Sent(saved.blocks[place.block]) for place in placed}
    with progress("copying", stream.size) as bar:
        before = 0
        for run in saved.runs():
            raise_if_interrupted()
            bar(stream.offset - before)
            before = stream.offset
            tables.note(run)
            if run.block not in sent:
                continue
            again = sent[run.block].note(run)
            for part, at in _parts(run, placed, shape.offsets):
                if part.data is not None:
                    target.write(memoryview(part.data), at)
                    target.wrote(at, part.length)
                elif again:
                    target.zero(at, part.length)
        _check_all_there(sent, saved.blocks, stream)
        bar.now("waiting for the disk")
        target.flush()
    return sum(each.data for each in sent.values())


def _parts(run: Run, placed: Sequence[Placed], offsets: Sequence[int]) -> Iterator[tuple[Run, int]]:
    """What of the run goes to one place, and to which offset of the file."""
    for place, at in zip(placed, offsets, strict=True):
        first = max(run.offset, place.offset)
        end = min(run.offset + run.length, place.offset + place.length)
        if place.block == run.block and first < end:
            data = None if run.data is None else run.data[first - run.offset : end - run.offset]
            yield Run(run.block, first, end - first, data), at + first - place.offset


def _check_all_there(sent: Mapping[int, Sent], blocks: Sequence[Block], stream: Stream) -> None:
    for n, each in sent.items():
        if (missing := each.missing()) is not None:
            count, first = missing
            raise ImageError(
                f"{stream.name} lacks {count} of the {blocks[n].size // PAGE} pages of RAM block "
                f"{shown(blocks[n].name)}, the first at {first:#x}"
            )
