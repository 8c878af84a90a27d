"""Copying a snapshot, or what changed since an older one.

The target is classified once, into a destination (:mod:`.destinations`), before the image is even
opened.  Then the tables say what there is to move, and the destination takes it in its own way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..image.disk import Disk
from ..image.image import Image
from ..util.units import binary
from .destinations import Destination
from .job import Job, Warn, warn_of_encryption
from .mover import Amount
from .salvage import Salvage


@dataclass(frozen=True)
class Copied:
    """What a copy did."""

    amount: Amount
    seconds: float

    def __str__(self) -> str:
        data, zeros = binary(self.amount.data), binary(self.amount.zeros)
        return f"{data} of data and {zeros} of zeros in {self.seconds:.1f} s"


def copy(
    image: Image,
    new: Disk,
    to: Destination,
    warn: Warn,
    since: Disk | None = None,
    *,
    verify: bool = True,
    vm_state: bool = False,
    salvage: Salvage | None = None,
) -> Copied:
    """Make ``to`` hold the disk ``new``; with ``since``, which it holds now, only what differs.

    ``verify``: what is not written by this program alone is read back and compared.  ``vm_state``:
    ``new`` is the saved state of a machine.  ``salvage``: of ``new``, for a :class:`.SalvagedFile`.
    Raises UsageError before anything is written when the target will not do, otherwise what
    :meth:`.Disk.pread_into` raises, StorageError when the target fails.
    """
    began = time.monotonic()
    to.place.ensure_apart(image.files)
    job = Job(image, new, since, verify=verify, vm_state=vm_state, salvage=salvage)
    warn_of_encryption(image, warn)
    to.take(job)
    return Copied(job.amount, time.monotonic() - began)
