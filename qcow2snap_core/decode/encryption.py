"""How an image's clusters are encrypted: LUKS, or the AES of qcow2's first years.

LUKS numbers the sectors by where they lie in the file, the old scheme by where the guest sees
them.  Metadata and compressed clusters are never encrypted (spec: "crypt_method").
"""

from __future__ import annotations

from ..errors import ImageError, UsageError, shown
from ..format import ondisk as q
from ..format.header import Header
from ..storage.local import Storage
from ..typed import TYPE_CHECKING, NamedTuple
from .native import make_cipher

if TYPE_CHECKING:
    from .ciphers import SectorCipher


def available() -> bool:
    """Whether what deciphers images is installed."""
    import importlib.util

    return importlib.util.find_spec("cryptography") is not None


class Encryption(NamedTuple):
    """A cipher, and which offset numbers its sectors."""

    cipher: SectorCipher
    by_guest_offset: bool


def open_encryption(
    storage: Storage, header: Header, passphrase: bytes | None, advice: str
) -> Encryption | None:
    """The encryption of an image, or None.  ``advice`` is how the user gives the passphrase.

    Raises UsageError for a passphrase that is missing or wrong, ImageError for a damaged header.
    """
    if header.crypt_method == q.CRYPT_NONE:
        return None
    if passphrase is None:
        raise UsageError(f"{shown(storage.path)} is encrypted: add {advice}")
    try:
        from . import luks
        from .ciphers import CbcSectors, Plain
    except ImportError as e:
        raise ImageError(
            f"{shown(storage.path)} is encrypted: install python3-cryptography ({e})"
        ) from e
    if header.crypt_method == q.CRYPT_AES:
        # The passphrase is the key, cut or padded to 128 bits: a wrong one cannot be told.
        aes_key = passphrase[:16].ljust(16, b"\0")
        native = make_cipher("cbc", aes_key, 64)
        return Encryption(native or CbcSectors(aes_key, Plain(64)), True)
    if header.crypto_area is None:
        raise ImageError(f"{shown(storage.path)}: it does not say where its LUKS header is")
    offset, length = header.crypto_area
    inside = 0 < offset < storage.size() and not offset % header.cluster_size
    if not inside or not 0 < length <= q.MAX_LUKS_BYTES:
        raise ImageError(
            f"{shown(storage.path)}: its LUKS header, {length} bytes at host offset "
            f"{offset:#x}, cannot be there"
        )
    area = storage.read(length, offset)
    return Encryption(luks.open_luks(area, passphrase, storage.path), False)
