"""One copy: what is to be moved, how it is moved and compared, and what it is called afterwards.

A :class:`Job` knows the image and nothing of where it goes; what it is moved into, and what becomes
of that when it fails, is a destination's (:mod:`.destinations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import UsageError, shown
from ..image.disk import Disk
from ..image.extents import Extent
from ..image.image import Image
from ..storage.libnbd import is_uri
from ..tables.diff import changes, unchanged
from ..util.progress import progress
from .mover import THREADS, THREADS_REMOTE, Plan, count, transfer, whole
from .outputs import permissions
from .records import Record, held
from .salvage import Salvage
from .targets import Target
from .verify import Differs, Readable, compare

#: Is told in one line what does not keep a command from doing its work.
Warn = Callable[[str], None]


class Job:
    """A disk of an image, or with ``since`` what differs from that, to be moved somewhere."""

    def __init__(
        self,
        image: Image,
        new: Disk,
        since: Disk | None = None,
        *,
        verify: bool = True,
        vm_state: bool = False,
        salvage: Salvage | None = None,
    ) -> None:
        """``verify``: compare what other programs, servers or devices wrote; ``vm_state``: the disk
        is one, of which no record is kept; ``salvage``: the disk, where it need not be read whole.
        Raises what the tables' damage raises."""
        self.image = image
        self.new = new
        self.since = since
        self.verify = verify
        self.salvage = salvage
        self.plan: Plan = (lambda: whole(new)) if since is None else (lambda: changes(since, new))
        if salvage is not None:
            self.plan = salvage.plan
        self.amount = count(self.plan)
        self.threads = THREADS_REMOTE if is_uri(image.path) else THREADS
        self._vm_state = vm_state

    @property
    def permissions(self) -> int:
        """The most that a new file may get."""
        return permissions(self.image.files)

    def record(self) -> Record | None:
        """What the file is to say of itself when it is whole."""
        return None if self._vm_state else Record(held(self.new))

    def move(self, target: Target) -> None:
        """Write all of it to the target, and bring it to the disk."""
        with progress("copying", self.amount.data) as bar:
            transfer(self.salvage or self.new, self.plan, target, bar, self.threads)

    def compare(self, found: Readable, name: str) -> None:
        """Raises Differs unless what was written is there."""
        with progress("comparing", self.amount.data + self.amount.zeros) as bar:
            compare(self.new, self.plan, found, shown(name), bar, self.threads)

    def compare_base(self, found: Readable, name: str) -> None:
        """Raises UsageError unless all is there that an update will not write."""
        old, new = self.since, self.new
        assert old is not None

        def plan() -> Iterator[Extent]:
            return unchanged(old, new)

        amount = count(plan)
        try:
            with progress("comparing", amount.data + amount.zeros) as bar:
                compare(new, plan, found, shown(name), bar, self.threads)
        except Differs as e:
            raise UsageError(
                f"{shown(name)} does not hold {old.name}: it differs at guest offset "
                f"{e.offset:#x}, nothing was written"
            ) from e


def warn_of_encryption(image: Image, warn: Warn) -> None:
    """What is written is not encrypted, whatever the image is."""
    if image.encrypted:
        warn(f"{shown(image.path)} is encrypted, the result is not")
