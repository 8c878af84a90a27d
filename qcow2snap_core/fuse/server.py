"""A mount, from its beginning to its end, whichever end that is.

pyfuse3 brings the kernel's requests; docs/mount.md says why it is this library.  Its loop runs in
the main thread, under asyncio.  The end may be a signal, an unmount by somebody else, or a defect;
and when this program is killed, a fusermount3 that waits for that unmounts (``auto_unmount``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, Final
from urllib.parse import quote

import pyfuse3

from ..errors import StorageError, UsageError, escaped, reason, shown
from ..files.volumes import How
from ..host.mount import Ready, check_directory
from ..host.nbdkit import missing
from ..image.image import Image
from ..util.interrupts import raise_if_interrupted, waking
from .operations import Operations, Say, end
from .tree import Root

_THREADS: Final = 8
#: Requests that wait at once; more are left to the kernel, whoever they are for
_REQUESTS: Final = 512
_DEVICE: Final = "/dev/fuse"
#: More than libfuse, the loop and what wakes it up need; asyncio, which leaves a heap of complaints
#: behind where it does not get its own, is not even begun without them
_DESCRIPTORS: Final = 16


def mount_all(image: Image, directory: str, how: How, ready: Ready, warn: Say) -> None:
    """Show all snapshots in ``directory`` until it is unmounted or this is interrupted.

    Raises UsageError for a directory that will not do, and for what is missing, StorageError with
    what libfuse says when it cannot mount.
    """
    check_directory(directory)
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise UsageError(f"{_DEVICE} cannot be used here: the kernel's FUSE is needed to mount")
    if shutil.which("fusermount3") is None:
        raise missing("fusermount3", "fuse3")
    _ensure_descriptors()
    # What it says of requests whose asker was killed is of no interest.
    logging.getLogger("pyfuse3").setLevel(logging.CRITICAL)
    _asyncio().enable()
    pool = ThreadPoolExecutor(_THREADS)
    operations = Operations(Root(image, how), image.storage, pool, warn)
    _mount(operations, directory, image.path)
    try:
        # Threads that have something to tell the kernel end before it is let go.
        with waking() as woken, pool:
            raise_if_interrupted()
            asyncio.run(_answer(operations, woken, lambda: ready(directory)))
    finally:
        pyfuse3.close(unmount=True)
    if operations.failure is not None:
        raise operations.failure
    raise_if_interrupted()


def _ensure_descriptors() -> None:
    """Raises UsageError when there are too few for a mount."""
    with ExitStack() as held:
        for had in range(_DESCRIPTORS):
            try:
                held.callback(os.close, os.dup(2))
            except OSError as e:
                raise UsageError(
                    f"{reason(e)}: a mount needs {_DESCRIPTORS - had} more, raise ulimit -n"
                ) from e


def _asyncio() -> Any:
    """pyfuse3's module, which had another name before 3.3."""
    try:
        return import_module("pyfuse3.asyncio")
    except ModuleNotFoundError:
        return import_module("pyfuse3_asyncio")


def _mount(operations: Operations, directory: str, name: str) -> None:
    """Raises StorageError with what libfuse prints."""
    options = {"ro", "nosuid", "nodev", "auto_unmount", "subtype=qcow2snap"}
    options.add(f"fsname={quote(os.path.abspath(name))}")
    with open(os.memfd_create("qcow2snap"), "r+b") as said:
        with _errors_into(said.fileno()):
            try:
                pyfuse3.init(operations, os.path.abspath(directory), options)
                return
            except RuntimeError as e:
                failed = e
        said.seek(0)
        lines = said.read().splitlines() or [str(failed).encode()]
        raise StorageError(f"cannot mount on {shown(directory)}: {escaped(lines[0])}") from failed


@contextmanager
def _errors_into(descriptor: int) -> Iterator[None]:
    """What is written to standard error goes there."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


async def _answer(operations: Operations, woken: int, ready: Callable[[], None]) -> None:
    """Until the end."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_reader(woken)
        end()

    loop.add_reader(woken, interrupted)
    requests = asyncio.create_task(pyfuse3.main(max_tasks=_REQUESTS))
    watching = asyncio.create_task(operations.watch())
    watching.add_done_callback(operations.unwatched)
    ready()
    try:
        await requests
    finally:
        watching.cancel()
        loop.remove_reader(woken)
