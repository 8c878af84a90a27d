"""What the bytes of a run are: read as they stand, or decoded and kept for the next request.

This module decides what a short read means.  The part of a cluster that a guest can see lies inside
the file, whichever version of QEMU wrote it (docs/validation.md, "The end of the file"), so bytes
of a standard cluster past the end of the file are lost.  A compressed stream is recorded in whole
sectors, of which QEMU writes only the bytes that are used: only the decoder can tell whether
something is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import BoundedSemaphore

from ..decode.codecs import Codec
from ..errors import ImageError
from ..format import ondisk as q
from ..storage.local import Buffer, Storage
from ..typed import TYPE_CHECKING, Any, Final, TypeVar
from ..util.cache import BoundedCache

if TYPE_CHECKING:
    from ..decode.encryption import Encryption

#: Decoded clusters by (token of the mapping, guest offset of the cluster).
ClusterCache = BoundedCache[tuple[int, int], bytearray]

_T = TypeVar("_T")

_DECRYPTED: Final = 1 << 20  # at once
_ZEROS = memoryview(bytes(1 << 20))

# A cluster of 2 MiB is decoded with up to 10 MiB at hand, its stream, what comes out and the
# decoder's window: that must not be multiplied by the number of clients.
_LARGE: Final = 256 << 10
_LARGE_TURNS: Final = BoundedSemaphore(3)


class _Everybody:
    """What need not be waited for; contextlib.nullcontext would be a module more at every start."""

    def __enter__(self) -> None:
        return

    def __exit__(self, *raised: object) -> None:
        return


_EVERYBODY: Final = _Everybody()


def fill_zeros(view: memoryview) -> None:
    """Overwrite a buffer with zeros, without making a second one of its size."""
    for at in range(0, len(view), len(_ZEROS)):
        piece = view[at : at + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


def _end(storage: Storage, offset: int, got: int) -> int:
    """Where the file ended when a read at ``offset`` got that few bytes: after them, and after
    none at all perhaps far before."""
    return offset + got if got else min(offset, storage.size())


def _stream_past_end(offset: int, end: int) -> ImageError:
    return ImageError(
        f"the compressed cluster at host offset {offset:#x} "
        f"lies past the end of the file ({end} bytes)"
    )


class Clusters:
    """Reads the data of one qcow2 file's clusters."""

    def __init__(
        self,
        metadata: Storage,
        data: Storage,
        cluster_bits: int,
        codec: Codec,
        cache: ClusterCache,
    ) -> None:
        """``metadata`` is the image file, ``data`` the file that holds its standard clusters."""
        self._file = metadata
        self._data = data
        self._size = 1 << cluster_bits
        self._codec = codec
        self._cache = cache
        self._turn = _EVERYBODY if self._size < _LARGE else _LARGE_TURNS
        self._decoder = codec.native if self._size < _LARGE else None  # which takes no turns
        # The descriptor's layout (spec: "Compressed Clusters Descriptor").
        self._offset_bits = 62 - (cluster_bits - 8)
        self._offset_mask = (1 << self._offset_bits) - 1
        self._sectors_mask = (1 << cluster_bits - 8) - 1

    def description(self) -> tuple[Any, ...] | None:
        """What :mod:`.native` tells the engine of the data: a file descriptor, the decoded
        clusters, how standard ones are encrypted, and how others are decoded; None where it cannot
        read that."""
        fd = self._data.plain_fd
        return None if fd is None else (fd, self._cache.items, False, None, self._decoder)

    @property
    def plain_fd(self) -> int | None:
        """A descriptor that has the standard clusters as the guest sees them, if there is one."""
        return self._data.plain_fd

    def read(self, buffer: Buffer, host: int, guest: int) -> None:
        """Fill ``buffer`` from the standard clusters at host offset ``host``, which the guest
        sees at ``guest``.  Raises ImageError past the end of the file, StorageError."""
        got = self._data.read_into(buffer, host)
        if got < len(buffer):
            raise self._past_end(host, _end(self._data, host, got))

    def read_compressed(
        self, view: memoryview, descriptor: int, token: int, guest: int, within: int
    ) -> None:
        """Fill ``view`` from byte ``within`` of the compressed cluster at guest offset ``guest``,
        decoding it unless it is in the cache.

        Who asks for all of a cluster will not ask for it again soon: it is decoded where it is
        wanted, and what others read in small pieces stays in the cache.
        """
        cluster = self._cache.get((token, guest))
        if cluster is not None:
            view[:] = memoryview(cluster)[within : within + len(view)]
            return
        with self._turn:  # until the cluster is let go of again
            if len(view) == self._size:
                self._decode(descriptor, lambda stream: self._codec.decode_into(stream, view))
            else:
                view[:] = memoryview(self._load(descriptor, token, guest))[
                    within : within + len(view)
                ]

    def load(self, descriptor: int, token: int, guest: int) -> bytearray:
        """The decoded cluster, which the cache then holds."""
        with self._turn:
            return self._load(descriptor, token, guest)

    def will_need(self, host: int, length: int) -> None:
        """Start to fetch standard clusters from the disk."""
        self._data.will_need(host, length)

    def locate(self, compressed: bool, location: int, length: int) -> int:
        """The host offset of a run's bytes, once it is sure that the file reaches that far; of a
        compressed cluster, that its stream begins in the file.

        Raises ImageError where it does not.  A remote file's size may be that of a moment ago, so
        what seems to be missing is asked for.
        """
        if not compressed:
            end = self._data.size()
            if location + length > end and not self._data.read(1, location + length - 1):
                raise self._past_end(location, self._data.size())
            return location
        offset, length = self.stream(location)
        self._check_start(offset)
        if offset >= self._file.size() and not self._file.read(1, offset):
            raise _stream_past_end(offset, self._file.size())
        return offset

    def inside(self, host: int, length: int) -> int:
        """How many bytes of a run of standard clusters are in the file; whole sectors, where it
        has not all of them."""
        try:
            self.locate(False, host, length)
        except ImageError:
            return max(0, self._data.size() - host) // q.SECTOR * q.SECTOR
        return length

    # --- Inside ---

    def _load(self, descriptor: int, token: int, guest: int) -> bytearray:
        def decoded() -> bytearray:
            return self._decode(descriptor, lambda stream: self._codec.decode(stream, self._size))

        return self._cache.load((token, guest), decoded, self._size)

    def _decode(self, descriptor: int, decode: Callable[[bytes], _T]) -> _T:
        """What ``decode`` makes of the stream; its errors say where that is."""
        offset, length = self.stream(descriptor)
        self._check_start(offset)
        stream = self._file.read(length, offset)
        if not stream:
            raise _stream_past_end(offset, _end(self._file, offset, 0))
        try:
            return decode(stream)
        except ImageError as e:
            cut = len(stream) + q.SECTOR <= length  # the rest of the last sector is no loss
            end = f" (cut off at the end of the file, {offset + len(stream)} bytes)" if cut else ""
            raise ImageError(f"the compressed cluster at host offset {offset:#x}: {e}{end}") from e

    def stream(self, descriptor: int) -> tuple[int, int]:
        """(host offset, length in bytes up to the end of its last sector) of a compressed
        cluster's stream."""
        offset = descriptor & self._offset_mask
        sectors = (descriptor >> self._offset_bits & self._sectors_mask) + 1
        return offset, sectors * q.SECTOR - offset % q.SECTOR

    def _check_start(self, offset: int) -> None:
        if offset < self._size:
            raise ImageError(f"the compressed cluster at host offset {offset:#x} is in the header")

    def _past_end(self, host: int, end: int) -> ImageError:
        """The first cluster, from the one at ``host`` on, that is not wholly in the file."""
        cluster = max(host, end) & -self._size
        how = "lies past" if cluster >= end else "is cut off at"
        return ImageError(
            f"the data cluster at host offset {cluster:#x} {how} the end of the file ({end} bytes)"
        )


