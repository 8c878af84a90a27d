"""A virtual machine by its name: ``libvirt:DOMAIN`` in place of an image stands for its disk.

python3-libvirt is asked, and imported when it is: one connection, whose errors are exceptions,
where virsh is a process for each question and prints for people.  It connects where virsh would
(``LIBVIRT_DEFAULT_URI``), and read-only unless a snapshot is to be taken.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

from ..errors import Error, UsageError, escaped, shown
from .nodes import devices
from .qmp import not_thawed, parsed, request, result

PREFIX: Final = "libvirt:"

_MOST_LISTED: Final = 50


class LibvirtError(Error):
    """libvirt does not do what it was asked for."""


class DomainDisk(NamedTuple):
    """A disk of a machine."""

    target: str  #: vda, say
    format: str  #: qcow2, say
    path: str  #: of the file or block device; empty where it is neither
    alias: str  #: of its device in QEMU; empty while the machine is off


class Known(NamedTuple):
    """What libvirt keeps of a snapshot."""

    name: str
    date: int  #: seconds since 1970
    state: str  #: of the machine: running, shutoff
    description: str
    parent: str
    current: bool


def is_domain(word: str) -> bool:
    """Whether it names a machine and no file.  ``./libvirt:x`` is a file."""
    return word.startswith(PREFIX)


def image_of(word: str, disk: str | None) -> str:
    """The path of the image that ``libvirt:DOMAIN`` stands for, or the word itself if it is a
    path; ``disk`` is its target, needed where there are several qcow2 images.

    Raises UsageError that lists what there is or says that the machine is on another host,
    LibvirtError with what libvirt says.
    """
    if not is_domain(word):
        return word
    with _connected() as connection:
        _ensure_here(connection, word)
        domain = _domain(connection, word.removeprefix(PREFIX))
        [chosen] = _chosen(connection, domain, [] if disk is None else [disk], one=True)
    return chosen.path


def known_snapshots(word: str) -> list[Known]:
    """What libvirt knows of snapshots of the machine ``libvirt:DOMAIN``, the oldest first.

    Raises as :func:`image_of`.
    """
    with _connected() as connection:
        domain = _domain(connection, word.removeprefix(PREFIX))
        found = [_known(each) for each in domain.listAllSnapshots()]
    return sorted(found, key=lambda each: each.date)


def ensure_not_known(word: str, names: Sequence[str]) -> None:
    """Raises UsageError that says how libvirt deletes them when it knows snapshots with such names:
    deleted behind its back it would go on to list them, and could not revert to them.

    Raises as :func:`image_of`.
    """
    known = {each.name for each in known_snapshots(word)}
    ours = [name for name in names if name in known]
    if ours:
        more = f" (and {len(ours) - 1} more of these)" if len(ours) > 1 else ""
        line = f"virsh snapshot-delete {virsh_word(word)} {escaped(shlex.quote(ours[0]))}"
        raise UsageError(f"libvirt knows {shown(ours[0])}{more}: delete it with {line}")


def virsh_word(word: str) -> str:
    """The machine of ``libvirt:DOMAIN``, as virsh is told of it in a shell."""
    return escaped(shlex.quote(word.removeprefix(PREFIX)))


class Monitor:
    """QEMU's monitor, through libvirt.

    libvirt marks a machine as tainted whose monitor was used; it does so for ``virsh
    qemu-monitor-command`` as well, and nothing follows from it.
    """

    def __init__(self, connection: Any, domain: Any) -> None:
        """Use :func:`monitor`."""
        self._connection = connection
        self._domain = domain

    def execute(self, command: str, **arguments: Any) -> Any:
        """As :meth:`.Qmp.execute`."""
        import libvirt_qemu

        asked = json.dumps(request(command, arguments))
        answer = libvirt_qemu.qemuMonitorCommand(self._domain, asked, 0)
        return result(command, parsed(answer, "the monitor"))

    def process(self) -> int:
        """Not to be seen from here: libvirt gives absolute names of files anyway."""
        return 0

    def nodes(self, targets: Sequence[str]) -> dict[str, str]:
        """The names of QEMU's nodes by the targets of the disks, of all qcow2 ones if none are
        given."""
        disks = _chosen(self._connection, self._domain, targets, one=False)
        found = {}
        for device in devices(self.execute("query-block")):
            for disk in disks:
                parts = device.get("qdev", "").split("/")
                if disk.alias and disk.alias in parts and "inserted" in device:
                    found[disk.target] = device["inserted"]["node-name"]
        for disk in disks:
            if disk.target not in found:
                raise UsageError(f"QEMU has nothing in the disk {shown(disk.target)}")
        return {disk.target: found[disk.target] for disk in disks}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The guest's filesystems are frozen, by its agent.  Raises NotThawed at the end."""
        try:
            self._domain.fsFreeze()
        except BaseException:
            # It may have frozen some of them, or all and been interrupted before it said so.
            with suppress(_libvirt().libvirtError):
                self._domain.fsThaw()
            raise
        before = None
        try:
            yield
        except BaseException as e:
            before = e
            raise
        finally:
            try:
                self._domain.fsThaw()
            except _libvirt().libvirtError as e:
                raise not_thawed(_told(e), before) from e


