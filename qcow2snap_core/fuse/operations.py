"""FUSE's requests, answered by the entries of the tree.

One thread, with a loop of events, talks to the kernel; the entries are asked in a pool of others,
so that a slow read keeps nobody else waiting.  A disk is read by all of them at once.  A guest's
filesystem is asked by one at a time, and those whose turn it is not wait in the loop, without a
thread: the other snapshots, and the other partitions, stay as fast as they were.

The kernel keeps what it was told.  Below a snapshot's directory that may be for ever, since a
snapshot does not change; but when one is deleted, what is kept of it has to go.  So once a second
those that somebody has looked into are confirmed.  Their names are asked for again after a moment:
each path begins with one, and a listing has thousands of paths.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar

import pyfuse3

from ..errors import Error
from ..storage.local import Storage
from .entries import Attributes, Children, Entry, Readable
from .tree import Root, SnapshotDirectory
from .volume import NotThere

_T = TypeVar("_T")
Say = Callable[[str], None]

_LONG: Final = 3600.0  # seconds
_MOMENT: Final = 0.2
_WATCH: Final = 1.0
#: Entries of a directory that are asked for together: the kernel's page has room for 25
_AT_ONCE: Final = 32
_BLOCK: Final = 512
_SECOND: Final = 10**9
#: Seconds: the kernel has 63 bits for them, and pyfuse3's floating point may round up
_LATEST: Final = 1 << 62
#: Of each message one is enough: the kernel asks again, and so do programs
_MOST_SAID: Final = 1000


class _Inodes:
    """Which entry an inode number stands for, as long as the kernel knows it."""

    def __init__(self, root: Entry) -> None:
        self._numbers: dict[object, int] = {root.key: pyfuse3.ROOT_INODE}
        self._entries: dict[int, Entry] = {pyfuse3.ROOT_INODE: root}
        self._counts: dict[int, int] = {pyfuse3.ROOT_INODE: 1 << 64}  # it is never forgotten
        self._next = count(pyfuse3.ROOT_INODE + 1)

    def __getitem__(self, number: int) -> Entry:
        return self._entries[number]

    def number(self, entry: Entry) -> int:
        """Its number; to be followed by :meth:`told` or :meth:`forget`."""
        number = self._numbers.get(entry.key)
        if number is None:
            number = self._numbers[entry.key] = next(self._next)
            self._entries[number] = entry
            self._counts[number] = 0
        return number

    def told(self, number: int) -> None:
        """The kernel was told of it once more."""
        self._counts[number] += 1

    def forget(self, number: int, times: int) -> None:
        """The kernel has forgotten that it was told, so many times."""
        self._counts[number] -= times
        if self._counts[number] <= 0:
            del self._counts[number], self._numbers[self._entries.pop(number).key]

    def of(self, owners: list[Any]) -> list[int]:
        """The numbers of all that belongs to these snapshots."""
        return [n for n, entry in self._entries.items() if entry.owner in owners]


class Operations(pyfuse3.Operations):  # type: ignore[misc]
    """The requests of one mount, which are all made in the loop's thread."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, root: Root, storage: Storage, pool: Executor, warn: Say) -> None:
        super().__init__()
        self._root = root
        self._storage = storage
        self._pool = pool
        self._warn = warn
        self._said: set[str] = set()
        self._inodes = _Inodes(root)
        self._handles = count(1)
        self._files: dict[int, tuple[Entry, Readable]] = {}
        self._directories: dict[int, tuple[Entry, Children]] = {}
        #: a defect of ours, which ends the mount
        self.failure: BaseException | None = None

    # --- Names and attributes ---

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> Any:
        child, attributes = await self._ask(self._inodes[parent], lambda e: _with(e.child(name)))
        number = self._inodes.number(child)
        self._inodes.told(number)
        return _reply(number, child, attributes)

    async def forget(self, inode_list: list[tuple[int, int]]) -> None:
        for number, times in inode_list:
            self._inodes.forget(number, times)

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        entry = self._inodes[inode]
        return _reply(inode, entry, await self._ask(entry, lambda e: e.attributes()))

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return await self._ask(self._inodes[inode], lambda e: e.target())

    async def statfs(self, ctx: Any) -> Any:
        size = await self._ask(self._root, lambda e: self._storage.size())
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = _BLOCK
        found.f_blocks = -(-size // _BLOCK)
        found.f_namemax = 255
        return found

    # --- Directories ---

    async def opendir(self, inode: int, ctx: Any) -> int:
        folder = self._inodes[inode]
        children = await self._ask(folder, lambda e: e.children())
        handle = next(self._handles)
        self._directories[handle] = folder, children
        return handle

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        folder, children = self._directories[fh]
        for first in range(start_id, len(children.names), _AT_ONCE):
            part = partial(_part, children=children, first=first)
            for at, (name, entry, attributes) in enumerate(await self._ask(folder, part), first):
                number = self._inodes.number(entry)
                reply = _reply(number, entry, attributes)
                if not pyfuse3.readdir_reply(token, name, reply, at + 1):
                    self._inodes.forget(number, 0)
                    return
                self._inodes.told(number)

    async def releasedir(self, fh: int) -> None:
        del self._directories[fh]

    # --- Files ---

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        entry = self._inodes[inode]
        file = await self._ask(entry, lambda e: e.open())
        handle = next(self._handles)
        self._files[handle] = entry, file
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray:
        entry, file = self._files[fh]
        return await self._ask(entry, lambda _: file.pread(off, size))

    async def release(self, fh: int) -> None:
        del self._files[fh]

    # --- What was deleted ---

    async def watch(self) -> None:
        """Have the kernel drop what it keeps of snapshots that are deleted.  Has no end."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_WATCH)
            async with self._root.turn:
                gone = await loop.run_in_executor(self._pool, self._root.gone)
            for number in self._inodes.of(gone):
                # In a thread: it waits until requests that are being answered have been.
                await loop.run_in_executor(self._pool, _drop, number)

    def unwatched(self, watching: asyncio.Task[None]) -> None:
        """Without :meth:`watch`, the kernel would show for an hour what is deleted: so when that
        ends by a defect, the mount ends too."""
        if not watching.cancelled() and (defect := watching.exception()) is not None:
            self._fail(defect)

    # --- Inside ---

    def _fail(self, defect: BaseException) -> None:
        self.failure = self.failure or defect
        end()

    async def _ask(self, entry: Entry, question: Callable[[Entry], _T]) -> _T:
        """Raises FUSEError: what became of it is told in a line of its own."""
        turn: AbstractAsyncContextManager[Any] = entry.turn or nullcontext()
        loop = asyncio.get_running_loop()
        try:
            async with turn:
                if entry.volume is not None:
                    self._root.in_use.note(entry.volume)
                return await loop.run_in_executor(self._pool, question, entry)
        except NotThere:
            raise pyfuse3.FUSEError(errno.ENOENT) from None
        except Error as e:
            self._say(f"{entry.path}: {e}" if entry.path else str(e))  # of the root, which has none
            raise pyfuse3.FUSEError(errno.EIO) from None
        except Exception as e:
            # pyfuse3's loop would drop it, and whoever asked would wait for ever.
            self._fail(e)
            raise pyfuse3.FUSEError(errno.EIO) from e
        finally:
            self._close_some()

    def _close_some(self) -> None:
        for volume in self._root.in_use.excess():
            if volume.turn.locked():
                self._root.in_use.note(volume)
            else:  # and it stays so until this thread lets others go on
                volume.close()

    def _say(self, message: str) -> None:
        if message not in self._said:
            if len(self._said) == _MOST_SAID:
                self._said.clear()
            self._said.add(message)
            self._warn(message)


def end() -> None:
    """Have pyfuse3's loop end when what is being answered has been."""
    # A request may have come at this moment: it ends after that.
    with suppress(asyncio.InvalidStateError):
        pyfuse3.terminate()


def _with(entry: Entry) -> tuple[Entry, Attributes]:
    return entry, entry.attributes()


def _part(folder: Entry, children: Children, first: int) -> list[tuple[bytes, Entry, Attributes]]:
    names = children.names[first : first + _AT_ONCE]
    entries = [children.entry(name) for name in names]
    return list(zip(names, entries, folder.described(entries), strict=True))


def _reply(number: int, entry: Entry, attributes: Attributes) -> Any:
    found = pyfuse3.EntryAttributes()
    found.st_ino = number
    found.st_mode = attributes.mode
    found.st_size = attributes.size
    found.st_blocks = -(-attributes.size // _BLOCK)
    found.st_nlink = attributes.links & 0xFFFFFFFF
    found.st_uid = attributes.uid & 0xFFFFFFFF
    found.st_gid = attributes.gid & 0xFFFFFFFF
    found.st_mtime_ns = found.st_atime_ns = _time(attributes.mtime)
    found.st_ctime_ns = _time(attributes.ctime)
    lasting = not isinstance(entry, Root | SnapshotDirectory)
    found.entry_timeout = found.attr_timeout = _LONG if lasting else _MOMENT
    return found


def _time(nanoseconds: int) -> int:
    """As pyfuse3 takes it right: it divides as floating point, and cuts off towards 1970.  What
    it does not take at all, whoever has asked would wait for: no host has such a time."""
    seconds, rest = divmod(nanoseconds, _SECOND)
    seconds = max(-_LATEST, min(seconds, _LATEST))
    return seconds * _SECOND + (min(rest, _SECOND - 1000) if seconds >= 0 else 0)


def _drop(number: int) -> None:
    with suppress(OSError):  # the kernel has forgotten it by itself
        pyfuse3.invalidate_inode(number)
