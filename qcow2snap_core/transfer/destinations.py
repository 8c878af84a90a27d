"""What a copy can go to.  A target is classified once, and from then on is a thing of its own:

* :class:`.NewFile`, a raw file that appears when it is whole;
* :class:`.Qcow2File`, the same in qcow2, which QEMU's tools write;
* :class:`.UpdatedFile`, which takes an old copy's place, or :class:`.FileInPlace`, which is it;
* :class:`.Device` and :class:`.Export`, which are there already and keep their size;
* :class:`.Stream`, standard output or a FIFO, which takes bytes in order and no other way.

Each takes a :class:`.Job` in its own way: what it makes ready and asks first, how the bytes get
there, what makes it whole, and what is left or said when that fails.
"""

from __future__ import annotations

from typing import Final, Protocol

from ..errors import UsageError, shown
from ..storage.libnbd import is_uri
from ..util.wording import COMMAND, Wording
from .devices import Device, Export
from .job import Job
from .judge import ENDING, STANDARD_OUTPUT, Kind, Place, judge
from .qcow2file import Qcow2File
from .rawfile import FileInPlace, NewFile, UpdatedFile
from .streams import Stream
from .updates import Base

FORMATS: Final = ("raw", "qcow2")

#: How names of files end that other programs would take for another format than these.
_OTHERS: Final = (".dmg", ".parallels", ".qcow", ".qed", ".vdi", ".vhd", ".vhdx", ".vmdk", ".vpc")

_NEW: Final = Kind.FILE | Kind.DEVICE | Kind.EXPORT | Kind.STREAM
_UPDATED: Final = Kind.FILE | Kind.DEVICE | Kind.EXPORT


class Destination(Protocol):
    """What a target turned out to be."""

    place: Place

    def take(self, job: Job) -> None:
        """Be written.  Raises UsageError before anything is, if it will not do; StorageError when
        it fails; and what reading the image raises."""


def new_copy(
    target: str,
    *,
    form: str | None = None,
    compress: str | None = None,
    replace: bool = False,
    words: Wording = COMMAND,
) -> Destination:
    """For all of a disk.  ``form`` is one of FORMATS, else the target's name decides;
    ``compress`` how the clusters of a qcow2 file are; ``replace`` and ``words`` as for
    :func:`.judge`.

    Raises UsageError when the target will not do.
    """
    place = judge(target, _NEW, replace=replace, words=words)
    if place.kind is Kind.FILE:
        if (form or form_of(target, words)) == "qcow2":
            return Qcow2File(place, compress)
        return NewFile(place)
    if form == "qcow2":
        raise UsageError(f"{shown(place.name)} is no file: only a file can be written as qcow2")
    if place.kind is Kind.STREAM:
        return Stream(place)
    return Device(place) if place.kind is Kind.DEVICE else Export(place)


def update(target: str, base: Base = Base.RECORDED, *, in_place: bool = False) -> Destination:
    """For what differs from a disk that the target holds, as ``base`` makes sure; ``in_place``: a
    file is written into, and not replaced by its updated copy.

    Raises UsageError when the target will not do.
    """
    if target == STANDARD_OUTPUT:
        raise UsageError("standard output holds nothing to update: leave out --since")
    place = judge(target, _UPDATED, replace=True, in_place=in_place)
    if place.kind is Kind.FILE:
        return FileInPlace(place, base) if in_place else UpdatedFile(place, base)
    return Device(place, base) if place.kind is Kind.DEVICE else Export(place, base)


def form_of(target: str, words: Wording = COMMAND) -> str:
    """The format that a file of that name is written in.  Raises UsageError when the name is that
    of another one."""
    name = target.lower()
    if name.endswith(_OTHERS) and not is_uri(target):
        raise UsageError(
            f"the target's name is that of another format than raw and qcow2: give another name, "
            f"or {words.given('format', 'raw')}"
        )
    return "qcow2" if name.endswith(ENDING) else "raw"
