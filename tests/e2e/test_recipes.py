"""The recipes do what they say: each section of docs/recipes.md is run, its output compared."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.documents import Section, run, sections
from support.qemu import MiB
from support.server import ROOT, command

SECTIONS = sections(ROOT / "docs" / "recipes.md")

# A boot loader that writes itself, with the signature "B" in place of the first byte, to the
# next sector, says "booted" on the serial line and ends QEMU through isa-debug-exit.
_SAY = b"".join(b"\xb0" + bytes([c]) + b"\xee" for c in b"booted\n")  # mov al, c; out dx, al
BOOT = (
    b"\x31\xc0\x8e\xc0"  # xor ax, ax; mov es, ax
    b"\x26\xc7\x06\x00\x80\x42\x42"  # mov word es:[0x8000], "BB"
    b"\x26\xc7\x06\x02\x80\x42\x42"  # mov word es:[0x8002], "BB"
    b"\xb8\x01\x03\xbb\x00\x80\xb9\x02\x00\xb6\x00\xcd\x13"  # write the sector at 0x8000 to LBA 1
    b"\xba\xf8\x03" + _SAY + b"\xba\x01\x05\xb0\x00\xee\xf4"  # port 0x501: out dx, al; hlt
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image that docs/recipes.md describes."""
    directory = tmp_path_factory.mktemp("image")
    etc = directory / "root" / "etc"
    etc.mkdir(parents=True)
    (etc / "hostname").write_text("guest1\n")
    raw, part = directory / "raw", directory / "part"
    qemu.run("/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", directory / "root", part, "63M")
    entry = struct.pack("<8BII", 0x80, 0, 0, 0, 0x83, 0, 0, 0, 2048, 63 * MiB // 512)
    head = BOOT.ljust(446, b"\0") + entry + bytes(48) + b"\x55\xaa"
    raw.write_bytes(head.ljust(MiB, b"\0") + part.read_bytes())
    path = qemu.create(directory / "disk.qcow2", 64 * MiB)
    qemu.take(path, "weekly")
    qemu.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, "nightly")
    qemu.io(path, "write -P 7 0 4M")
    return path


@pytest.mark.parametrize("section", SECTIONS, ids=[s.title for s in SECTIONS])
def test_recipe(section: Section, image: Path, tmp_path: Path) -> None:
    if missing := section.missing():
        pytest.skip(f"not here: {', '.join(missing)}")
    shutil.copy(image, tmp_path / "disk.qcow2")
    run(section, tmp_path)


def test_it_serves_on_a_socket_that_it_is_handed(image: Path, tmp_path: Path) -> None:
    # What systemd does: the socket is descriptor 3, and two variables say so.
    with socket.socket(socket.AF_UNIX) as listening, open(tmp_path / "log", "wb") as log:
        listening.bind(str(tmp_path / "nbd.sock"))
        listening.listen()
        script = f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listening.fileno()}'
        line = command(filters=("exitlast",), file=image)
        process = subprocess.Popen(
            ["bash", "-c", script, "-", *line], pass_fds=[listening.fileno()], stderr=log
        )
    try:
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///nightly?socket={tmp_path}/nbd.sock")
        assert client.get_size() == 64 * MiB
        client.shutdown()
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_the_runner_sees_other_output(tmp_path: Path) -> None:
    wrong = Section("wrong", [], [("echo one", "two\n")])
    with pytest.raises(AssertionError, match="should print\ntwo"):
        run(wrong, tmp_path)
