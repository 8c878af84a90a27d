"""QEMU's own tools, which write the qcow2 files that this package makes.

Its ``compress`` filter lets nothing through but whole clusters, each of them once.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import IO, Any, Final

from ..errors import StorageError, UsageError, escaped
from ..format.header import Header
from ..util.interrupts import raise_if_interrupted
from .mover import THREADS
from .nbdtarget import NbdTarget

_IMAGE: Final = "QCOW2SNAP_IMAGE"
_DIRECTORY: Final = "QCOW2SNAP_DIRECTORY"
_environment: Final = Lock()  # of which a process has one for all threads


def qemu_img(*arguments: str, directory: str | None = None) -> None:
    """Run qemu-img, in that directory: QEMU takes the relative name of an external data file from
    where it runs, and not from where the image is.

    Raises StorageError with what it says, UsageError when it is missing.
    """
    raise_if_interrupted()
    try:
        done = subprocess.run(
            ["qemu-img", *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
            cwd=directory,
        )
    except FileNotFoundError:
        raise _missing("qemu-img") from None
    if done.returncode:
        raise StorageError(_first_line(done.stderr) or f"qemu-img {arguments[0]} failed")


def create(
    path: str,
    size: int,
    options: str,
    backing: tuple[str, str] | None = None,
    directory: str | None = None,
) -> None:
    """Make an empty qcow2 file; an empty file that is there keeps its permissions.

    ``options`` are those of ``qemu-img create -o``; ``backing`` the name and format of the file
    below.  Raises as :func:`qemu_img`.
    """
    below = [] if backing is None else ["-b", backing[0], "-F", backing[1]]
    line = ["create", "-q", "-f", "qcow2", "-o", f"compat=1.1,{options}", *below, path, str(size)]
    qemu_img(*line, directory=directory)


def options_like(header: Header) -> str:
    """The options that make a file with the same clusters."""
    extended = ",extended_l2=on" if header.extended_l2 else ""
    return f"cluster_size={header.cluster_size}{extended}"


@contextmanager
def writable(path: str, directory: str = "/", *, compressed: bool = False) -> Iterator[NbdTarget]:
    """The qcow2 file of an absolute path as something to write to, through a qemu-nbd that runs in
    that directory, as :func:`qemu_img` does, and ends with the block.

    It ends with its last connection, so it does not outlive a process that was killed either.
    """
    image = path
    options = ["-f", "qcow2", "--discard=unmap"]
    if compressed:
        name = path.replace(",", ",,")
        image = f"driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename={name}"
        options = ["--image-opts"]
    with tempfile.TemporaryFile() as said:
        try:
            target = NbdTarget(
                path, lambda handle: _start(handle, image, options, directory, said), THREADS
            )
        except UsageError as e:
            raise UsageError(_first_line(_content(said)) or str(e)) from e
        try:
            yield target
        finally:
            target.close()


def _start(handle: Any, image: str, options: list[str], directory: str, said: IO[bytes]) -> None:
    # libnbd starts it with our own standard error; the shell gives it another.  Should we be
    # killed before anything is connected, the kernel ends it, or the shell never starts it;
    # not with SIGTERM, which qemu-nbd forgets while it starts.
    # The image goes through the environment, since libnbd takes arguments in UTF-8 only.
    us = os.getpid()
    shell = f'[ $PPID = {us} ] && cd "${_DIRECTORY}" && exec qemu-nbd "$@" "${_IMAGE}"'
    shell += f" 2>/proc/{us}/fd/{said.fileno()}"
    starter = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", shell, "sh"]
    with _environment:
        os.environ[_IMAGE] = image
        os.environ[_DIRECTORY] = directory
        handle.connect_systemd_socket_activation([*starter, *options, "-e", str(THREADS)])


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _missing(tool: str) -> UsageError:
    return UsageError(f"{tool} is missing: install qemu-utils")


def _first_line(said: bytes) -> str:
    lines = said.decode("utf-8", "surrogateescape").strip().splitlines()
    return escaped(lines[0]) if lines else ""