class EncryptedClusters(Clusters):
    """The same with standard clusters that are encrypted, sector by sector."""

    def __init__(self, encryption: Encryption, *parts: Any) -> None:
        """``parts`` as for :class:`Clusters`."""
        super().__init__(*parts)
        self._encryption = encryption

    @property
    def plain_fd(self) -> int | None:
        return None

    def description(self) -> tuple[Any, ...] | None:
        from ..decode.native import NativeCipher

        cipher, by_guest_offset = self._encryption
        fd = self._data.plain_fd
        if fd is None or not isinstance(cipher, NativeCipher):
            return None
        return fd, self._cache.items, by_guest_offset, cipher.handle, self._decoder

    def read(self, buffer: Buffer, host: int, guest: int) -> None:
        length, lead = len(buffer), host % q.SECTOR
        if not lead and not length % q.SECTOR:
            super().read(buffer, host, guest)
            sector = (guest if self._encryption.by_guest_offset else host) // q.SECTOR
            self._decrypt(memoryview(buffer).cast("B"), sector)
            return
        # Whole sectors go where they are wanted, and only a part of one through a buffer of its
        # own: a client may ask for 64 MiB from an odd offset.
        view = memoryview(buffer).cast("B")
        at = 0
        while at < length:
            lead = (host + at) % q.SECTOR
            if lead or length - at < q.SECTOR:
                whole = memoryview(bytearray(q.SECTOR))
                self.read(whole, host + at - lead, guest + at - lead)
                n = min(q.SECTOR - lead, length - at)
                view[at : at + n] = whole[lead : lead + n]
            else:
                n = (length - at) // q.SECTOR * q.SECTOR
                self.read(view[at : at + n], host + at, guest + at)
            at += n

    def _decrypt(self, view: memoryview, sector: int) -> None:
        """A piece at a time: the ciphers need several times the memory of what they are given."""
        for at in range(0, len(view), _DECRYPTED):
            self._encryption.cipher.decrypt(view[at : at + _DECRYPTED], sector + at // q.SECTOR)
