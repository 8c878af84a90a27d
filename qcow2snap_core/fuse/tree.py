"""What is where in the tree: a directory for each snapshot, and what is in it.

    nightly/disk        the raw disk
    nightly/vmstate     the memory and devices of a machine that was saved
    nightly/p1/…        the files of partition 1
    nightly/lvm/vg/lv/… those of an LVM volume
    nightly/files/…     those of a disk that is one filesystem
    nightly/p2.error    why partition 2 cannot be shown, in place of p2

No word of FUSE: an entry is asked, and answers or raises, in any thread; :attr:`Entry.turn` says
whose turn one has to wait for.  Snapshots do not change, so what was once said of one holds as long
as it exists; only the tree's root changes, and is asked each time.
"""

from __future__ import annotations

from asyncio import Lock
from collections.abc import Callable
from functools import partial
from typing import Final

from ..errors import Error, ImageError, SnapshotGone, StorageError
from ..files.volumes import How, places, volumes, whole
from ..format.filenames import encoded, file_names
from ..format.snapshot_table import Table
from ..format.snapshots import Identity, Snapshot
from ..image.disk import Disk
from ..image.image import Image
from .entries import Attributes, Bytes, Children, Entry, Folder, Guest, Note
from .inuse import InUse
from .volume import Volume

#: Stands beside the snapshots when there may be more that could not be read
_DAMAGED: Final = "snapshots.error"


class SnapshotDirectory(Folder):
    """What is to be seen of a snapshot, found out when it is first looked into."""

    def __init__(
        self, image: Image, snapshot: Snapshot, name: str, how: How, in_use: InUse
    ) -> None:
        super().__init__(self, name)
        self.turn = Lock()
        self.snapshot = snapshot
        self._image = image
        self._how = how
        self._in_use = in_use
        self._known = False
        self._disk: Disk | None = None

    @property
    def is_open(self) -> bool:
        """Whether somebody has looked into it."""
        return self._disk is not None

    @property
    def date(self) -> int:
        """Nanoseconds since 1970."""
        return self.snapshot.date_sec * 10**9 + self.snapshot.date_nsec

    def is_gone(self) -> bool:
        """Whether it was deleted since somebody has looked into it."""
        try:
            if self._disk is not None:
                self._disk.confirm()
        except SnapshotGone:
            return True
        except Error:  # who reads it will be told
            return False
        return False

    def child(self, name: bytes) -> Entry:
        self._look()
        return super().child(name)

    def children(self) -> Children:
        self._look()
        return super().children()

    def _look(self) -> None:
        if not self._known:
            self.entries = {}
            self._known = True
            self._try(self, "disk", self._add_disk)
            if self.snapshot.vm_state_size:
                self._try(self, "vmstate", self._add_vm_state)
            if self._disk is not None:
                self._try(self, "files", partial(self._add_filesystems, self._disk))
                self._try(self, "lvm", partial(self._add_logical_volumes, self._disk))
        if self._disk is not None:
            self._disk.confirm()

    def _try(self, folder: Folder, name: str, add: Callable[[], None]) -> None:
        """Add something, or a note that says why it is not there.  What a disk that fails has
        brought about is tried again the next time."""
        try:
            add()
        except SnapshotGone:
            self._known = False
            raise
        except Error as e:
            self._known &= not isinstance(e, StorageError)
            folder.add(f"{name}.error", Note(self, f"{folder.path}/{name}.error", e))

    def _add_disk(self) -> None:
        self._disk = self._image.disk(self.snapshot)
        self.add("disk", Bytes(self, f"{self.path}/disk", self._disk))

    def _add_vm_state(self) -> None:
        state = self._image.disk(self.snapshot, vm_state=True)
        self.add("vmstate", Bytes(self, f"{self.path}/vmstate", state))

    def _add_filesystems(self, disk: Disk) -> None:
        for part in places(whole(disk)):
            name = "files" if part is None else f"p{part}"
            self._try(self, name, partial(self._add_volume, disk, self, name, part))

    def _add_logical_volumes(self, disk: Disk) -> None:
        groups: dict[str, Folder] = {}
        top = Folder(self, f"{self.path}/lvm")
        for part in volumes(whole(disk)):
            self.add("lvm", top)
            group, _, volume = part.partition("/")
            name, group = encoded(volume), encoded(group)
            if group not in groups:
                groups[group] = Folder(self, f"{top.path}/{group}")
                top.add(group, groups[group])
            folder = groups[group]
            self._try(folder, name, partial(self._add_volume, disk, folder, name, part))

    def _add_volume(self, disk: Disk, folder: Folder, name: str, part: str | None) -> None:
        volume = Volume(disk, self.path, part, self._how)
        root = volume.node(())
        self._in_use.note(volume)
        folder.add(name, Guest(self, volume, f"{folder.path}/{name}", (), root))


class Root(Folder):
    """A directory for each snapshot that the image has now."""

    turn: Lock

    def __init__(self, image: Image, how: How) -> None:
        super().__init__(None, "")
        self.turn = Lock()
        self.in_use = InUse()
        self._image = image
        self._how = how
        self._listed: Table | None = None
        # By what they are called too: that may change when others come and go.
        self._known: dict[tuple[Identity, str], SnapshotDirectory] = {}

    def attributes(self) -> Attributes:
        self._look()
        newest = max((each.date for each in self._known.values()), default=0)
        return super().attributes()._replace(mtime=newest, ctime=newest)

    def child(self, name: bytes) -> Entry:
        self._look()
        return super().child(name)

    def children(self) -> Children:
        self._look()
        return super().children()

    def gone(self) -> list[SnapshotDirectory]:
        """Those that were looked into and are deleted; each is told once."""
        found = {key: each for key, each in self._known.items() if each.is_gone()}
        for key in found:
            del self._known[key]
        return list(found.values())

    def _look(self) -> None:
        table = self._image.table()
        if table == self._listed:
            return
        names = file_names(table.snapshots, taken=(_DAMAGED,))
        before, self._known, self.entries = self._known, {}, {}
        for snapshot, name in zip(table.snapshots, names, strict=True):
            key = snapshot.identity, name
            directory = before.pop(key, None)
            if directory is None:
                directory = SnapshotDirectory(self._image, snapshot, name, self._how, self.in_use)
            self._known[key] = directory
            self.add(name, directory)
        if table.damage:
            why = ImageError(f"the snapshot table is damaged: {table.damage}")
            self.add(_DAMAGED, Note(None, _DAMAGED, why))
        self._known |= {key: each for key, each in before.items() if each.is_open}
        self._listed = table
