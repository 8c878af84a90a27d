"""A stand-in for the real module, which is being written: right, but it over-lists and is slow."""

from __future__ import annotations

from collections.abc import Iterator

from .disk import ALLOCATED, HOLE_ZERO, Disk, Extent


def differences(image: object, old: Disk, new: Disk) -> Iterator[Extent]:
    a = iter(old.pieces(0, old.size)) if old.size else iter(())
    o = next(a, None)
    for p in new.pieces(0, new.size):
        at, end = p.offset, p.offset + p.length
        while at < end:
            while o is not None and o.offset + o.length <= at:
                o = next(a, None)
            if o is None:
                yield Extent(at, end - at, p.type)
                break
            n = min(end, o.offset + o.length) - at
            if p.type == o.type == HOLE_ZERO or (
                p.type == o.type == ALLOCATED
                and p.host is not None
                and o.host is not None
                and p.host + at - p.offset == o.host + at - o.offset
            ):
                pass
            else:
                yield Extent(at, n, p.type)
            at += n
