"""One open qcow2 file: its header, its snapshots, and the layers below it.

Snapshots are looked up when they are asked for, so that an image which a running QEMU has open
shows the ones it has now.  :mod:`.opener` makes one, with all that lies below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from types import TracebackType
from weakref import WeakValueDictionary

from ..errors import ImageError, SnapshotGone, escaped, shown
from ..format import ondisk as q
from ..format.choosing import Choice, choose
from ..format.header import Header
from ..format.snapshot_table import Table, read_table
from ..format.snapshots import Identity, Snapshot
from ..storage.local import Storage, ensure_open
from ..typed import TYPE_CHECKING, Final, TypeVar
from ..util.cache import OVERHEAD, BoundedCache
from .clusters import ClusterCache, Clusters
from .disk import Disk
from .guard import Guard, SnapshotGuard, Unguarded
from .mapping import Mapping, TableCache
from .tablereader import Geometry

if TYPE_CHECKING:
    from .layers import Layer
    from .opener import Options


_T = TypeVar("_T")

_ATTEMPTS: Final = 5  # to ask about all snapshots while they come and go


class Chain:
    """What all layers of one image have in common: their files and caches."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tables: TableCache = BoundedCache(options.l2_cache_size, OVERHEAD)
        self.clusters: ClusterCache = BoundedCache(options.cluster_cache_size, OVERHEAD)
        self.tokens = count()
        self.files: list[Storage] = []  # of the layers and of their data files
        self.layers: list[Storage] = []  # from the top down
        self.encrypted = False

    def close(self) -> None:
        """Close all files."""
        for storage in self.files:
            storage.close()


