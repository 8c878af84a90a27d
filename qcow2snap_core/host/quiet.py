"""Deleting snapshots of an image that nobody uses, with qemu-img.

It gets the very file that is open here, by its descriptor, as qcow2 and nothing else, and does not
open what the image names: a hostile one could name anything.  Ctrl-C does not reach it, since it
runs in a process group of its own: what it has begun it ends.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

from ..errors import StorageError, UsageError, escaped, reason, shown
from ..format import ondisk as q
from ..format.snapshots import Snapshot
from ..image.image import Image
from ..storage.libnbd import is_uri
from ..storage.local import inode
from ..storage.locks import is_written
from .delete import called, ensure_named
from .names import seen

_KEY: Final = "key"  # what qemu-img calls the passphrase
_CIPHERS: Final = {q.CRYPT_AES: "aes", q.CRYPT_LUKS: "luks"}
#: What can be done where a QEMU uses the image.
THROUGH_QMP: Final = (
    "add --qmp SOCKET --device NODE, so that this QEMU deletes them, or shut the virtual machine "
    "down"
)


class QuietImage:
    """qemu-img, for one image."""

    def __init__(
        self, image: Image, passphrase: bytes | None = None, instead: str = THROUGH_QMP
    ) -> None:
        """``instead`` is what can be done where a QEMU uses the image.  Raises UsageError when one
        does, or the image is not here or not to be written by us."""
        if is_uri(image.path):
            raise UsageError(f"{shown(image.path)} is remote: run this where the file is")
        if image.header.has_data_file:  # qemu-img would open whatever name it has
            raise UsageError(
                f"{shown(image.path)} has an external data file: QEMU deletes none there"
            )
        self._image = image
        self._passphrase = passphrase
        self._instead = instead
        self._ensure_quiet()
        if not os.access(image.storage.absolute, os.W_OK):
            raise UsageError(
                f"{shown(image.path)} may not be written, as deleting does: run this as a user who "
                f"may"
            )

    def ensure_exact(self, there: Sequence[Snapshot], snapshot: Snapshot) -> None:
        ensure_named(there, snapshot, ": a running QEMU can be told (--qmp)")

    def delete(self, there: Sequence[Snapshot], snapshot: Snapshot) -> None:
        self._ensure_quiet()
        with ExitStack() as stack:
            file = self._open()
            stack.callback(os.close, file)
            descriptors = [file]
            secret = []
            if self._passphrase is not None:
                key = _in_memory(self._passphrase)
                stack.callback(os.close, key)
                descriptors.append(key)
                secret = ["--object", f"secret,id={_KEY},file={_path(key)}"]
            name, what = seen(snapshot.name), self._json(file)
            try:
                done = subprocess.run(
                    ["qemu-img", "snapshot", *secret, "-d", name, what],
                    capture_output=True,
                    stdin=subprocess.DEVNULL,
                    check=False,
                    pass_fds=descriptors,
                    process_group=0,
                )
            except FileNotFoundError:
                raise UsageError("qemu-img is missing: install qemu-utils") from None
        if done.returncode:
            said = os.fsdecode(done.stderr)
            for name_of_ours in (what, _path(file)):
                said = said.replace(name_of_ours, self._image.path)
            why = escaped(said.partition("\n")[0]) or f"status {done.returncode}"
            raise StorageError(f"deleting {called(snapshot)} failed: {why}")

    def _ensure_quiet(self) -> None:
        if is_written(self._image.storage):
            raise UsageError(
                f"{shown(self._image.path)} is in use, a QEMU has it open for writing: "
                f"{self._instead}"
            )

    def _open(self) -> int:
        """The file that the image was opened from.  Raises UsageError when its name leads to
        another by now."""
        path = self._image.storage.absolute
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise UsageError(f"cannot open {shown(self._image.path)}: {reason(e)}") from e
        if inode(os.fstat(fd)) != self._image.storage.inode:
            os.close(fd)
            raise UsageError(f"{shown(self._image.path)} is another file by now")
        return fd

    def _json(self, file: int) -> str:
        """The image as qemu-img opens it."""
        device = stat.S_ISBLK(os.fstat(file).st_mode)
        protocol = {"driver": "host_device" if device else "file", "filename": _path(file)}
        options: dict[str, Any] = {"driver": "qcow2", "file": protocol, "backing": None}
        if self._passphrase is not None:
            cipher = _CIPHERS[self._image.header.crypt_method]
            options["encrypt"] = {"format": cipher, "key-secret": _KEY}
        return f"json:{json.dumps(options)}"


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _in_memory(content: bytes) -> int:
    """A file that has no name, to be read from its start."""
    fd = os.memfd_create("passphrase", os.MFD_CLOEXEC)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
