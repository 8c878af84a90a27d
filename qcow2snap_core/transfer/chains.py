"""Images that become other ones: what has to hold for that, and what they record of each other."""

from __future__ import annotations

import os
from typing import Final

from ..errors import UsageError, shown
from ..image.disk import Disk
from ..image.image import Image
from ..storage.libnbd import is_uri
from ..storage.locks import ensure_not_written
from .judge import Place


def kept_backing(image: Image, directory: str) -> tuple[str, str]:
    """The name and format of FILE's own backing file, as an image in the directory needs them."""
    storage, layer = image.chain[1]
    form = "qcow2" if isinstance(layer, Disk) else "raw"
    name = os.fsdecode(image.header.backing_file or b"").removeprefix("file:")
    if os.path.isabs(name):
        return name, form
    return relative(
        os.path.relpath(os.path.realpath(storage.path), os.path.realpath(directory))
    ), form


#: What there is for an image that is in use.
BACKED_UP: Final = ", or use backup and then restore, which leave out the active disk"


def relative(name: str) -> str:
    """A file's name as one image records that of another: QEMU takes what is before a ``:`` for
    a protocol, unless there is a ``/`` before it."""
    return f"./{name}" if ":" in name else name


def check_source(image: Image, place: Place, instead: str = "") -> None:
    """Raises UsageError unless all of an image, its active disk too, can be made into something
    else at that place; ``instead`` as for :func:`.ensure_not_written`."""
    place.ensure_apart(image.files)
    if is_uri(image.path):  # of which nobody can tell whether its active disk is being written
        raise UsageError(f"{shown(image.path)} is remote: copy the image to a local file first")
    ensure_not_written(image.files, instead)
