"""What a name inside an image may open.

An image names its backing file and its external data file, and whoever made the image chose the
names.  So each is resolved to the real file first (:func:`.storage.open_storage` asks with the
path of what it holds, symlinks gone), and then it must lie in the directory of the image that
names it, in one below, or in one that the user trusts with ``allow-dir=``.  Protocol names, which
QEMU would follow to a network server or into a ``json:`` tree, are refused outright.

An image behind NBD lies in no directory of this machine, so all that it names must be absolute and
in an ``allow-dir=``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from .errors import UsageError, escaped, reason, shown
from .storage import Storage, open_storage


class Policy:
    """The directories in which referenced files may lie, besides the image's own."""

    def __init__(self, allow_dirs: Iterable[str] = ()) -> None:
        """``allow_dirs``: existing directories.  Raises UsageError for one that is not."""
        self._allowed = tuple(_directory(d) for d in allow_dirs)

    def open(self, name: bytes, image: Storage, role: str) -> Storage:
        """Open the file that ``image`` names as its ``role`` ("backing file", "data file").

        Raises UsageError when the policy refuses it or it cannot be opened.
        """

        def permit(real: str) -> None:
            own = () if image.directory is None else (image.directory,)
            if not any(_lies_in(real, directory) for directory in (*own, *self._allowed)):
                which = f"{shown(name)}, which leads to {shown(real)},"
                raise UsageError(
                    f"{shown(real) if os.fsdecode(name) == real else which} lies outside the "
                    f"directory of the image that names it: "
                    f"add allow-dir={escaped(os.path.dirname(real))} if you trust it"
                )

        try:
            return open_storage(_joined(image.directory, _plain_path(name)), permit)
        except UsageError as e:
            raise UsageError(f"the {role} of {shown(image.path)}: {e}") from e


def _directory(path: str) -> str:
    try:
        os.scandir(path).close()
    except OSError as e:
        raise UsageError(
            f"allow-dir={escaped(path)}: {reason(e)}: give an existing directory"
        ) from e
    return os.path.realpath(path)


def _joined(directory: str | None, path: str) -> str:
    if directory is None and not os.path.isabs(path):
        raise UsageError(
            f"{shown(path)} is relative, and an image behind NBD lies in no directory: copy the "
            f"whole chain here, or record an absolute name and give its directory to allow-dir="
        )
    return os.path.join(directory or "/", path)


def _lies_in(path: str, directory: str) -> bool:
    """Compared by whole components: /srv/images-old does not lie in /srv/images."""
    if not path.startswith("/"):  # "(unreachable)/…": it is below no directory that has a name
        return False
    return os.path.commonpath((path, directory)) == directory


def _plain_path(name: bytes) -> str:
    """The path that the image's name means, relative ones not yet joined (QEMU's
    path_has_protocol: a protocol name has a ``:`` before its first ``/``)."""
    if name.startswith(b"file:"):  # QEMU's way to name a file with a colon: file:a:b
        return os.fsdecode(name.removeprefix(b"file:"))
    if b":" in name.split(b"/", 1)[0]:
        raise UsageError(
            f"{shown(name)} is a protocol name, only plain files are opened: "
            f"qemu-img rebase -u can record a file's name"
        )
    return os.fsdecode(name)
