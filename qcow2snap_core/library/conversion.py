"""Writing snapshots to other files: what the commands copy, compact, split and join do."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

from ..transfer import compact as whole_image
from ..transfer import copy as copies
from ..transfer import join as joining
from ..transfer import split as splitting
from ..transfer.compressors import COMPRESSIONS
from ..transfer.destinations import FORMATS, form_of, new_copy, update
from ..transfer.judge import STANDARD_OUTPUT, Kind, Place, judge
from ..transfer.updates import Base
from ..typed import Final, NamedTuple
from ..util.progress import silent
from ..util.wording import LIBRARY
from . import arguments
from .analysis import comparable
from .disk import Disk
from .image import Image
from .names import public

_BASES: Final = {
    "recorded": Base.RECORDED,
    "compared": Base.COMPARED,
    "trusted": Base.TRUSTED,
}


@public
class Copied(NamedTuple):
    """How much :func:`copy` wrote."""

    data: int  #: bytes
    zeros: int  #: bytes, as holes where the target can have them


@public
def copy(
    new: Disk,
    target: str | os.PathLike[str],
    *,
    since: Disk | None = None,
    base: str = "recorded",
    in_place: bool = False,
    replace: bool = False,
    format: str | None = None,  # noqa: A002 (qemu-img's word)
    compress: str | None = None,
    verify: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> Copied:
    """Make a file, a block device, a FIFO or an NBD export (its URI) hold the disk ``new``.

    A file is ``"raw"`` or ``"qcow2"`` as ``format`` says, else as its name ends; ``compress`` is
    ``"zlib"`` or ``"zstd"`` for the clusters of the latter.  One that is there is only replaced
    with ``replace``.  ``warn`` is told when an encrypted image is written in plain.

    With ``since``, which the target holds already, only what changed is written.  ``base`` says by
    what it is known to hold that: its ``"recorded"`` copy of it, which a file keeps from the copy
    before; the comparison of all that will not be written (``"compared"``); or the caller's word
    (``"trusted"``).  A file is written under a temporary name and renamed when it is whole; an
    update with ``in_place`` goes into the file itself.  With ``verify`` what devices and exports
    hold at the end is read back and compared.

    Raises UsageError before anything is written when the target will not do; otherwise as
    :meth:`.Disk.pread`, and StorageError when the target fails.

    >>> with qcow2snap_core.open("disk.qcow2") as image:
    ...     copy(image.open("weekly"), "backup.raw")
    ...     copy(image.open("nightly"), "backup.raw", since=image.open("weekly"))
    Copied(data=65536, zeros=4128768)
    Copied(data=131072, zeros=4128768)
    """
    path = arguments.path("target", target)
    if path == STANDARD_OUTPUT:
        path = os.path.join(os.curdir, path)  # that is the command's notation
    how = _BASES[arguments.one_of("base", base, tuple(_BASES))]
    for name, value in {"in_place": in_place, "replace": replace, "verify": verify}.items():
        arguments.flag(name, value)
    if format is not None:
        arguments.one_of("format", format, FORMATS)
    check_compress(compress)
    if compress is not None and (format or form_of(path)) != "qcow2":
        raise ValueError("compress goes with format='qcow2'")
    if since is None:
        arguments.instance("new", new, Disk)
        if new._vm_state:
            raise ValueError("new is a VM state: copy it from its file object, raw()")
        if in_place or base != "recorded":
            raise ValueError("in_place and base go with since: a full copy starts from nothing")
        to = new_copy(path, form=format, compress=compress, replace=replace, words=LIBRARY)
    else:
        comparable(since, new)
        if replace or (format or form_of(path)) != "raw":
            raise ValueError("since updates a raw file, device or export: leave out replace")
        to = update(path, how, in_place=in_place)
    old = None if since is None else since._disk
    with silent():
        done = copies.copy(new._image, new._disk, to, told(warn), old, verify=verify)
    return Copied(done.amount.data, done.amount.zeros)


@public
def compact(
    image: Image,
    target: str | os.PathLike[str],
    *,
    compress: str | None = None,
    replace: bool = False,
    verify: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> None:
    """Copy the image with all its snapshots, as they are listed, and with nothing else.

    What is compressed stays so; ``compress``, ``"zlib"`` or ``"zstd"``, is for the rest.  The other
    keywords are those of :func:`split`.  Raises as :func:`copy`.

    >>> with qcow2snap_core.open("disk.qcow2") as image:
    ...     compact(image, "small.qcow2")
    """
    arguments.instance("image", image, Image)
    where = arguments.path("target", target)
    check_compress(compress)
    place = target_of(where, whole_image.COMPACT_TARGETS, replace)
    with silent():
        whole_image.compact(
            image._image, place, told(warn), compress, arguments.flag("verify", verify)
        )


@public
def split(
    image: Image,
    directory: str | os.PathLike[str],
    *,
    replace: bool = False,
    verify: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> list[str]:
    """Make an external chain of the internal snapshots, in a directory that is absent or empty: an
    overlay for each with only what changed, and one for the active disk on top.

    Nobody may have the image open for writing.  With ``verify`` all of it is read back and compared
    before it gets its name.  ``warn`` is told, in a line each, what is not carried over.  What the
    files cannot say, names, dates and VM states, is written beside them for :func:`join`.

    Returns the paths of the files, the base first.  Raises as :func:`copy`.

    >>> with qcow2snap_core.open("disk.qcow2") as image:
    ...     split(image, "chain")
    ['chain/weekly.qcow2', 'chain/nightly.qcow2', 'chain/active.qcow2']
    """
    arguments.instance("image", image, Image)
    where = arguments.path("directory", directory)
    arguments.flag("verify", verify)
    place = target_of(where, splitting.SPLIT_TARGETS, replace)
    with silent():
        names = splitting.split(image._image, place, told(warn), verify)
    return [os.path.join(where, name) for name in names]


@public
def join(
    top: Image,
    target: str | os.PathLike[str],
    *,
    replace: bool = False,
    verify: bool = True,
    warn: Callable[[str], object] = warnings.warn,
) -> list[str]:
    """Make one image of an external chain; ``top`` is its topmost file.  Each file becomes an
    internal snapshot named after it without the ending; but those of a chain that :func:`split`
    made are the snapshots that they were, and the active disk is none.

    The keywords are those of :func:`split`.  Returns the names of the snapshots, the base's first.
    Raises as :func:`copy`.

    >>> with qcow2snap_core.open("chain/active.qcow2") as image:
    ...     join(image, "joined.qcow2")
    ['weekly', 'nightly']
    """
    arguments.instance("top", top, Image)
    where = arguments.path("target", target)
    arguments.flag("verify", verify)
    place = target_of(where, joining.JOIN_TARGETS, replace)
    with silent():
        return joining.join(top._image, place, told(warn), verify)


def target_of(name: str, accepts: Kind, replace: bool) -> Place:
    return judge(name, accepts, replace=arguments.flag("replace", replace), words=LIBRARY)


def check_compress(compress: str | None) -> None:
    if compress is not None:
        arguments.one_of("compress", compress, tuple(COMPRESSIONS))


def told(warn: Callable[[str], object]) -> Callable[[str], None]:
    def tell(message: str) -> None:
        warn(message)

    return tell
