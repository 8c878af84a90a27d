"""Decoders for compressed clusters: small classes behind one interface.

A compressed cluster is a stream followed by whatever fills its last sector.  It must decode to
exactly one cluster: a stream that is damaged, ends early or goes on past the cluster is an error.
All decoders release the interpreter while they work.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from threading import Lock

from ..errors import ImageError
from ..typed import Any, Final
from ..util.pool import Pool


class Codec:
    """One way to decode one compression format; safe to use from several threads."""

    #: the same, by the same library, in the native engine, which leaves to this one what it refuses
    native: str | None = None

    def decode_into(self, stream: bytes, target: memoryview) -> None:
        """Fill ``target`` with what ``stream`` decodes to; trailing bytes are ignored.

        Raises ImageError for a stream that does not give exactly that much.
        """
        raise NotImplementedError

    def decode(self, stream: bytes, size: int) -> bytearray:
        """The ``size`` bytes that ``stream`` decodes to; raises as :meth:`decode_into`."""
        data = bytearray(size)
        with memoryview(data) as target:
            self.decode_into(stream, target)
        return data


class Zlib(Codec):
    """Raw deflate in a window of 4 KiB (QEMU: qcow2_zlib_decompress)."""

    def decode_into(self, stream: bytes, target: memoryview) -> None:
        size = len(target)
        decoder = zlib.decompressobj(wbits=-12)
        try:
            # One byte more than there may be, so that the end of the stream is seen too.
            data = decoder.decompress(stream, size + 1)
        except zlib.error as e:
            raise ImageError(f"its deflate stream is damaged ({e})") from e
        if len(data) > size:
            raise _too_long()
        if len(data) < size or not decoder.eof:
            raise _too_short(len(data), size)
        target[:] = data


class Libdeflate(Codec):
    """The same format by libdeflate, which decodes a whole buffer at once: three times zlib's
    speed on clusters of 64 KiB.  Raises OSError where the library is not installed."""

    native = "deflate"
    _INSUFFICIENT_SPACE: Final = 3

    def __init__(self) -> None:
        library = ctypes.CDLL("libdeflate.so.0")
        library.libdeflate_alloc_decompressor.restype = ctypes.c_void_p
        self._decompress = library.libdeflate_deflate_decompress
        self._decompress.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_size_t),
        ]
        self._contexts: Pool[int] = Pool(library.libdeflate_alloc_decompressor)

    def decode_into(self, stream: bytes, target: memoryview) -> None:
        size = len(target)
        got = ctypes.c_size_t()
        context = self._contexts.take()
        if not context:
            raise MemoryError
        start = (ctypes.c_char * size).from_buffer(target)
        failed = self._decompress(context, stream, len(stream), start, size, ctypes.byref(got))
        self._contexts.give(context)
        if failed == self._INSUFFICIENT_SPACE:
            raise _too_long()
        if failed:
            raise ImageError("its deflate stream is damaged or ends too early")
        if got.value < size:
            raise _too_short(got.value, size)


class Zstd(Codec):
    """One zstd frame, with or without its size in it (QEMU: qcow2_zstd_decompress)."""

    native = "zstd"
    # A window is memory of the decoder.  A frame that gives its size is decoded without one, and
    # QEMU's frames do; another may ask for 2 GiB.  What every decoder should accept (RFC 8878) is
    # too much for each of many threads: beyond the largest cluster, one at a time.
    _MAX_WINDOW: Final = 8 << 20
    _USUAL_WINDOW: Final = 2 << 20

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError as e:
            raise ImageError(
                "its clusters are compressed with zstd: install python3-zstandard"
            ) from e
        self._error = zstandard.ZstdError
        self._parameters = zstandard.get_frame_parameters
        self._unknown = zstandard.CONTENTSIZE_UNKNOWN
        self._contexts: Pool[Any] = Pool(
            lambda: zstandard.ZstdDecompressor(max_window_size=self._USUAL_WINDOW)
        )
        self._large = zstandard.ZstdDecompressor(max_window_size=self._MAX_WINDOW)
        self._one_large = Lock()

    def decode_into(self, stream: bytes, target: memoryview) -> None:
        size = len(target)
        try:
            frame = self._parameters(stream)
            if frame.content_size not in (size, self._unknown):  # or that much would be allocated
                if frame.content_size > size:
                    raise _too_long()
                raise _too_short(frame.content_size, size)
            if frame.window_size > self._USUAL_WINDOW:
                with self._one_large:
                    data = self._large.decompress(stream, max_output_size=size)
            else:
                context = self._contexts.take()
                try:
                    data = context.decompress(stream, max_output_size=size)
                finally:
                    self._contexts.give(context)
        except self._error as e:
            raise ImageError(f"its zstd frame is damaged or goes on past the cluster ({e})") from e
        if len(data) < size:
            raise _too_short(len(data), size)
        target[:] = data


def deflate() -> Codec:
    """The fastest decoder of deflate that is installed."""
    try:
        return Libdeflate()
    except OSError:
        return Zlib()


def available() -> dict[str, bool]:
    """Which optional decoders are installed, by the names that ``--dump-plugin`` uses."""
    makers: dict[str, Callable[[], Codec]] = {"zlib_libdeflate": Libdeflate, "zstd": Zstd}
    return {name: _can(maker) for name, maker in makers.items()}


def _can(make: Callable[[], Codec]) -> bool:
    try:
        make()
    except (OSError, ImageError):
        return False
    return True


def _too_long() -> ImageError:
    return ImageError("its compressed stream goes on past the cluster")


def _too_short(got: int, size: int) -> ImageError:
    return ImageError(f"its compressed stream ends after {got} of {size} bytes")
