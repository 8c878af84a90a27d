"""A repository of backups: a directory with a qcow2 file for each snapshot, and a manifest.

No store of our own: ``3.qcow2`` holds what changed since the snapshot that it lies on, which its
header names as its backing file, so qemu-img reads any of them without this program.  A VM state is
a raw file beside it, ``3.vmstate``.  What is no qcow2 file's to say is in ``qcow2snap.json``
(:mod:`.manifest`), with the SHA-256 of every file.

Only what the manifest names is there.  A snapshot's files are written whole, brought to the disk
and named; then a new manifest takes the old one's place.  Whatever ends a backup at whatever
moment, the manifest is the old one or the new one, and a file that it does not name is replaced by
the next backup, since the numbers go on from the manifest.  A file in the place of one that was
lost is the exception, it gets its name last: until then it is lost, whatever the manifest says.

Who reads a repository believes none of it: names lead to files in it and nowhere else, the chain in
the headers has to be the manifest's, and each file is compared with its checksum before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from ..errors import ImageError, UsageError, escaped, reason, shown
from ..format import ondisk as q
from ..format.header import read_header
from ..image.disk import Disk
from ..image.image import Image
from ..image.opener import Options, open_image
from ..storage.local import Storage
from ..util.progress import Advance, progress
from ..util.spelling import nearest
from ..util.wording import Wording
from . import manifest
from .judge import ENDING, VM_STATE, Kind, Place
from .manifest import Entry, Manifest, Stored, open_in
from .outputs import alone_in, output, sync
from .overlays import size_and_digest

REPOSITORY: Final = Kind.DIRECTORY


class Repository:
    """One that is there."""

    def __init__(self, directory: str, found: Manifest) -> None:
        self.directory = directory
        self.manifest = found

    @property
    def entries(self) -> Sequence[Entry]:
        """The snapshots in it, in the order in which they were added."""
        return self.manifest.entries

    def path(self, file: str) -> str:
        return os.path.join(self.directory, file)

    def choose(self, name: str) -> Entry:
        """The snapshot in the file of that name, else the newest with that ID, else the newest of
        that name.  Raises UsageError that lists what there is."""
        newest = self.entries[::-1]
        for words in (
            [entry.disk.file for entry in newest],
            [entry.snapshot.id for entry in newest],
            [entry.snapshot.name for entry in newest],
        ):
            if name in words:
                return newest[words.index(name)]
        meant = nearest(name, (entry.snapshot.name for entry in newest))
        did_you_mean = "" if meant is None else f"did you mean {shown(meant)}? "
        raise UsageError(
            f"no snapshot {shown(name)} in {shown(self.directory)}: {did_you_mean}{self._summary()}"
        )

    def _summary(self, most: int = 50) -> str:
        if not self.entries:
            return "it has none"
        each = [
            f"{escaped(e.disk.file)} {shown(e.snapshot.name, 255)}" for e in self.entries[-most:]
        ]
        more = f" and {len(self.entries) - most} older ones" if len(self.entries) > most else ""
        return "it has " + ", ".join(each) + more

    # --- Reading ---

    def check(self, entry: Entry, advance: Advance) -> None:
        """Read all of a snapshot's own files.  Raises ImageError or StorageError unless they are
        what was written; what it lies on is not looked at."""
        storage = self._open(entry.disk.file)
        try:
            self._check_bytes(storage, entry.disk, advance)
            header = read_header(storage)
        finally:
            storage.close()
        below = None if entry.parent is None else os.fsencode(entry.parent)
        wrong = header.has_data_file or header.crypt_method != q.CRYPT_NONE
        if below is not None and header.backing_format != "qcow2":
            wrong = True
        if wrong or header.backing_file != below or header.size != entry.snapshot.disk_size:
            raise ImageError(
                f"{shown(self.path(entry.disk.file))} is another image than {manifest.NAME} says"
            )
        if entry.vm_state is not None:
            storage = self._open(entry.vm_state.file)
            try:
                self._check_bytes(storage, entry.vm_state, advance)
            finally:
                storage.close()

    def _open(self, file: str) -> Storage:
        try:
            return open_in(self.directory, file)
        except UsageError as e:  # nobody has asked for it but the manifest
            raise ImageError(str(e)) from e

    def _check_bytes(self, storage: Storage, known: Stored, advance: Advance) -> None:
        if storage.size() != known.size:
            raise ImageError(
                f"{shown(storage.path)} has {storage.size()} bytes and not {known.size}: it is not "
                f"what was written"
            )
        if size_and_digest(storage, advance) != (known.size, known.sha256):
            raise ImageError(f"{shown(storage.path)} is damaged: its SHA-256 is another one")

    def check_all(self, entries: Iterable[Entry]) -> None:
        """The same for several, which stops at the first that is damaged."""
        every = list(entries)
        with progress("checking", stored_size(every)) as bar:
            for entry in every:
                self.check(entry, bar)

    @contextmanager
    def layers(self, words: Wording) -> Iterator[tuple[dict[str, Disk], Sequence[Storage]]]:
        """The disk in each qcow2 file by the file's name, and all files that are open for them."""
        disks: dict[str, Disk] = {}
        files: list[Storage] = []
        parents = {entry.parent for entry in self.entries}
        with ExitStack() as opened:
            for entry in reversed(self.entries):
                if entry.disk.file not in parents:
                    image = opened.enter_context(self.open(entry, words))
                    files += image.files
                    for each, (_, layer) in zip(
                        self.manifest.down_from(entry), image.chain, strict=True
                    ):
                        assert isinstance(layer, Disk)
                        disks.setdefault(each.disk.file, layer)
            yield disks, files

    def open(self, entry: Entry, words: Wording) -> Image:
        """The image whose active disk is the snapshot's.  Raises ImageError where its chain is not
        the manifest's."""
        image = open_image(self.path(entry.disk.file), Options(words=words))
        try:
            real = os.path.realpath(self.directory)
            chain = [os.path.join(real, e.disk.file) for e in self.manifest.down_from(entry)]
            found = [os.path.realpath(storage.absolute) for storage, _ in image.chain]
            if found != chain or len(image.files) != len(chain):
                raise ImageError(
                    f"{shown(image.path)} lies on other files than {manifest.NAME} says"
                )
        except BaseException:
            image.close()
            raise
        return image

    # --- Writing ---

    def next_names(self) -> tuple[str, str]:
        """What the next snapshot's files are called: its disk and its VM state."""
        number = len(self.entries) + 1
        return f"{number}{ENDING}", f"{number}{VM_STATE}"

    def there(self) -> set[str]:
        """The files of those disks of which all that they lie on is there too, as far as sizes
        tell."""
        found: set[str] = set()
        for entry in self.entries:
            if self.has(entry.disk) and (entry.parent is None or entry.parent in found):
                found.add(entry.disk.file)
        return found

    def has(self, known: Stored) -> bool:
        """Whether a file is there, as far as its size tells."""
        path = self.path(known.file)
        return os.path.isfile(path) and os.path.getsize(path) == known.size

    def depth(self, entry: Entry) -> int:
        """How many files its chain has."""
        return sum(1 for _ in self.manifest.down_from(entry))

    def store(self, found: Manifest, most: int) -> None:
        """Put a manifest into the place of the one that is there."""
        with self.replaced(manifest.NAME, most) as part, open(part, "wb") as file:
            file.write(manifest.text(found))
        self.manifest = found

    def remove(self, file: str) -> None:
        """Remove what a backup that was killed has left under a name that is free."""
        with suppress(FileNotFoundError):
            os.unlink(self.path(file))

    @contextmanager
    def replaced(self, file: str, most: int) -> Iterator[str]:
        """An output of that name in the repository (:func:`.output`)."""
        path = self.path(file)
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
            raise UsageError(f"{shown(path)} is no regular file: remove it")
        with output(path, most=most, replace=True) as part:
            yield part


