"""A real libvirtd with real machines: a session's, which needs no privileges and no systemd.

Root cannot have one: there it is nobody's.  The machines have no operating system, and QEMU's
emulation of a processor runs them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_NOBODY = 65534

MACHINE = """
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {disks}
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
</domain>
"""
DISK = """
<disk type='file' device='{device}'>
  <driver name='qemu' type='{format}'/><source file='{path}'/><target dev='{target}' bus='{bus}'/>
</disk>
"""


class Libvirt:
    """A running libvirtd; ``folder`` is where its machines' images may be."""

    def __init__(self, folder: Path, connection: Any, uri: str) -> None:
        self.folder = folder
        self.uri = uri
        self._connection = connection

    def define(self, name: str, **disks: Path) -> Any:
        """A machine that is off, with qcow2 images by their targets; a raw one is a CD."""
        described = []
        for target, path in disks.items():
            if not os.geteuid():
                os.chown(path, _NOBODY, _NOBODY)
            kind = "qcow2" if path.suffix == ".qcow2" else "raw"
            device = "disk" if kind == "qcow2" else "cdrom"
            bus = {"vd": "virtio", "sd": "sata", "hd": "ide"}[target[:2]]
            where = {"path": path, "target": target, "bus": bus}
            described.append(DISK.format(device=device, format=kind, **where))
        return self._connection.defineXML(MACHINE.format(name=name, disks="".join(described)))


@contextmanager
def running() -> Iterator[Libvirt]:
    """Skips the test where there is none."""
    if importlib.util.find_spec("libvirt") is None or shutil.which("libvirtd", path=_PATH) is None:
        pytest.skip("no libvirtd here")
    import libvirt

    libvirt.registerErrorHandler(lambda *_: None, None)
    with TemporaryDirectory() as name:  # a socket's path is to be short
        folder = Path(name)
        run, home = folder / "run", folder / "home"
        for path in (run, home):
            path.mkdir(0o700)
        prefix: list[str] = []
        if not os.geteuid():
            for path in (folder, run, home):
                os.chown(path, _NOBODY, _NOBODY)
            prefix = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
        environment = {"PATH": _PATH, "HOME": str(home), "XDG_RUNTIME_DIR": str(run)}
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [*prefix, "libvirtd"], cwd="/", env=environment, stdout=log, stderr=log
            )
        try:
            uri = f"qemu+unix:///session?socket={run}/libvirt/libvirt-sock"
            connection = _connected(libvirt, uri, process, folder / "log")
            try:
                yield Libvirt(folder, connection, uri)
            finally:
                for domain in connection.listAllDomains():
                    if domain.isActive():
                        domain.destroy()
                connection.close()
        finally:
            process.terminate()
            process.wait(60)


def _connected(libvirt: Any, uri: str, process: subprocess.Popen[bytes], log: Path) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            return libvirt.open(uri)
        except libvirt.libvirtError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
