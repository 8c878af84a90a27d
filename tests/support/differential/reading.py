"""Comparisons of what is read: bytes, extents, maps, differences, the list, VM states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from qcow2snap_core.image.disk import Disk
from qcow2snap_core.image.image import Image
from qcow2snap_core.image.layers import RawLayer
from support import qemu

from .world import Different, State, Unavailable, World, same

DATA, ZERO = 0, 3
EITHER = 1  # data that is zeros
_RANGES = 25
_PAIRS = 8
_WRONG = bytes(b ^ 0xFF for b in range(256))  # another byte for each


def reads(world: World, rng: random.Random) -> None:
    """The whole disk in random pieces, then random ranges."""
    with world.open(rng=rng) as image:
        for state in world.states:
            disk = world.disk(image, state)
            if disk.size != state.size:
                raise Different(f"{state.name} has {disk.size} bytes, {state.size} by QEMU")
            same(state.name, whole(disk, rng), state.content)
            for offset, length in ranges(rng, disk.size):
                ours = read(disk, length, offset)
                same(f"{state.name} at {offset:#x}", ours, state.content[offset : offset + length])


def whole(disk: Disk, rng: random.Random) -> bytes:
    step = rng.choice((4096 + 512, 64 << 10, 100_001, 2 << 20))
    return b"".join(read(disk, min(step, disk.size - at), at) for at in range(0, disk.size, step))


def read(disk: Disk, length: int, offset: int) -> bytes:
    """Into a buffer that is not zeros, as a server's may be."""
    buffer = bytearray(b"\xaa" * length)
    disk.pread_into(buffer, offset)
    return bytes(buffer)


def ranges(rng: random.Random, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length), some of the length 0."""
    for _ in range(_RANGES):
        offset = rng.randrange(size)
        yield offset, rng.randrange(min(size - offset, rng.choice((600, 70_000, size))) + 1)


# --- Extents ---


def extents(world: World, rng: random.Random) -> None:
    """QEMU's map, whole and in random ranges."""
    with world.open(rng=rng) as image:
        for state in world.states:
            disk = world.disk(image, state)
            theirs = types(state)
            ours = expanded(all_extents(disk), state.size)
            for n, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
                if mine == its or (mine, its) == (DATA, EITHER):
                    continue
                if {mine, its} != {DATA, ZERO} or not _settles(image, state, n):
                    raise Different(f"{state.name}: type {mine} at {512 * n:#x}, {its} by QEMU")
            for offset, length in ranges(rng, disk.size):
                compare_range(disk, state.name, offset, length, ours)


def _settles(image: Image, state: State, sector: int) -> bool:
    """Whether zeros may be a hole of a raw file below: what was zeroed by the kernel is data for as
    long as its pages have not been written, so that two who ask at two moments hear two things."""
    raw = any(isinstance(layer, RawLayer) for _, layer in image.chain)
    return raw and not any(state.content[512 * sector : 512 * (sector + 1)])


def types(state: State) -> bytes:
    """A byte for each sector, by QEMU.

    Where an image looks preallocated to QEMU (more clusters in use than the file takes on its
    disk), it looks for holes in the file behind data clusters, and calls them zero.  This program
    looks into tables alone and calls them data.
    """
    kinds = {(True, False): DATA, (False, True): ZERO, (True, True): EITHER}
    pieces = ((e["start"], e["length"], kinds[e["data"], e["zero"]]) for e in state.map)
    return expanded(pieces, state.size)


