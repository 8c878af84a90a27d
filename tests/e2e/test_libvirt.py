"""``libvirt:DOMAIN`` in place of an image, and ``take --domain``, with a real libvirtd."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import command, qemu
from support.libvirt import Libvirt, running
from support.qemu import KiB, MiB
from support.vm import machine

from qcow2snap_core.errors import UsageError
from qcow2snap_core.host.domains import Monitor, monitor
from qcow2snap_core.host.qmp import NotThawed, Qmp, QmpError

SNAPSHOT = "<domainsnapshot><name>{}</name><description>{}</description></domainsnapshot>"


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirt]:
    with running() as found:
        yield found


@pytest.fixture(autouse=True)
def there(libvirtd: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirtd.uri)


@pytest.fixture(scope="module")
def images(libvirtd: Libvirt) -> list[Path]:
    found = [qemu.create(libvirtd.folder / name, 4 * MiB) for name in ("a.qcow2", "b.qcow2")]
    for number, path in enumerate(found, 1):
        qemu.io(path, f"write -P {number} 0 64k")
    return found


@pytest.fixture(scope="module")
def web(libvirtd: Libvirt, images: list[Path]) -> Any:
    """A running machine with two disks and a CD, and a snapshot that libvirt has taken."""
    disc = libvirtd.folder / "disc.iso"
    disc.write_bytes(bytes(MiB))
    domain = libvirtd.define("web", vda=images[0], sdb=images[1], hdc=disc)
    domain.create()
    domain.snapshotCreateXML(SNAPSHOT.format("first", "before the\nupdate"))
    return domain


@pytest.fixture(scope="module")
def small(libvirtd: Libvirt) -> Path:
    """The image of a machine with one disk, which is off."""
    path = qemu.create(libvirtd.folder / "small.qcow2", MiB)
    qemu.io(path, "write -P 9 0 64k")
    qemu.take(path, "by qemu-img")
    domain = libvirtd.define("small, and off", vda=path)
    domain.snapshotCreateXML(SNAPSHOT.format("by libvirt", ""))
    return path


# --- In place of an image ---


def test_a_machine_stands_for_its_disk(small: Path, tmp_path: Path) -> None:
    word = "libvirt:small, and off"
    out = tmp_path / "out"
    command.qcow2snap("copy", word, "by qemu-img", out)
    assert out.read_bytes() == qemu.content(small, "by qemu-img")
    for line in (["map"], ["check"]):
        said = command.qcow2snap(*line, word, "by libvirt")
        assert said == command.qcow2snap(*line, small, "by libvirt")
    command.qcow2snap("compact", word, tmp_path / "compact.qcow2")
    assert list(qemu.snapshots(tmp_path / "compact.qcow2")) == ["by qemu-img", "by libvirt"]


def test_of_several_disks_one_is_chosen(web: Any, images: list[Path]) -> None:
    there = f"vda ({images[0]}), sdb ({images[1]})"
    said = command.fails("map", "libvirt:web", "first")
    assert said.endswith(f"the machine 'web' has several disks: choose with --disk, {there}")
    for target, path in zip(("vda", "sdb"), images, strict=True):
        said = command.qcow2snap("map", "--disk", target, "libvirt:web", "first")
        assert said == command.qcow2snap("map", path, "first")
    said = command.fails("map", "--disk", "vdz", "libvirt:web", "first")
    assert said.endswith(f"the disk 'vdz' of 'web' is not there: qcow2 files are {there}")
    said = command.fails("map", "--disk", "hdc", "libvirt:web", "first")
    assert "'hdc' of 'web' is not there" in said


def test_it_is_served_while_the_machine_runs(web: Any) -> None:
    run = ["-U", "-", "--run", "nbdcopy 'nbd+unix:///first?socket='$unixsocket - | tail -c 3"]
    assert command.qcow2snap("serve", "libvirt:web", "--disk", "sdb", *run) == "\0\0\0"


def test_what_libvirt_knows_is_listed_beside(web: Any, images: list[Path]) -> None:
    [known] = web.listAllSnapshots()
    plain = command.qcow2snap_json("list", images[0])
    found = command.qcow2snap_json("list", "libvirt:web", "--disk", "vda")
    assert [{k: v for k, v in each.items() if k != "libvirt"} for each in found] == plain
    libvirts = {each["name"]: each["libvirt"] for each in found}
    date = libvirts["first"].pop("date-sec")
    assert f"<creationTime>{date}</creationTime>" in known.getXMLDesc()
    assert libvirts["first"] == {
        "state": "running",
        "description": "before the\nupdate",
        "parent": None,
        "current": True,
    }
    title, line, *_ = command.qcow2snap("list", "libvirt:web", "--disk", "vda").splitlines()
    assert title.endswith("  LIBVIRT")
    assert line.endswith(r" running: before the\nupdate")


def test_what_only_one_of_them_knows(small: Path, libvirtd: Libvirt) -> None:
    word = "libvirt:small, and off"
    found = {each["name"]: each["libvirt"] for each in command.qcow2snap_json("list", word)}
    assert found["by qemu-img"] is None
    assert found["by libvirt"]["state"] == "shutoff"
    qemu.delete(small, "by libvirt")
    done = command.run("list", word)
    assert done.returncode == 0
    assert "LIBVIRT" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("qcow2snap: libvirt knows 'by libvirt', ")
    assert line.endswith(" shutoff, which is not in this image")


PRUNE = ("prune", "libvirt:vm one", "--keep-last", "1")


@pytest.fixture
def vm_one(libvirtd: Libvirt) -> Iterator[tuple[Any, Path]]:
    """A machine that is off, with its image: two snapshots of libvirt's, one of qemu-img's."""
    path = qemu.create(libvirtd.folder / "one.qcow2", MiB)
    domain = libvirtd.define("vm one", vda=path)
    for name in ("full", "two words"):
        domain.snapshotCreateXML(SNAPSHOT.format(name, ""))
    qemu.take(path, "other")
    yield domain, path
    if domain.isActive():
        domain.destroy()
    for snapshot in domain.listAllSnapshots():
        snapshot.delete()
    domain.undefine()
    path.unlink()


def test_what_libvirt_has_taken_libvirt_deletes(vm_one: tuple[Any, Path]) -> None:
    domain, path = vm_one
    before = path.read_bytes()
    said = command.fails(*PRUNE)
    hint = "delete it with virsh snapshot-delete 'vm one' "
    assert said.endswith(f"libvirt knows 'full' (and 1 more of these): {hint}full")
    done = command.run(*PRUNE, "--dry-run")
    assert done.returncode == 0
    assert done.stderr.endswith(
        f"would fail: libvirt knows 'full' (and 1 more of these): {hint}full\n"
    )
    said = command.fails(*PRUNE, "--match", "two*", "--match", "other")
    assert said.endswith(f"libvirt knows 'two words': {hint}'two words'")
    assert path.read_bytes() == before
    for snapshot in domain.listAllSnapshots():
        snapshot.delete()
    qemu.take(path, "last")
    command.qcow2snap(*PRUNE)
    assert list(qemu.snapshots(path)) == ["last"]


def test_a_machine_that_runs_is_to_be_shut_down(vm_one: tuple[Any, Path]) -> None:
    """Nobody else gets at its QMP socket."""
    domain, path = vm_one
    qemu.take(path, "last")
    domain.create()
    said = command.fails(*PRUNE, "--match", "other", "--match", "last")
    assert said.endswith(
        "a QEMU has it open for writing: shut the virtual machine down first, with virsh shutdown "
        "'vm one'"
    )
    assert list(qemu.snapshots(path)) == ["full", "two words", "other", "last"]


def test_a_file_of_such_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.take(qemu.create(tmp_path / "x.qcow2", MiB), "one")
    path = (tmp_path / "x.qcow2").rename(tmp_path / "libvirt:web")
    assert command.qcow2snap_json("list", path)[0]["name"] == "one"


RELAY = """\
#!/usr/bin/python3
import os, select, socket
to = socket.socket(socket.AF_UNIX)
to.connect({socket!r})
other = {{0: to.fileno(), to.fileno(): 1}}
while all(data := [(end, os.read(end, 65536)) for end in select.select(list(other), [], [])[0]]):
    for end, content in data:
        if not content:
            raise SystemExit
        os.write(other[end], content)
