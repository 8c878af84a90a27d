"""Opening an image: the chain of backing files down to its end, data files, ciphers and decoders.

Each file that an image names goes through the policy of :mod:`..storage.policy`.  All layers share
one pair of caches.
"""

from __future__ import annotations

from collections.abc import Mapping as ReadOnly
from types import MappingProxyType

from ..decode.codecs import Codec, Zstd, deflate
from ..errors import ImageError, UsageError, shown
from ..format import ondisk as q
from ..format.header import Header, read_header
from ..storage.libnbd import PATIENCE, is_uri, refuse_url
from ..storage.local import Storage, open_storage
from ..storage.policy import Policy
from ..typed import TYPE_CHECKING, Final, NamedTuple
from ..util.wording import LIBRARY, Wording
from .clusters import Clusters, EncryptedClusters
from .image import Chain, Image
from .mapping import SLICE_BYTES

if TYPE_CHECKING:
    from .layers import Layer

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
    remote_timeout: float = PATIENCE  # seconds for which an NBD server may be silent
    words: Wording = LIBRARY  # of whoever opens it, for error lines
    slice_bytes: int = SLICE_BYTES  # of a table that are read at once; a power of two

    def __repr__(self) -> str:
        return "Options(…)"  # it holds secrets


def open_image(path: str, options: Options = Options()) -> Image:  # noqa: B008 (immutable)
    """Open a qcow2 file and its backing chain, read-only and without any lock.

    ``path`` is that of a file or block device, or an NBD URI.

    Raises UsageError for what may not or cannot be opened, ImageError for what cannot be read.
    """
    opener = _Opener(options)
    try:
        image = opener.image(_open_file(path, options))
        if options.passphrases and options.data and not opener.chain.encrypted:
            raise UsageError(f"{shown(path)} is not encrypted: leave out the passphrase")
        return image
    except BaseException:
        opener.chain.close()
        raise


def _open_file(path: str, options: Options) -> Storage:
    """What the user names; the only place where that may be remote."""
    if is_uri(path):
        from ..storage.remote import RemoteFile

        return RemoteFile(path, options.remote_timeout)
    refuse_url(path)
    return open_storage(path)


class _Opener:
    """Opens the layers of one image, from the top down."""

    def __init__(self, options: Options) -> None:
        self.chain = Chain(options)
        self._options = options
        self._policy = Policy(options.allow_dirs, options.allow_files, options.words)
        self._codecs: dict[int, Codec] = {}  # of all layers: a decoder's contexts are large

    def image(self, storage: Storage) -> Image:
        """The image in a file, with all that lies below it."""
        layer = self._enter(storage)
        header = read_header(storage)
        clusters = self._clusters(storage, header, layer)
        return Image(storage, header, clusters, self._below(storage, header), self.chain)

    def _enter(self, storage: Storage) -> int:
        """Add a layer's file, which is closed with the image from here on; returns its number."""
        chain = self.chain
        met = [s.inode for s in chain.layers]
        chain.layers.append(storage)
        chain.files.append(storage)
        if storage.inode in met:
            raise ImageError(
                f"the backing chain of {shown(chain.layers[0].path)} loops: "
                f"{shown(storage.path)} comes up twice"
            )
        if len(met) >= q.MAX_CHAIN:
            raise ImageError(f"the backing chain is longer than {q.MAX_CHAIN} files")
        return len(met)

    def _clusters(self, storage: Storage, header: Header, layer: int) -> Clusters:
        """How to read this file's clusters; ``layer`` counts from the image down."""
        chain, options = self.chain, self._options
        data = storage
        if header.has_data_file and options.layers:
            name = header.extensions.get(q.EXT_DATA_FILE)
            if not name:
                raise ImageError(f"{shown(storage.path)} does not name its external data file")
            data = self._policy.open(name, storage, "data file")
            chain.files.append(data)
        if not options.data:
            return Clusters(storage, data, header.cluster_bits, deflate(), chain.clusters)
        encryption = None
        if header.crypt_method != q.CRYPT_NONE:
            from ..decode.encryption import open_encryption

            passphrases = options.passphrases
            encryption = open_encryption(
                storage,
                header,
                passphrases.get(layer, passphrases.get(0)),
                options.words.passphrase(layer),
            )
        parts = storage, data, header.cluster_bits, self._codec(storage, header), chain.clusters
        if encryption is None:
            return Clusters(*parts)
        chain.encrypted = True
        return EncryptedClusters(encryption, *parts)

    def _codec(self, storage: Storage, header: Header) -> Codec:
        kind, codecs = header.compression, self._codecs
        if kind not in codecs:
            try:
                codecs[kind] = deflate() if kind == q.COMPRESSION_ZLIB else Zstd()
            except ImageError as e:
                raise ImageError(f"{shown(storage.path)}: {e}") from e
        return codecs[kind]

    def _below(self, storage: Storage, header: Header) -> Layer | None:
        name = header.backing_file
        options = self._options
        if name is None or not options.layers:
            return None
        recorded = header.backing_format
        form = options.backing_format if recorded is None else recorded
        if form is None:
            raw, qcow2 = (options.words.given("backing-format", f) for f in BACKING_FORMATS)
            raise UsageError(
                f"{shown(storage.path)} does not record the format of its backing file "
                f"{shown(name)}: add {raw} or {qcow2}"
            )
        if form not in BACKING_FORMATS:
            raise UsageError(
                f"the backing file {shown(name)} of {shown(storage.path)} has the format "
                f"{shown(form)}: only raw and qcow2 can be read, qemu-img convert can change it"
            )
        below = self._policy.open(name, storage, "backing file")
        if form == "qcow2":
            return self.image(below).active_disk()
        from .layers import RawLayer

        self._enter(below)
        return RawLayer(below)
