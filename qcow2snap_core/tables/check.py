"""Whether an image's metadata holds together: all of it read, nothing changed.

First everything that is metadata claims its clusters; two claims of one cluster are damage.  Then
each L2 table is read once, however many L1 tables lead to it, and what it leads to is judged and
counted.  At the end the counts are held against the image's own refcounts.  A cluster that is in
use and counted less often will be given away and overwritten: a snapshot can be lost that way
while it still reads well.  Clusters that are counted and not used (leaks) cost space alone: they
are no damage, and one finding in all.

Some damage of a snapshot shows only in comparison with others that use its clusters as well.  So
everything is read even if one snapshot is to be checked, and findings that concern only others are
left out at the end.
"""

from __future__ import annotations

from contextlib import suppress

from ..errors import ImageError
from ..format import ondisk as q
from ..format.oddities import oddities
from ..format.snapshots import Snapshot
from ..image.disk import Disk
from ..image.guard import Guard, Unguarded
from ..image.image import Image
from .claims import Claims
from .data import Data
from .findings import ACTIVE, BAD_TABLE, Finding, Findings, Owner, TooManyError
from .l2tables import Tables
from .refcount_audit import RefcountAudit
from .tally import Uses


def check(image: Image, chosen: Snapshot | None = None, *, data: bool = False) -> list[Finding]:
    """What is wrong with the metadata of all snapshots and the active disk, or what of it concerns
    one snapshot; at most MOST findings.

    ``data``: all clusters are read as well, for which the image must be open with its data, and
    with its data file if it has one.
    Raises StorageError when the disk fails, SnapshotGone when a snapshot is deleted meanwhile, or
    the chosen one was before.
    """
    walk = _Walk(image, chosen)
    with suppress(TooManyError):
        walk.all()
        if data:
            walk.data()
    walk.guard.confirm()
    return walk.findings.all


class _Walk:
    """Claims all metadata, then has the tables judged and the refcounts audited."""

    def __init__(self, image: Image, chosen: Snapshot | None) -> None:
        self.findings = Findings()
        self.guard: Guard = Unguarded(image.storage)
        self._image = image
        self._chosen = chosen
        self._owners: list[Owner] = []
        self._active: Owner | None = None
        self._uses = Uses()
        self._claims = Claims(image, self._uses, self.findings)
        self._tables = Tables(image, self._claims, self._uses, self.findings)

    def all(self) -> None:
        header = self._image.header
        refcounts = self._claims.claim_refcounts()
        self._claims.claim_header()
        self._claim_snapshots()
        if self._chosen is not None and self.findings.about is None:
            return  # it cannot even be opened, as has been reported
        self._claim_active()
        for owner in self._owners:
            self._tables.add(owner)
        self._tables.walk()
        audit = RefcountAudit(self._image, self._claims, self._tables, self._uses, self.findings)
        if self._active is not None and not header.has_data_file:
            audit.check_copied(self._active)
        if refcounts is not None and not header.dirty:
            audit.compare(refcounts)

    def data(self) -> None:
        """Read what the tables lead to."""
        Data(self._image, self._tables, self.findings).check()

    def _claim_snapshots(self) -> None:
        table = self._image.table()
        here = any(not self._is_another(s) for s in table.snapshots)
        gone = () if here or self._chosen is None else (self._chosen,)
        self.guard = self._image.guard((*table.snapshots, *gone))  # and says so
        if table.damage:
            self.findings.add(BAD_TABLE, f"the snapshot table is damaged: {table.damage}")
        snapshots = list(table.snapshots)
        if snapshots:
            first, last = snapshots[0].entry_offset, snapshots[-1]
            end = last.entry_offset + last.entry_length
            self._claims.claim("the snapshot table", first, end - first)
        if self._chosen is not None:  # it comes first, so that the lines name it
            snapshots.sort(key=self._is_another)
        for snapshot in snapshots:
            self._claim_snapshot(snapshot)
            if self._chosen is not None and self.findings.about is None:
                break
        for snapshot, wrong in oddities(table.snapshots, self._image.header):
            if not self._is_another(snapshot):
                self.findings.add(BAD_TABLE, wrong, [self.findings.about or snapshot])

    def _claim_snapshot(self, snapshot: Snapshot) -> None:
        try:
            owner = Owner(snapshot.id, self._image.disk(snapshot, guard=self.guard))
        except ImageError as e:
            if not self._is_another(snapshot):
                self.findings.add(BAD_TABLE, str(e), [self.findings.about or snapshot])
            return
        if self._chosen is not None and self.findings.about is None:
            self.findings.about = owner
        self._owners.append(owner)
        self._claim_l1(owner, snapshot.l1_table_offset, snapshot.l1_size)
        if snapshot.vm_state_size and not self._is_another(snapshot):
            self._check_reach(owner, self._image.disk(snapshot, vm_state=True, guard=self.guard))

    def _claim_active(self) -> None:
        try:
            self._active = Owner(ACTIVE, self._image.active_disk())
        except ImageError as e:
            if self._chosen is None:
                self.findings.add(BAD_TABLE, str(e))
            return
        self._owners.append(self._active)
        header = self._image.header
        self._claim_l1(self._active, header.l1_table_offset, header.l1_size)

    def _claim_l1(self, owner: Owner, offset: int, entries: int) -> None:
        if entries:
            what = f"the L1 table of {owner.disk.name}"
            self._claims.claim(what, offset, entries * q.L1_ENTRY_SIZE, [owner])
        if owner is self._active and self._chosen is None:
            self._check_reach(owner, owner.disk)

    def _check_reach(self, owner: Owner, disk: Disk) -> None:
        """QEMU makes every L1 table large enough, and opens no image whose own is not."""
        if disk.reach < disk.size:
            message = f"{disk.name}: its L1 table covers only {disk.reach} of {disk.size} bytes"
            self.findings.add(BAD_TABLE, message, [owner])

    def _is_another(self, snapshot: Snapshot) -> bool:
        return self._chosen is not None and snapshot.identity != self._chosen.identity
