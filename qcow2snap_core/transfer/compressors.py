"""Compressing clusters as QEMU does, and how long a compressed one really is.

An L2 entry counts sectors, so what it leads to may have up to 511 bytes behind the stream, or some
of the next one.  Where streams are moved, only the stream itself is.
"""

from __future__ import annotations

import zlib
from typing import Any, Final, Protocol

from ..errors import ImageError, UsageError
from ..format import ondisk as q

COMPRESSIONS: Final = {"zlib": q.COMPRESSION_ZLIB, "zstd": q.COMPRESSION_ZSTD}


class Compressor(Protocol):
    """One compression format; used by several threads at a time."""

    def compress(self, cluster: memoryview) -> bytes:
        """The stream of a cluster."""

    def length(self, stream: bytes, size: int) -> int:
        """How many bytes of what a cluster of that size is read from are its stream.  Raises
        ImageError where it does not end."""


class ZlibCompressor:
    """Raw deflate in a window of 4 KiB (QEMU: qcow2_zlib_compress)."""

    def compress(self, cluster: memoryview) -> bytes:
        compressor = zlib.compressobj(method=zlib.DEFLATED, wbits=-12)
        return compressor.compress(cluster) + compressor.flush()

    def length(self, stream: bytes, size: int) -> int:
        decoder = zlib.decompressobj(wbits=-12)
        try:
            decoder.decompress(stream, size + 1)
        except zlib.error as e:
            raise ImageError(f"its deflate stream is damaged ({e})") from e
        if not decoder.eof:
            raise ImageError("its deflate stream does not end with the cluster")
        return len(stream) - len(decoder.unused_data)


class ZstdCompressor:
    """One zstd frame (QEMU: qcow2_zstd_compress)."""

    _BLOCK_HEADER: Final = 3  # RFC 8878, 3.1.1.2
    _RLE: Final = 1
    _CHECKSUM: Final = 4

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError as e:
            raise UsageError("zstd is wanted: install python3-zstandard") from e
        self._zstandard: Any = zstandard

    def compress(self, cluster: memoryview) -> bytes:
        # A compressor serves one thread at a time; to make one costs little beside its work.
        stream: bytes = self._zstandard.ZstdCompressor().compress(cluster)
        return stream

    def length(self, stream: bytes, size: int) -> int:
        """By the headers of the blocks, without decoding any."""
        try:
            at: int = self._zstandard.frame_header_size(stream)
            checksum = self._zstandard.get_frame_parameters(stream).has_checksum
        except self._zstandard.ZstdError as e:
            raise ImageError(f"its zstd frame is damaged ({e})") from e
        last = False
        while not last:
            header = int.from_bytes(stream[at : at + self._BLOCK_HEADER], "little")
            last = bool(header & 1)
            at += self._BLOCK_HEADER + (1 if header >> 1 & 3 == self._RLE else header >> 3)
            if at > len(stream):
                raise ImageError("its zstd frame does not end with the cluster")
        return at + (self._CHECKSUM if checksum else 0)


def compressor(kind: int) -> Compressor:
    """For COMPRESSION_ZLIB or COMPRESSION_ZSTD.  Raises UsageError when it is not installed."""
    return ZlibCompressor() if kind == q.COMPRESSION_ZLIB else ZstdCompressor()
