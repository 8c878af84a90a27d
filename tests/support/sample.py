"""The image in all examples of the documentation: a guest's disk with two snapshots."""

from __future__ import annotations

import struct
from pathlib import Path

from support import qemu, secret
from support.qemu import MiB

# A boot loader that writes itself, with the signature "B" in place of the first byte, to the
# next sector, says "booted" on the serial line and ends QEMU through isa-debug-exit.
_SAY = b"".join(b"\xb0" + bytes([c]) + b"\xee" for c in b"booted\n")  # mov al, c; out dx, al
_BOOT = (
    b"\x31\xc0\x8e\xc0"  # xor ax, ax; mov es, ax
    b"\x26\xc7\x06\x00\x80\x42\x42"  # mov word es:[0x8000], "BB"
    b"\x26\xc7\x06\x02\x80\x42\x42"  # mov word es:[0x8002], "BB"
    b"\xb8\x01\x03\xbb\x00\x80\xb9\x02\x00\xb6\x00\xcd\x13"  # write the sector at 0x8000 to LBA 1
    b"\xba\xf8\x03" + _SAY + b"\xba\x01\x05\xb0\x00\xee\xf4"  # port 0x501: out dx, al; hlt
)


def make_sample(directory: Path) -> Path:
    """``disk.qcow2``: 64 MiB with a master boot record and one ext4 partition; ``weekly`` is from
    before anything was written, ``nightly`` has it all, and the active disk is damaged."""
    guest = directory / "root"
    (guest / "etc").mkdir(parents=True)
    (guest / "etc" / "hostname").write_text("guest1\n")
    (guest / "var" / "log").mkdir(parents=True)
    (guest / "var" / "log" / "messages").write_text("".join(f"line {n}\n" for n in range(200_000)))
    raw, part = directory / "raw", directory / "part"
    qemu.run("/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", guest, part, "63M")
    entry = struct.pack("<8BII", 0x80, 0, 0, 0, 0x83, 0, 0, 0, 2048, 63 * MiB // 512)
    head = _BOOT.ljust(446, b"\0") + entry + bytes(48) + b"\x55\xaa"
    raw.write_bytes(head.ljust(MiB, b"\0") + part.read_bytes())
    path = qemu.create(directory / "disk.qcow2", 64 * MiB)
    qemu.take(path, "weekly")
    qemu.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.take(path, "nightly")
    qemu.io(path, "write -P 7 0 4M")
    return path


def make_encrypted_sample(directory: Path) -> None:
    """``secret.qcow2``, encrypted with what ``secret.txt`` says, and its snapshot ``nightly``."""
    path = directory / "secret.qcow2"
    options: dict[str, object] = {"encrypt.format": "luks"}
    secret.create(path, 4 * MiB, ("open sesame",), **options)
    secret.take(path, ("open sesame",), "nightly")
    (directory / "secret.txt").write_text("open sesame\n")
