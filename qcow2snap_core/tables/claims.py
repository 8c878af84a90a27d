"""Which clusters of a file hold metadata, and whose it is: two claims of one cluster are damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ImageError
from ..format.bitmaps import areas
from ..format.refcounts import Refcounts, past_end
from ..image.image import Image
from .findings import BAD_TABLE, OVERLAP, Findings, Owner, union
from .tally import Uses


class Claim(NamedTuple):
    """What is in a cluster, and whose it is; nobody's if everybody needs it."""

    what: str
    owners: Sequence[Owner]


class Claims:
    """What has been claimed; what is claimed is also counted as used."""

    def __init__(self, image: Image, uses: Uses, findings: Findings) -> None:
        self.clusters: dict[int, Claim] = {}
        #: the first host offset past the file's last cluster
        self.end = past_end(image.storage, image.header.cluster_size)
        self._image = image
        self._bits = image.header.cluster_bits
        self._uses = uses
        self._findings = findings

    def claim(self, what: str, offset: int, length: int, owners: Sequence[Owner] = ()) -> None:
        """Count the clusters of an area, and report what else is there.

        ``owners`` is kept: those who are found later to share the area are added to it.
        """
        unaligned = offset % self._image.header.cluster_size
        if offset + length > self.end or unaligned:
            wrong = (
                "is unaligned" if offset + length <= self.end else "lies past the end of the file"
            )
            message = f"{what} at host offset {offset:#x} {wrong}"
            self._findings.add(BAD_TABLE, message, owners, offset)
            return
        claim = Claim(what, owners)
        for cluster in range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1):
            self._uses.add(cluster, 1)
            if self.clusters.setdefault(cluster, claim) is not claim:
                self.overlap(what, owners, cluster)

    def overlap(self, what: str, owners: Sequence[Owner], cluster: int) -> None:
        """Report that something else is in a cluster that has been claimed."""
        host = cluster << self._bits
        other = self.clusters[cluster]
        message = f"{what} overlaps {other.what} at host offset {host:#x}"
        self._findings.add(OVERLAP, message, union(owners, other.owners), host)

    def claim_refcounts(self) -> Refcounts | None:
        """Their table and blocks; None if they cannot be had."""
        try:
            refcounts = Refcounts(self._image.storage, self._image.header)
        except ImageError as e:
            self._findings.add(BAD_TABLE, str(e))
            return None
        self.claim("the refcount table", refcounts.table_offset, refcounts.table_bytes)
        for number, offset in refcounts.blocks():
            try:
                refcounts.block(number)
            except ImageError as e:
                self._findings.add(BAD_TABLE, str(e), (), offset)
            else:
                self.claim(f"refcount block {number}", offset, 1)
        return refcounts

    def claim_header(self) -> None:
        """The header, and what its extensions lead to."""
        self.claim("the header", 0, 1)
        area = self._image.header.crypto_area
        if area is not None:
            self.claim("the LUKS header", *area)
        try:
            for part in areas(self._image.storage, self._image.header):
                self.claim(*part)
        except ImageError as e:
            self._findings.add(BAD_TABLE, str(e))
