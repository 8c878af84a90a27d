"""The audit of the refcounts: which clusters can be overwritten although somebody needs them.

A cluster that is in use more often than its refcount says will be freed too early.  And COPIED in
an entry of the active disk lets QEMU write in place, so nobody else may share that cluster.  In
both cases a snapshot that can still be read well may be lost later.  Clusters that are counted and
not used are leaks: they only waste space, and only their number is reported, as by qemu-img check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import gt, lt

from ..errors import ImageError
from ..format import ondisk as q
from ..format.refcounts import Refcounts
from ..image.image import Image
from .claims import Claims
from .findings import IN_PLACE, MOST, NOT_COUNTED, Findings, Owner
from .l2tables import Tables
from .tally import PAGE, Uses


class RefcountAudit:
    """Holds what is in use against what the image says."""

    def __init__(
        self, image: Image, claims: Claims, tables: Tables, uses: Uses, findings: Findings
    ) -> None:
        self._image = image
        self._bits = image.header.cluster_bits
        self._claims = claims
        self._tables = tables
        self._uses = uses
        self._findings = findings
        self._wanted = uses if findings.about is None else self._used_by(findings.about)

    def _used_by(self, owner: Owner) -> Uses:
        """What an owner needs, the metadata that is nobody's own as well."""
        needed = Uses()
        for cluster, claim in self._claims.clusters.items():
            if not claim.owners or self._findings.concern(claim.owners):
                needed.add(cluster, 1)
        for clusters, _ in self._tables.led_to(owner):
            needed.add_all(clusters, 1)
        return needed

    def compare(self, refcounts: Refcounts) -> None:
        """Report what is in use more often than it is counted, and how much less often."""
        bad: dict[int, tuple[int, int]] = {}
        leaks, end = 0, self._claims.end >> self._bits
        for first, uses, counts in self._stretches(refcounts):
            if any(map(gt, uses, counts)):
                for cluster, (used, counted) in enumerate(zip(uses, counts, strict=True), first):
                    if counted < used and self._wanted.of(cluster):
                        bad[cluster] = used, counted
            if len(bad) >= MOST:
                break
            leaks += sum(map(lt, uses[: max(0, end - first)], counts))
        users = self._tables.users(bad)
        for cluster, (used, counted) in bad.items():
            host = cluster << self._bits
            claim = self._claims.clusters.get(cluster)
            self._findings.add(
                NOT_COUNTED,
                f"the cluster at host offset {host:#x} ({claim.what if claim else 'data'}) is in "
                f"use {used} times and counted {counted}: it can be overwritten",
                users.get(cluster, ()),
                host,
            )
        if leaks:
            self._findings.add_leaks(leaks, leaks << self._bits)

    def _stretches(
        self, refcounts: Refcounts
    ) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
        """(first cluster, how often each is in use, how often each is counted), in order, of all
        that is in use or may be counted."""
        size = refcounts.per_block
        numbers = {first // size for first, _ in self._uses.stretches(size)}
        numbers.update(number for number, _ in refcounts.blocks())
        for number in sorted(numbers):
            try:
                counts = refcounts.block(number)
            except ImageError:  # reported already
                continue
            for at in range(0, size, min(size, PAGE)):
                uses = self._uses.stretch(number * size + at, min(size, PAGE))
                yield number * size + at, uses, counts[at : at + len(uses)]

    def check_copied(self, active: Owner) -> None:
        """Report what others share and the active disk, whose tables were added last, may write
        in place."""
        header, read = self._image.header, self._image.storage.read
        l1 = q.integers(read(header.l1_size * q.L1_ENTRY_SIZE, header.l1_table_offset))
        bad: dict[int, int] = {}
        for index, table in self._tables.of_last(active):
            l2 = q.integers(read(header.cluster_size, table))[:: 2 if header.extended_l2 else 1]
            for entry in (*l1[index : index + 1], *l2):
                if not entry & q.OFLAG_COPIED or entry & q.OFLAG_COMPRESSED:
                    continue
                cluster = (entry & q.OFFSET_MASK) >> self._bits
                if self._uses.of(cluster) > 1 and self._wanted.of(cluster):
                    bad[cluster] = index
            if len(bad) >= MOST:
                break
        users = self._tables.users(bad)
        for cluster, index in bad.items():
            host = cluster << self._bits
            self._findings.add(
                IN_PLACE,
                f"L1 entry {index} of the active disk, or an entry behind it, lets QEMU "
                f"write in place to host offset {host:#x}, which others share",
                users[cluster],
                host,
            )