class Image:
    """An open qcow2 file.  A context manager; safe to use from several threads."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        clusters: Clusters,
        below: Layer | None,
        chain: Chain,
    ) -> None:
        """Use :func:`.open_image`."""
        self.path = storage.path
        self.storage = storage
        self.header: Final = header
        self._clusters = clusters
        self._below = below
        self._chain = chain
        self._geometry = Geometry(
            header.cluster_bits, header.version, header.extended_l2, header.has_data_file
        )
        self._known_damage: tuple[bytes, str | None] | None = None
        self._disks: WeakValueDictionary[tuple[Identity, bool], Disk] = WeakValueDictionary()

    # --- Snapshots ---

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots that the file has now, in the table's order."""
        return self.table().snapshots

    def table(self) -> Table:
        """The snapshot table that the file has now."""
        table = read_table(self.storage, self._known_damage)
        self._known_damage = table.fields, table.damage
        if self.header.has_data_file and not table.snapshots:
            return table._replace(note="QEMU keeps none in an image with an external data file")
        return table

    def of_all(self, ask: Callable[[Sequence[Snapshot]], _T]) -> tuple[Table, _T]:
        """The snapshot table, and what ``ask`` finds out about all snapshots in it; both are had
        anew when one was deleted meanwhile.  Raises SnapshotGone when that happens each time."""
        for attempt in range(_ATTEMPTS):
            table = self.table()
            try:
                return table, ask(table.snapshots)
            except SnapshotGone:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def snapshot(self, name: str) -> Disk:
        """The disk of the snapshot with that ID, else of the first with that name.

        Raises UsageError that lists what there is, ImageError when the snapshot is damaged.
        """
        return self.disk(choose(self.table(), Choice(name), self.path))

    def guard(self, snapshots: Sequence[Snapshot]) -> Guard:
        """One for them all, for who reads the tables of many: it looks at the snapshot table once,
        where a guard for each would look as often as there are snapshots."""
        return SnapshotGuard(self.storage, *snapshots)

    def disk(self, snapshot: Snapshot, vm_state: bool = False, guard: Guard | None = None) -> Disk:
        """The disk of a snapshot, or its saved VM state.

        All who have it open share it, but for who brings a guard, which is asked when something
        was read and not before.  Raises ImageError when it is damaged or already gone.
        """
        if guard is not None:
            return self._open_disk(snapshot, vm_state, guard)
        key = (snapshot.identity, vm_state)
        disk = self._disks.get(key)
        if disk is None:
            guard = SnapshotGuard(self.storage, snapshot)
            try:
                disk = self._disks[key] = self._open_disk(snapshot, vm_state, guard)
            except ImageError:
                guard.confirm()  # if it is gone, that is the reason for anything
                raise
        disk.confirm()
        return disk

    def _open_disk(self, snapshot: Snapshot, vm_state: bool, guard: Guard) -> Disk:
        what = f"snapshot {shown(snapshot.name)} (ID {escaped(snapshot.id)}) of {shown(self.path)}"
        size = snapshot.disk_size
        # What the active disk has grown by since is not in the L1 table of an old entry, which
        # goes by that disk's size.
        grown = not vm_state and not snapshot.records_size
        mapping = self._mapping(snapshot.l1_table_offset, snapshot.l1_size, what, grown)
        if max(size, snapshot.vm_state_size) > q.MAX_DISK_SIZE:
            raise ImageError(f"{what}: its size of {size} bytes is impossible")
        if not vm_state:
            return Disk(what, size, mapping, self._clusters, guard, self._below)
        # QEMU: qcow2_vm_state_offset.  No layer below has a part in it.
        per_l1_entry = mapping.tables.bytes_per_l1_entry
        base = -(-size // per_l1_entry) * per_l1_entry
        what = f"VM state of {what}"
        return Disk(what, snapshot.vm_state_size, mapping, self._clusters, guard, base=base)

    # --- The active disk, for the layer above ---

    def active_disk(self, guard: Guard | None = None) -> Disk:
        """What the guest sees now; only right while nobody writes to it, as ``guard`` may know.

        Raises ImageError when the active L1 table is damaged.
        """
        ensure_open(self.storage)
        h = self.header
        what = shown(self.path)
        mapping = self._mapping(h.l1_table_offset, h.l1_size, what)
        if h.size > q.MAX_DISK_SIZE:
            raise ImageError(f"{what}: its size of {h.size} bytes is impossible")
        return Disk(
            what, h.size, mapping, self._clusters, guard or Unguarded(self.storage), self._below
        )

    def stream(self, descriptor: int) -> tuple[int, int]:
        """(host offset, length) of the stream of a compressed cluster, from its L2 entry."""
        return self._clusters.stream(descriptor)

    # --- The chain ---

    @property
    def files(self) -> tuple[Storage, ...]:
        """Every file that is open for it: its own, the layers' below, their data files."""
        ensure_open(self.storage)
        return tuple(self._chain.files)

    @property
    def options(self) -> Options:
        """How it was opened."""
        return self._chain.options

    @property
    def chain(self) -> list[tuple[Storage, Layer]]:
        """Each layer's file and what the guest sees in it, from the top down."""
        layer: Layer | None = self.active_disk()
        layers: list[tuple[Storage, Layer]] = []
        for storage in self._chain.layers:
            assert layer is not None
            layers.append((storage, layer))
            layer = layer.below
        return layers

    @property
    def encrypted(self) -> bool:
        """Whether any layer of it is."""
        return self._chain.encrypted

    def close(self) -> None:
        """Close the files.  Whatever is asked of the image or of its disks from now on raises
        ValueError; what another thread is just reading ends as it would have, or so."""
        self._chain.close()

    def __enter__(self) -> Image:
        ensure_open(self.storage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # --- Inside ---

    def _mapping(self, offset: int, entries: int, what: str, open_ended: bool = False) -> Mapping:
        """Of an L1 table that may be where it is said to be, or ImageError."""
        self._check_l1(offset, entries, what)
        kind = Mapping
        if self._geometry.extended_l2:
            from .subclusters import SubclusterMapping

            kind = SubclusterMapping
        chain = self._chain
        token = next(chain.tokens)
        parts = self.storage, self._geometry, offset, entries, chain.tables, token, open_ended
        return kind(*parts, chain.options.slice_bytes)

    def _check_l1(self, offset: int, entries: int, what: str) -> None:
        length = entries * q.L1_ENTRY_SIZE
        if length > q.MAX_L1_BYTES:
            raise ImageError(f"{what}: its L1 table of {entries} entries is larger than 32 MiB")
        if not entries:
            return
        if offset % self.header.cluster_size or not offset:
            raise ImageError(f"{what}: its L1 table's offset {offset:#x} is not one of a cluster")
        end = offset + length
        if end > self.storage.size() and not self.storage.read(1, end - 1):
            raise ImageError(
                f"{what}: its L1 table, {length} bytes at host offset {offset:#x}, "
                f"lies past the end of the file ({self.storage.size()} bytes)"
            )