def expanded(pieces: Any, size: int) -> bytes:
    """A byte with the type for each sector; the pieces have to cover the disk."""
    found = bytearray()
    for offset, length, kind in pieces:
        if offset != 512 * len(found) or length % 512 or length <= 0:
            due = 512 * len(found)
            raise Different(f"an extent of {length} bytes at {offset:#x}, due at {due:#x}")
        found += bytes((kind,)) * (length // 512)
    if 512 * len(found) != size:
        raise Different(f"the extents end at {512 * len(found):#x}, the disk at {size:#x}")
    return bytes(found)


def all_extents(disk: Disk) -> Iterator[tuple[int, int, int]]:
    at = 0
    while at < disk.size:
        for extent in disk.extents(at, disk.size - at):
            yield extent
            at = extent.offset + extent.length


def compare_range(disk: Disk, name: str, offset: int, length: int, sectors: bytes) -> None:
    """The extents of a range, of any bytes, are those of the whole."""
    at = offset
    for extent in disk.extents(offset, length):
        end = extent.offset + extent.length
        expected = sectors[extent.offset // 512 : -(-end // 512)]
        if extent.offset != at or end > offset + length or set(expected) != {extent.type}:
            raise Different(f"{name}: {extent} in a range of {length} bytes at {offset:#x}")
        at = end
    if length and at == offset:
        raise Different(f"{name}: no extent in a range of {length} bytes at {offset:#x}")


# --- map ---


def maps(world: World, rng: random.Random) -> None:
    """Types as of the extents, and where in the file everything is."""
    for state in world.states:
        found = world.json("map", world.path, state.name)
        kinds = expanded(((e["offset"], e["length"], e["type"]) for e in found), state.size)
        with world.open() as image:
            if kinds != expanded(all_extents(world.disk(image, state)), state.size):
                raise Different(f"map {state.name}: other types than the extents'")
        ours, theirs = hosts(found, "offset", "host"), hosts(_data(state), "start", "offset")
        for n in sorted(ours.keys() | theirs.keys()):
            if ours.get(n) == theirs.get(n):
                continue
            if n in ours and n not in theirs and (world.encrypted or _packed(state, n)):
                continue  # QEMU does not say where a compressed cluster is, nor an encrypted one
            if n in ours and 512 * n < state.size and _hole(state, n):
                continue  # preallocated
            raise Different(
                f"map {state.name}: {512 * n:#x} is at host offset {ours.get(n)}, "
                f"{theirs.get(n)} by QEMU"
            )


def _data(state: State) -> Iterator[dict[str, Any]]:
    return (e for e in state.map if e["depth"] == 0 and e["data"] and not e["zero"])


def hosts(pieces: Any, start: str, host: str) -> dict[int, int]:
    """{sector: host offset}."""
    found = {}
    for e in pieces:
        if host in e:
            for n in range(e["length"] // 512):
                found[e[start] // 512 + n] = e[host] + 512 * n
    return found


def _at(state: State, sector: int) -> dict[str, Any]:
    offset = 512 * sector
    return next(e for e in state.map if e["start"] <= offset < e["start"] + e["length"])


def _packed(state: State, sector: int) -> bool:
    e = _at(state, sector)
    return e["data"] and e["depth"] == 0 and "offset" not in e


def _hole(state: State, sector: int) -> bool:
    e = _at(state, sector)
    return e["zero"] and e["data"]


# --- diff ---


def differences(world: World, rng: random.Random) -> None:
    """Old with the difference put over it is new, and nothing is listed that both share."""
    pairs = list(permutations(world.states, 2))
    for old, new in rng.sample(pairs, min(_PAIRS, len(pairs))):
        what = f"diff {old.name} {new.name}"
        tail = new.content[old.size :].translate(_WRONG)  # until it is listed
        patched = bytearray(old.content[: new.size] + tail)
        shared = hosts(_data(old), "start", "offset").items()
        shared &= hosts(_data(new), "start", "offset").items()
        sectors = {sector for sector, _ in shared}
        at = 0
        for e in world.json("diff", world.path, old.name, new.name):
            start, end = e["offset"], e["offset"] + e["length"]
            if start < at or end <= start or end > new.size:
                raise Different(f"{what}: {e} after {at:#x}, of {new.size:#x} bytes")
            if not sectors.isdisjoint(range(start // 512, end // 512)):
                raise Different(f"{what}: {e} lists what lies at one place in the file")
            zero = {DATA: False, ZERO: True}[e["type"]]
            patched[start:end] = bytes(end - start) if zero else new.content[start:end]
            at = end
        same(what, bytes(patched), new.content)


# --- list ---


def listed(world: World, rng: random.Random) -> None:
    """The names, sizes and dates that qemu-img info gives."""
    theirs = qemu.info(world.path).get("snapshots", [])
    ours = world.json("list", world.path)
    if len(ours) != len(theirs):
        raise Different(f"list: {len(ours)} snapshots, {len(theirs)} by QEMU")
    for mine, its in zip(ours, theirs, strict=True):
        for key in its:
            if mine.get(key) != its[key]:
                raise Different(f"list: {key} is {mine.get(key)!r}, {its[key]!r} by QEMU")
    for mine, state in zip(ours, world.states, strict=False):
        if mine["disk-size"] != state.size:
            raise Different(f"list: disk-size {mine['disk-size']}, {state.size} by QEMU")


# --- VM states ---


def vm_states(world: World, rng: random.Random) -> None:
    """What QEMU reads behind the disk when it is made larger."""
    states = [s for s in world.states if s.snapshot is not None and s.snapshot.vm_state_size]
    if not states:
        raise Unavailable("no VM state")
    with world.open() as image:
        for state in states:
            assert state.snapshot is not None
            disk = image.disk(state.snapshot, vm_state=True)
            theirs = world.vm_state(world.path, state.snapshot)
            same(f"VM state of {state.name}", whole(disk, rng), theirs)
