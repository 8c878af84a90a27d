"""What is noted of each cluster of a file: how often it is in use, or whose it is.

A file may have 2^40 clusters, most of which nobody mentions: so the notes are kept in pages of
machine integers, and a page is made when something is written in it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

_PAGE_BITS: Final = 12
PAGE: Final = 1 << _PAGE_BITS  # clusters
_MASK: Final = PAGE - 1


class _Pages(dict[int, "array[int]"]):
    """{number of a page: its integers}; a missing one is made of ``fill``."""

    def __init__(self, typecode: str, fill: int) -> None:
        super().__init__()
        self.empty = array(typecode, (fill,)) * PAGE

    def __missing__(self, number: int) -> array[int]:
        page = self[number] = self.empty[:]
        return page


class Uses:
    """How often each cluster is in use.

    A page has 32 bits for each until one of its clusters needs more.  64 bits are always enough:
    65,536 snapshots, 2^22 entries of an L1 table and 2^18 of an L2 table make 2^56.
    """

    def __init__(self) -> None:
        self._pages = _Pages("I", 0)

    def add(self, cluster: int, times: int) -> None:
        number, at = cluster >> _PAGE_BITS, cluster & _MASK
        page = self._pages[number]
        try:
            page[at] += times
        except OverflowError:
            page = self._pages[number] = array("Q", page)
            page[at] += times

    def of(self, cluster: int) -> int:
        page = self._pages.get(cluster >> _PAGE_BITS)
        return page[cluster & _MASK] if page is not None else 0

    def add_all(self, clusters: Iterable[int], times: int) -> None:
        """:meth:`add` for many, which are mostly neighbours."""
        last, page = -1, self._pages.empty
        for cluster in clusters:
            number = cluster >> _PAGE_BITS
            if number != last:
                page, last = self._pages[number], number
            try:
                page[cluster & _MASK] += times
            except OverflowError:
                self.add(cluster, times)
                page = self._pages[number]

    def stretches(self, most: int) -> Iterator[tuple[int, Sequence[int]]]:
        """(first cluster, how often each is in use), in order, ``most`` clusters or less."""
        step = min(most, PAGE)
        for number in sorted(self._pages):
            for at in range(0, PAGE, step):
                yield (number << _PAGE_BITS) + at, self._pages[number][at : at + step]

    def stretch(self, first: int, length: int) -> Sequence[int]:
        """How often each is in use from ``first`` on, within one page."""
        at = first & _MASK
        return self._pages.get(first >> _PAGE_BITS, self._pages.empty)[at : at + length]


SHARED: Final = -1  # in place of an owner: more than one
_NOBODY: Final = -2


class Owners:
    """Who has something in each cluster: a number from 0 on, or SHARED."""

    def __init__(self) -> None:
        self._pages = _Pages("i", _NOBODY)

    def add(self, cluster: int, owner: int) -> None:
        page, at = self._pages[cluster >> _PAGE_BITS], cluster & _MASK
        if page[at] != owner:
            page[at] = owner if page[at] == _NOBODY else SHARED

    def counts(self) -> Counter[int]:
        """How many clusters each one has alone, and those that are SHARED."""
        total: Counter[int] = Counter()
        for page in self._pages.values():
            total.update(page)
        del total[_NOBODY]
        return total