def stored_size(entries: Iterable[Entry]) -> int:
    """How many bytes their files have."""
    return sum(e.disk.size + (e.vm_state.size if e.vm_state else 0) for e in entries)


def open_repository(directory: str) -> Repository:
    """Raises UsageError when it is none, ImageError when its manifest cannot be believed."""
    if not os.path.isdir(directory):
        raise UsageError(f"{shown(directory)} is no directory: give one that backup has made")
    if not os.path.lexists(os.path.join(directory, manifest.NAME)):
        raise UsageError(
            f"{shown(directory)} is no repository, there is no {manifest.NAME} in it: give one "
            f"that backup has made"
        )
    found = manifest.read(directory)
    if found.active is not None:
        raise UsageError(
            f"{shown(directory)} is a chain that split has made: join makes an image of "
            f"{shown(os.path.join(directory, found.active))}"
        )
    return Repository(directory, found)


@contextmanager
def written_repository(place: Place, most: int) -> Iterator[Repository]:
    """The repository at a place, made if it is new or empty; nobody else writes into it meanwhile.
    ``most`` are the permissions that its files may get."""
    directory = place.path
    if place.new:
        try:
            os.mkdir(directory)
        except FileExistsError:  # another backup was quicker
            pass
        except OSError as e:
            raise UsageError(f"cannot make {shown(place.name)}: {reason(e)}") from e
        sync(os.path.dirname(directory))
    with alone_in(directory):
        there = os.listdir(directory)
        if manifest.NAME not in there and there:
            raise UsageError(
                f"{shown(place.name)} is not empty, and no repository: give a directory that is "
                f"absent or empty, or one that backup has made"
            )
        if not there:
            Repository(directory, Manifest()).store(Manifest(), most)
        yield open_repository(directory)
