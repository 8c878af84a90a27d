"""One qcow2 file: its header, its snapshots, and the layers below it.

Opening follows the chain of backing files down to its end, each through the policy of
:mod:`..storage.policy`, and shares one pair of caches among all layers.  Snapshots are looked up
when they are asked for, so that an image which a running QEMU has open shows the ones it has now.
"""

from __future__ import annotations

from collections.abc import Mapping as ReadOnly
from collections.abc import Sequence
from itertools import count
from types import MappingProxyType, TracebackType
from weakref import WeakValueDictionary

from ..decode.codecs import Codec, Zstd, deflate
from ..decode.encryption import open_encryption
from ..errors import ImageError, UsageError, escaped, shown
from ..format import ondisk as q
from ..format.header import Header, read_header
from ..format.snapshots import Choice, Identity, Snapshot, Table, choose, read_table
from ..storage.libnbd import is_uri, refuse_url
from ..storage.local import Storage, check_open, open_storage
from ..storage.policy import Policy
from ..typed import Final, NamedTuple
from ..util.cache import OVERHEAD, BoundedCache
from ..util.wording import LIBRARY, Wording
from .clusters import ClusterCache, Clusters, EncryptedClusters
from .disk import Disk, Layer, RawLayer
from .guard import Guard, SnapshotGuard, Unguarded
from .mapping import Geometry, Mapping, TableCache

BACKING_FORMATS: Final = ("raw", "qcow2")


class Options(NamedTuple):
    """How to open an image; see the contract of the plugin's keys."""

    allow_dirs: tuple[str, ...] = ()
    backing_format: str | None = None  # of a backing file whose image records none
    passphrases: ReadOnly[int, bytes] = MappingProxyType({})  # by layer
    l2_cache_size: int = 32 << 20  # bytes
    cluster_cache_size: int = 64 << 20
    data: bool = True  # False: tables alone will be asked for, so no passphrase or codec is needed
    layers: bool = True  # False: not even the files that the image names are needed
    allow_files: tuple[str, ...] = ()
    words: Wording = LIBRARY  # of whoever opens it, for error lines

    def __repr__(self) -> str:
        return "Options(…)"  # it holds secrets


