"""What a name inside an image may open.

An image names its backing file and its external data file, and whoever made the image chose the
names.  So each name is first resolved to the file that it opens (:func:`.local.open_storage` passes
the real path and the inode of that file).  Then the file must lie in the directory of the image
that names it, in one below, or in one that the user trusts with ``allow-dir=``; or it must be a
file or device that the user trusts with ``allow-file=``.  Protocol names, which QEMU would follow
to a network server or into a ``json:`` tree, are refused outright.

A block device has no directory of its own.  All devices of a machine are in ``/dev``, and those of
LVM are ``/dev/dm-0``, ``/dev/dm-1``, …, whatever their group: so "in the image's directory" would
allow every disk.  Therefore an image on a device allows nothing by itself, and no image allows a
device because of its directory; only ``allow-dir=`` and ``allow-file=`` do.  As in QEMU, relative
names in an image on a device start in the directory of the name by which the device was opened,
since the names of its chain are there too (``/dev/group/base``).  They are resolved and checked
like all others.

``allow-file=`` is resolved when the image is opened, and stands for that one file by its inode, or
for that one device by its number, under whatever name an image knows it.

An image behind NBD lies in no directory of this machine, so all that it names must be absolute and
allowed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from ..errors import UsageError, escaped, reason, shown
from ..util.wording import PLUGIN, Wording
from .local import DEVICE, Storage, inode, kind_name, open_storage


class Policy:
    """What may be referenced besides what lies in the image's own directory."""

    def __init__(
        self,
        allow_dirs: Iterable[str] = (),
        allow_files: Iterable[str] = (),
        words: Wording = PLUGIN,
    ) -> None:
        """``allow_dirs``: existing directories; ``allow_files``: existing regular files and block
        devices.  Raises UsageError for one that is not."""
        self._words = words
        self._directories = tuple(_directory(d, words) for d in allow_dirs)
        self._files = frozenset(_file(f, words) for f in allow_files)

    def open(self, name: bytes, image: Storage, role: str) -> Storage:
        """Open the file that ``image`` names as its ``role`` ("backing file", "data file").

        Raises UsageError when the policy refuses it or it cannot be opened.
        """

        def permit(real: str, which: tuple[int, int]) -> None:
            is_device = which[0] == DEVICE
            own = () if is_device or image.trusted is None else (image.trusted,)
            lies_in = any(is_below(real, directory) for directory in (*own, *self._directories))
            if not lies_in and which not in self._files:
                raise UsageError(_refusal(name, path, real, is_device, image, self._words))

        try:
            path = _joined(image.directory, _plain_path(name), self._words)
            return open_storage(path, permit)
        except UsageError as e:
            raise UsageError(f"the {role} of {shown(image.path)}: {e}") from e


def _refusal(
    name: bytes, path: str, real: str, is_device: bool, image: Storage, words: Wording
) -> str:
    """Why it was refused, and what allows it: the least first that makes sense.  A link is named as
    the image has it and as what it leads to."""
    which = shown(real)
    if os.fsdecode(name) != real:
        which = f"{shown(name)}, which leads to {which},"
    if is_device:
        return (
            f"{which} is a block device, and those are in no image's directory: "
            f"add {_file_setting(words, _lasting_name(path, real))} if you trust it"
        )
    why = "lies outside the directory of the image that names it"
    if image.trusted is None:
        why = "is named by an image that is itself in no directory"
    return (
        f"{which} {why}: add {words.given('allow-dir', escaped(os.path.dirname(real)))} if you "
        f"trust it, or {_file_setting(words, real)} for this file alone"
    )


def _file_setting(words: Wording, path: str) -> str:
    return words.given("allow-file", escaped(path))


def _lasting_name(path: str, real: str) -> str:
    """What a device is called tomorrow too, ``/dev/group/volume`` and not ``/dev/dm-3``; but only
    root may have made that name."""
    directory, name = os.path.split(path)
    lasting = os.path.join(os.path.realpath(directory), name)
    trusted = is_below(lasting, "/dev") and os.lstat(lasting).st_uid == 0
    return lasting if trusted else real


def _directory(path: str, words: Wording) -> str:
    try:
        os.scandir(path).close()
    except OSError as e:
        raise UsageError(
            f"{words.given('allow-dir', escaped(path))}: {reason(e)}: give an existing directory"
        ) from e
    return os.path.realpath(path)


def _file(path: str, words: Wording) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as e:
        raise UsageError(
            f"{_file_setting(words, path)}: {reason(e)}: give an existing file or block device"
        ) from e
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise UsageError(
            f"{_file_setting(words, path)}: it is a {kind_name(status.st_mode)}: give a regular "
            f"file or a block device"
        )
    return inode(status)


def _joined(directory: str | None, path: str, words: Wording) -> str:
    if directory is None and not os.path.isabs(path):
        raise UsageError(
            f"{shown(path)} is relative, and an image behind NBD lies in no directory: copy the "
            f"whole chain here, or record an absolute name and give it to "
            f"{words.name('allow-file')}"
        )
    return os.path.join(directory or "/", path)


def is_below(path: str, directory: str) -> bool:
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