"""


@pytest.fixture
def remote(libvirtd: Libvirt, tmp_path: Path) -> str:
    """A URI of the same libvirtd, as that of another host: what stands for ssh leads here."""
    ssh = tmp_path / "ssh"
    ssh.write_text(RELAY.format(socket=libvirtd.uri.partition("socket=")[2]))
    ssh.chmod(0o755)
    return f"qemu+ssh://me@node:22/session?command={ssh}&proxy=netcat"


def test_a_machine_of_another_host_has_no_image_here(
    web: Any, images: list[Path], remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", remote)
    before = images[1].read_bytes()
    for line in (["list"], ["map"], ["prune", "--keep-last", "1"]):
        snapshot = ["first"] if line == ["map"] else []
        said = command.fails(*line, "--disk", "sdb", "libvirt:web", *snapshot)
        assert "'libvirt:web' is on node:22, by libvirt's qemu+ssh://me@node:22/session" in said
        assert said.endswith(": run this there")
    assert "is on node:22" in command.fails("serve", "libvirt:web", "--disk", "sdb")
    assert images[1].read_bytes() == before


# --- take ---


def read_through(line: str) -> bytes:
    """The first bytes that a printed command serves."""
    script = f"exec {line} -U - --run 'nbdcopy \"$uri\" - | head -c 65536'"
    return subprocess.run(["sh", "-c", script], capture_output=True, timeout=60, check=True).stdout


def test_a_snapshot_of_all_its_disks_at_one_instant(web: Any, images: list[Path]) -> None:
    lines = command.qcow2snap("take", "--domain", "web", "nightly").splitlines()
    assert [shlex.split(line)[-2:] for line in lines] == [
        [f"file={path}", "snapshot=nightly"] for path in images
    ]
    for number, line in enumerate(lines, 1):
        assert read_through(line) == bytes([number]) * 64 * KiB
    dates = [
        [s["date-sec"] for s in command.qcow2snap_json("list", path) if s["name"] == "nightly"]
        for path in images
    ]
    assert abs(dates[0][0] - dates[1][0]) <= 1


def test_of_chosen_disks(web: Any, images: list[Path]) -> None:
    (line,) = command.qcow2snap("take", "--domain", "web", "--device", "sdb", "one").splitlines()
    assert f"file={images[1]}" in line
    names = [[s["name"] for s in command.qcow2snap_json("list", path)] for path in images]
    assert ["one" in each for each in names] == [False, True]


REFUSED = {
    "no such machine": (["--domain", "nope"], "has no machine 'nope': there are "),
    "a machine that is off": (["--domain", "small, and off"], "is off: take one with qemu-img"),
    "no such disk": (["--domain", "web", "--device", "vdc"], "'vdc' of 'web' is not there"),
    "no agent": (["--domain", "web", "--freeze"], "argument unsupported: QEMU guest agent"),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken(
    web: Any, small: Path, images: list[Path], words: list[str], expected: str
) -> None:
    assert expected in command.fails("take", *words, "refused")
    for path in (*images, small):
        assert "refused" not in [s["name"] for s in command.qcow2snap_json("list", path)]


@pytest.mark.parametrize(
    "words", [["--qmp", "x", "--freeze"], ["--domain", "x", "--agent", "y"], ["--qmp", "x"]]
)
def test_usage(words: list[str]) -> None:
    assert command.run("take", *words, "name").returncode == 2


def test_the_guest_is_frozen_and_thawed() -> None:
    """libvirt's own test driver counts: a real agent would need a guest with a system."""
    import libvirt

    connection = libvirt.open("test:///default")
    [domain] = connection.listAllDomains()
    with Monitor(connection, domain).frozen():
        assert domain.fsThaw() == 2
        domain.fsFreeze()
    assert domain.fsThaw() == 0
    connection.close()


