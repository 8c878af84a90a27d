"""All that is public, as it stands: whoever changes the table below changes what users rely on."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import qemu
from support.qemu import MiB
from support.server import ROOT

import qcow2snap_core

PATH = "str | os.PathLike[str]"
PATHS = f"Iterable[{PATH}]"
WARN = "warn: Callable[[str], object] = <built-in function warn>"

SURFACE = {
    "Copied": {"(tuple)": "data zeros"},
    "Disk": {
        "cluster_size": "int",
        "extents": "(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]",
        "pread": "(self, length: int, offset: int) -> bytes",
        "pread_into": "(self, buffer: Buffer, offset: int) -> None",
        "raw": "(self) -> io.RawIOBase",
        "size": "int",
        "snapshot": "Snapshot | None",
    },
    "Error": {"(base)": "Exception"},
    "Extent": {"(tuple)": "offset length type", "is_hole": "bool", "is_zero": "bool"},
    "Finding": {"(tuple)": "problem message snapshots host clusters", "is_damage": "bool"},
    "Image": {
        "active": "(self) -> Disk",
        "close": "(self) -> None",
        "find": "(self, name: str) -> Snapshot",
        "open": "(self, snapshot: Snapshot | str, *, vm_state: bool = False) -> Disk",
        "path": "str",
        "snapshot": "(self, name: str) -> Disk",
        "snapshots": "tuple[Snapshot, ...]",
    },
    "ImageError": {"(base)": "Error"},
    "Snapshot": {
        "date": "datetime",
        "disk_size": "int",
        "icount": "int | None",
        "id": "str",
        "name": "str",
        "vm_clock_nsec": "int",
        "vm_state_size": "int",
    },
    "SnapshotGone": {"(base)": "ImageError"},
    "StorageError": {"(base)": "Error"},
    "UsageError": {"(base)": "Error"},
    "__version__": {"(a str)": ""},
    "backup": {
        "()": f"(image: Image, repository: {PATH}, *, compress: str | None = None, "
        f"verify: bool = True, {WARN}) -> list[str]"
    },
    "changes": {"()": "(old: Disk, new: Disk) -> Iterator[Extent]"},
    "check": {
        "()": "(image: Image, snapshot: Snapshot | str | None = None, *, data: bool = False, "
        f"{WARN}) -> list[Finding]"
    },
    "compact": {
        "()": f"(image: Image, target: {PATH}, *, compress: str | None = None, "
        f"replace: bool = False, verify: bool = True, {WARN}) -> None"
    },
    "copy": {
        "()": f"(new: Disk, target: {PATH}, *, since: Disk | None = None, base: str = 'recorded', "
        "in_place: bool = False, replace: bool = False, format: str | None = None, "
        f"compress: str | None = None, verify: bool = True, {WARN}) -> Copied"
    },
    "exclusive_sizes": {"()": "(image: Image) -> list[tuple[Snapshot, int | None]]"},
    "join": {
        "()": f"(top: Image, target: {PATH}, *, replace: bool = False, verify: bool = True, "
        f"{WARN}) -> list[str]"
    },
    "open": {
        "()": f"(path: {PATH}, *, allow_dirs: {PATHS} = (), allow_files: {PATHS} = (), "
        "backing_format: str | None = None, "
        "passphrase: str | bytes | Mapping[int, str | bytes] | None = None, "
        "l2_cache_size: int = 33554432, cluster_cache_size: int = 67108864, "
        "remote_timeout: float = 30.0) -> Image"
    },
    "restore": {
        "()": f"(repository: {PATH}, target: {PATH}, *, snapshot: str | None = None, "
        f"skip_damaged: bool = False, replace: bool = False, verify: bool = True, {WARN}) "
        "-> list[str]"
    },
    "split": {
        "()": f"(image: Image, directory: {PATH}, *, replace: bool = False, verify: bool = True, "
        f"{WARN}) -> list[str]"
    },
    "verify": {"()": f"(repository: {PATH}) -> list[str]"},
}


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def described(thing: object) -> dict[str, str]:
    """The public members, with their signatures or the types of their values."""
    if not isinstance(thing, type):
        return {"()": signature(thing)} if callable(thing) else {f"(a {type(thing).__name__})": ""}
    if issubclass(thing, BaseException):
        own = public(thing) - public(Exception)
        return {"(base)": thing.__base__.__name__} | dict.fromkeys(own, "?")
    found, known = {}, public(object)
    if issubclass(thing, tuple):
        found["(tuple)"] = " ".join(thing._fields)
        known = public(tuple) | set(thing._fields)
    for name in public(thing) - known:
        member = inspect.getattr_static(thing, name)
        if isinstance(member, property):
            found[name] = signature(member.fget).removeprefix("(self) -> ")
        else:
            found[name] = signature(member)
    return found


def signature(function: object) -> str:
    """Annotations are strings here, and would be shown in quotes."""
    found = inspect.signature(function)
    given = [
        p.replace(annotation=_Word(p.annotation)) if p.annotation is not p.empty else p
        for p in found.parameters.values()
    ]
    return str(found.replace(parameters=given, return_annotation=_Word(found.return_annotation)))


class _Word:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def test_the_names() -> None:
    assert sorted(qcow2snap_core.__all__) == sorted(SURFACE) == sorted(dir(qcow2snap_core))


@pytest.mark.parametrize("name", SURFACE)
def test_the_members(name: str) -> None:
    assert described(getattr(qcow2snap_core, name)) == SURFACE[name]


@pytest.mark.parametrize("name", [n for n in SURFACE if n != "__version__"])
def test_each_says_where_it_is_from_and_what_it_does(name: str) -> None:
    thing = getattr(qcow2snap_core, name)
    assert thing.__module__ == "qcow2snap_core"
    assert thing.__doc__
    for member in set(SURFACE[name]) & public(thing):
        assert getattr(thing, member).__doc__, member


def test_the_page_names_all_of_it() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    members = {m for name, of in SURFACE.items() for m in {name, *of} if m[0] not in "(_"}
    fields = {f for of in SURFACE.values() for f in of.get("(tuple)", "").split()}
    assert {name for name in members | fields if not re.search(rf"\b{name}\b", page)} == set()


def test_objects_have_no_other_public_members(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write 0 64k")
    qemu.take(path, "s")
    with qcow2snap_core.open(path) as image:
        disk = image.open("s")
        objects = [image, disk, image.active(), image.find("s"), next(disk.extents())]
        for thing in objects:
            expected = public(type(thing))
            assert public(thing) == expected
            assert type(thing) is getattr(qcow2snap_core, type(thing).__name__)
            assert not hasattr(thing, "__dict__")
        assert public(disk.raw()) == public(type(disk.raw()).__base__)


def loaded(program: str) -> set[str]:
    """The modules that a program has imported."""
    program += "; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_it_imports_nothing_else() -> None:
    ours = {m for m in loaded("import qcow2snap_core") if m.startswith("qcow2snap_core")}
    assert ours == {"qcow2snap_core", "qcow2snap_core.typed"}


def test_reading_imports_no_more_than_it_uses(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    qemu.io(path, "write 0 64k")
    qemu.take(path, "s")
    found = loaded(
        f"import qcow2snap_core; disk = qcow2snap_core.open({str(path)!r}).open('s'); "
        "disk.pread(1, 0); list(disk.extents())"
    )
    assert "qcow2snap_core.library.disk" in found
    others = ("tables", "transfer", "host", "serve", "cli")
    assert not found & {f"qcow2snap_core.{room}" for room in others}
    assert not found & {"argparse", "construct", "numpy", "subprocess", "tempfile", "zstandard"}


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'qcow2snap_core' has no attribute 'opn'$"):
        qcow2snap_core.opn  # noqa: B018
    assert not hasattr(qcow2snap_core, "fill")