@contextmanager
def monitor(name: str) -> Iterator[Monitor]:
    """Of the running machine with that name.  Raises as :func:`image_of`."""
    with _connected(write=True) as connection:
        domain = _domain(connection, name)
        if not domain.isActive():
            raise UsageError(
                f"the machine {shown(name)} is off: take one with qemu-img snapshot -c NAME FILE"
            )
        yield Monitor(connection, domain)


# --- Inside ---


def _libvirt() -> Any:
    try:
        import libvirt
    except ImportError:
        raise UsageError("libvirt's Python module is missing: install python3-libvirt") from None
    return libvirt


@contextmanager
def _connected(write: bool = False) -> Iterator[Any]:
    libvirt = _libvirt()
    libvirt.registerErrorHandler(lambda *_: None, None)  # it would print them
    try:
        connection = libvirt.open(None) if write else libvirt.openReadOnly(None)
        try:
            yield connection
        finally:
            connection.close()
    except libvirt.libvirtError as e:
        raise _told(e) from e


def _told(error: Exception) -> LibvirtError:
    said = escaped(str(error))
    return LibvirtError(f"libvirt: {said[:1].lower()}{said[1:]}")


def _ensure_here(connection: Any, word: str) -> None:
    """Raises UsageError when the machine is on another host: its paths mean other files here.  One
    host has many names, and even ``localhost`` may be another by its port: any is refused."""
    from urllib.parse import urlsplit

    uri = connection.getURI()
    try:
        host = urlsplit(uri).netloc.rpartition("@")[2]
    except ValueError:  # brackets without an address
        host = uri
    if host:
        raise UsageError(
            f"{shown(word)} is on {escaped(host)}, by libvirt's {escaped(uri)}: run this there"
        )


def _domain(connection: Any, name: str) -> Any:
    domains = connection.listAllDomains()
    for domain in domains:
        if domain.name() == name or domain.UUIDString() == name:
            return domain
    names = ", ".join(shown(domain.name()) for domain in domains[:_MOST_LISTED])
    there = f"there are {names}" if names else "there is none at all"
    where = escaped(connection.getURI())
    raise UsageError(f"libvirt ({where}) has no machine {shown(name)}: {there}")


def _chosen(connection: Any, domain: Any, targets: Sequence[str], *, one: bool) -> list[DomainDisk]:
    """The qcow2 images with these targets, or all; with ``one`` there must be but one."""
    disks = list(_disks(connection, domain))
    images = [disk for disk in disks if disk.format == "qcow2" and disk.path]
    name = shown(domain.name())
    there = ", ".join(f"{escaped(d.target)} ({escaped(d.path)})" for d in images) or "none"
    for target in targets:
        if target not in [disk.target for disk in images]:
            what = [f"is {escaped(d.format)}" for d in disks if d.target == target]
            why = f"{what[0]}, and no qcow2 file here" if what else "is not there"
            raise UsageError(f"the disk {shown(target)} of {name} {why}: qcow2 files are {there}")
    chosen = [disk for disk in images if not targets or disk.target in targets]
    if not chosen:
        raise UsageError(f"the machine {name} has no qcow2 image that is a file or block device")
    if one and len(chosen) > 1:
        raise UsageError(f"the machine {name} has several disks: choose with --disk, {there}")
    return chosen


def _disks(connection: Any, domain: Any) -> Iterator[DomainDisk]:
    for element in _parsed(domain.XMLDesc()).iterfind("devices/disk"):
        if element.get("device", "disk") not in ("disk", "lun"):
            continue
        source = element.find("source")
        path = ""
        if source is not None:
            path = source.get("file") or source.get("dev") or ""
            if element.get("type") == "volume":
                pool = connection.storagePoolLookupByName(source.get("pool"))
                path = pool.storageVolLookupByName(source.get("volume")).path()
        yield DomainDisk(
            _of(element, "target", "dev"),
            _of(element, "driver", "type"),
            path,
            _of(element, "alias", "name"),
        )


def _parsed(xml: str) -> Any:
    from xml.etree import ElementTree  # no other command than these needs it

    return ElementTree.fromstring(xml)


def _of(element: Any, child: str, attribute: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(attribute) or ""


def _known(snapshot: Any) -> Known:
    described = _parsed(snapshot.getXMLDesc())
    return Known(
        snapshot.getName(),
        int(described.findtext("creationTime", "0")),
        described.findtext("state", ""),
        described.findtext("description", ""),
        described.findtext("parent/name", ""),
        bool(snapshot.isCurrent()),
    )
