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

    The format of a file is ``format``, ``"raw"`` or ``"qcow2"``; by default it is qcow2 if the name
    ends in ``.qcow2``, and a name with the ending of another format is refused.  ``compress``,
    ``"zlib"`` or ``"zstd"``, is for the clusters of a qcow2 file.  An existing file is replaced
    only with ``replace``.  ``warn`` is called when the copy of an encrypted image is not encrypted.

    With ``since``, a disk that the target holds already, only what changed is written.  ``base``
    says how it is made sure that the target holds it: by the record that an earlier copy has left
    (``"recorded"``), by comparing all that will not be written (``"compared"``), or not at all
    (``"trusted"``).  A file is written under a temporary name and renamed when it is complete; with
    ``in_place`` an update goes into the file itself.  With ``verify``, what devices and exports
    hold at the end is read back and compared.

    Raises UsageError before anything is written if the target is unsuitable; otherwise as
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
    form = format or form_of(path, LIBRARY)
    if compress is not None and form != "qcow2":
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
        if replace or form != "raw":
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
    """Copy the image with all its snapshots, and without unused space.

    Compressed clusters stay compressed; ``compress``, ``"zlib"`` or ``"zstd"``, is for the others.
    The other keywords are those of :func:`split`.  Raises as :func:`copy`.

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

    No QEMU may have the image open for writing.  With ``verify`` all of it is read back and
    compared before it gets its name.  ``warn`` is called with a line for each thing that is lost.
    Names, dates and VM states, which overlays cannot record, are written beside them for
    :func:`join`.

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
    internal snapshot with the name of the file, without the ending.  If :func:`split` made the
    chain, the snapshots get back their IDs, names, dates and VM states, and the file of the active
    disk does not become one.

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