def test_a_machine_that_has_ended_is_not_thawed() -> None:
    import libvirt

    def end(refused: QmpError | None) -> None:
        with Monitor(connection, domain).frozen():
            domain.destroy()
            if refused is not None:
                raise refused

    connection = libvirt.open("test:///default")
    [domain] = connection.listAllDomains()
    with pytest.raises(NotThawed, match="^the guest was not thawed: libvirt: .*not running"):
        end(None)
    domain.create()
    with pytest.raises(NotThawed, match="^it was refused; the guest was not thawed: libvirt: "):
        end(QmpError("it was refused"))
    domain.create()
    connection.close()


def test_what_qemu_refuses_through_libvirt(web: Any) -> None:
    with monitor("web") as qemu:
        with pytest.raises(QmpError, match=r"^no-such\n: .*no-such\\n has not been found"):
            qemu.execute("no-such\n")
        assert qemu.execute("query-status")["status"] == "running"


UNNAMED = """
<domain type='test'>
  <name>unnamed</name><memory>1024</memory><os><type>hvm</type></os>
  <devices><disk type='file' device='disk'>
    <driver type='qcow2'/><source file='{path}'/><target dev='vda'/>
  </disk></devices>
</domain>
"""


class Through(Monitor):
    """What QEMU's own socket answers, for a machine of libvirt's test driver."""

    def __init__(self, connection: Any, domain: Any, qemu: Qmp) -> None:
        super().__init__(connection, domain)
        self.execute = qemu.execute  # type: ignore[method-assign]


def test_a_disk_without_an_alias_is_no_other_one(tmp_path: Path) -> None:
    """QEMU has a drive that belongs to no device, and so has no path of one either."""
    import libvirt

    path = qemu.create(tmp_path / "disk.qcow2", MiB)
    socket = tmp_path / "qmp"
    more = ("-drive", f"if=none,id=spare,file={path},format=qcow2")
    connection = libvirt.open("test:///default")
    domain = connection.createXML(UNNAMED.format(path=tmp_path / "other.qcow2"))
    listen = ("-qmp", f"unix:{socket},server=on,wait=off")
    first = qemu.create(tmp_path / "first.qcow2", MiB)
    with (
        machine(first, *more, *listen),
        Qmp(str(socket)) as qmp,
        pytest.raises(UsageError, match="QEMU has nothing in the disk 'vda'"),
    ):
        Through(connection, domain, qmp).nodes([])
    domain.destroy()
    connection.close()


# --- Without libvirt ---


def test_no_libvirtd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", f"qemu+unix:///session?socket={tmp_path}/none")
    said = command.fails("list", "libvirt:web")
    assert said.startswith("qcow2snap: libvirt: failed to connect socket to ")


def test_no_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libvirt.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = command.fails("list", "libvirt:web")
    assert said == "qcow2snap: libvirt's Python module is missing: install python3-libvirt"