class _Shared:
    """What all layers of one image have in common."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.policy = Policy(options.allow_dirs, options.allow_files, options.words)
        self.tables: TableCache = BoundedCache(options.l2_cache_size, OVERHEAD)
        self.clusters: ClusterCache = BoundedCache(options.cluster_cache_size, OVERHEAD)
        self.tokens = count()
        self.storages: list[Storage] = []  # of the layers and of their data files
        self.layers: list[Storage] = []  # from the top down
        self.encrypted = False
        self.codecs: dict[int, Codec] = {}  # of all layers: a decoder's contexts are large


class Image:
    """An open qcow2 file.  A context manager; safe to use from several threads."""

    def __init__(self, storage: Storage, shared: _Shared) -> None:
        """Use :func:`open_image`.  Owns the storage and those of the layers below."""
        self.path = storage.path
        self.storage = storage
        self._shared = shared
        self._known_damage: tuple[bytes, str | None] | None = None
        self._disks: WeakValueDictionary[tuple[Identity, bool], Disk] = WeakValueDictionary()
        layer = _enter_chain(storage, shared)
        self.header: Final[Header] = read_header(storage)
        self._geometry = Geometry(
            self.header.cluster_bits,
            self.header.version,
            self.header.extended_l2,
            self.header.has_data_file,
        )
        self._clusters = self._open_clusters(layer)
        self._below = self._open_below()

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
            disk = self._disks[key] = self._open_disk(snapshot, vm_state, guard)
        disk.check()
        return disk

    def _open_disk(self, snapshot: Snapshot, vm_state: bool, guard: Guard) -> Disk:
        what = f"snapshot {shown(snapshot.name)} (ID {escaped(snapshot.id)}) of {shown(self.path)}"
        size = snapshot.disk_size
        self._check_l1(snapshot.l1_table_offset, snapshot.l1_size, what)
        if max(size, snapshot.vm_state_size) > q.MAX_DISK_SIZE:
            raise ImageError(f"{what}: its size of {size} bytes is impossible")
        # What the active disk has grown by since is not in the L1 table of an old entry, which
        # goes by that disk's size.
        grown = not vm_state and not snapshot.records_size
        mapping = self._mapping(snapshot.l1_table_offset, snapshot.l1_size, grown)
        if not vm_state:
            return Disk(what, size, mapping, self._clusters, guard, self._below)
        # QEMU: qcow2_vm_state_offset.  No layer below has a part in it.
        per_l1_entry = mapping.bytes_per_l1_entry
        base = -(-size // per_l1_entry) * per_l1_entry
        what = f"VM state of {what}"
        return Disk(what, snapshot.vm_state_size, mapping, self._clusters, guard, base=base)

    # --- The active disk, for the layer above ---

    def active_disk(self, guard: Guard | None = None) -> Disk:
        """What the guest sees now; only right while nobody writes to it, as ``guard`` may know.

        Raises ImageError when the active L1 table is damaged.
        """
        check_open(self.storage)
        h = self.header
        what = shown(self.path)
        self._check_l1(h.l1_table_offset, h.l1_size, what)
        if h.size > q.MAX_DISK_SIZE:
            raise ImageError(f"{what}: its size of {h.size} bytes is impossible")
        mapping = self._mapping(h.l1_table_offset, h.l1_size)
        return Disk(
            what, h.size, mapping, self._clusters, guard or Unguarded(self.storage), self._below
        )

    def stream(self, entry: int) -> tuple[int, int]:
        """(host offset, length) of the compressed cluster that an L2 entry describes."""
        return self._clusters.stream(entry)

    # --- Opening and closing ---

    @property
    def files(self) -> tuple[Storage, ...]:
        """Every file that is open for it: its own, the layers' below, their data files."""
        check_open(self.storage)
        return tuple(self._shared.storages)

    @property
    def options(self) -> Options:
        """How it was opened."""
        return self._shared.options

    @property
    def chain(self) -> list[tuple[Storage, Layer]]:
        """Each layer's file and what the guest sees in it, from the top down."""
        layer: Layer | None = self.active_disk()
        found: list[tuple[Storage, Layer]] = []
        for storage in self._shared.layers:
            assert layer is not None
            found.append((storage, layer))
            layer = layer.below
        return found

    @property
    def encrypted(self) -> bool:
        """Whether any layer of it is."""
        return self._shared.encrypted

    def close(self) -> None:
        """Close the files.  Whatever is asked of the image or of its disks from now on raises
        ValueError; what another thread is just reading ends as it would have, or so."""
        for storage in self._shared.storages:
            storage.close()

    def __enter__(self) -> Image:
        check_open(self.storage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _mapping(self, l1_table_offset: int, l1_size: int, open_ended: bool = False) -> Mapping:
        shared = self._shared
        return Mapping.of(self._geometry)(
            self.storage,
            self._geometry,
            l1_table_offset,
            l1_size,
            shared.tables,
            next(shared.tokens),
            open_ended,
        )

    def _check_l1(self, offset: int, entries: int, what: str) -> None:
        length = entries * q.L1_ENTRY_SIZE
        if length > q.MAX_L1_BYTES:
            raise ImageError(f"{what}: its L1 table of {entries} entries is larger than 32 MiB")
        if not entries:
            return
        if offset % self.header.cluster_size or not offset:
            raise ImageError(f"{what}: its L1 table's offset {offset:#x} is not one of a cluster")
        if not self.storage.read(1, offset + length - 1):
            raise ImageError(
                f"{what}: its L1 table, {length} bytes at host offset {offset:#x}, "
                f"lies past the end of the file ({self.storage.size()} bytes)"
            )

    def _open_clusters(self, layer: int) -> Clusters:
        """How to read this file's clusters; ``layer`` counts from the image down."""
        shared, header = self._shared, self.header
        data = self.storage
        if header.has_data_file and shared.options.layers:
            name = header.extensions.get(q.EXT_DATA_FILE)
            if not name:
                raise ImageError(f"{shown(self.path)} does not name its external data file")
            data = shared.policy.open(name, self.storage, "data file")
            shared.storages.append(data)
        if not shared.options.data:
            return Clusters(self.storage, data, header.cluster_bits, deflate(), shared.clusters)
        passphrases = shared.options.passphrases
        encryption = open_encryption(
            self.storage,
            header,
            passphrases.get(layer, passphrases.get(0)),
            shared.options.words.passphrase(layer),
        )
        parts = self.storage, data, header.cluster_bits, self._codec(), shared.clusters
        if encryption is None:
            return Clusters(*parts)
        shared.encrypted = True
        return EncryptedClusters(encryption, *parts)

    def _codec(self) -> Codec:
        kind, codecs = self.header.compression, self._shared.codecs
        if kind not in codecs:
            try:
                codecs[kind] = deflate() if kind == q.COMPRESSION_ZLIB else Zstd()
            except ImageError as e:
                raise ImageError(f"{shown(self.path)}: {e}") from e
        return codecs[kind]

    def _open_below(self) -> Layer | None:
        name = self.header.backing_file
        options = self._shared.options
        if name is None or not options.layers:
            return None
        recorded = self.header.backing_format
        form = options.backing_format if recorded is None else recorded
        if form is None:
            raw, qcow2 = (options.words.given("backing-format", f) for f in BACKING_FORMATS)
            raise UsageError(
                f"{shown(self.path)} does not record the format of its backing file {shown(name)}: "
                f"add {raw} or {qcow2}"
            )
        if form not in BACKING_FORMATS:
            raise UsageError(
                f"the backing file {shown(name)} of {shown(self.path)} has the format "
                f"{shown(form)}: only raw and qcow2 can be read, qemu-img convert can change it"
            )
        storage = self._shared.policy.open(name, self.storage, "backing file")
        if form == "qcow2":
            return Image(storage, self._shared).active_disk()
        _enter_chain(storage, self._shared)
        return RawLayer(storage)


def open_image(path: str, options: Options = Options()) -> Image:  # noqa: B008 (immutable)
    """Open a qcow2 file and its backing chain, read-only and without any lock.

    ``path`` is that of a file or block device, or an NBD URI.

    Raises UsageError for what may not or cannot be opened, ImageError for what cannot be read.
    """
    shared = _Shared(options)
    try:
        image = Image(_open_file(path), shared)
        if options.passphrases and options.data and not shared.encrypted:
            raise UsageError(f"{shown(path)} is not encrypted: leave out the passphrase")
        return image
    except BaseException:
        for storage in shared.storages:
            storage.close()
        raise


def _open_file(path: str) -> Storage:
    """What the user names; the only place where that may be remote."""
    if is_uri(path):
        from ..storage.remote import RemoteFile

        return RemoteFile(path)
    refuse_url(path)
    return open_storage(path)


def _enter_chain(storage: Storage, shared: _Shared) -> int:
    """Add a layer's file, which is closed with the image from here on; returns its number."""
    met = [s.inode for s in shared.layers]
    shared.layers.append(storage)
    shared.storages.append(storage)
    if storage.inode in met:
        raise ImageError(
            f"the backing chain of {shown(shared.layers[0].path)} loops: "
            f"{shown(storage.path)} comes up twice"
        )
    if len(met) >= q.MAX_CHAIN:
        raise ImageError(f"the backing chain is longer than {q.MAX_CHAIN} files")
    return len(met)
