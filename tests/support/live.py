"""A QEMU that runs: qemu-storage-daemon with an image open for writing.

Its NBD export is the disk as the guest sees it, and its QMP socket takes and deletes internal
snapshots while the guest writes; block layer, locks and order of writes are those of a VM.
"""

from __future__ import annotations

import json
import shlex
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbd

from .secret import Secrets, objects

# How libvirt's cache modes of the same names open a file.
CACHE_MODES = {
    "writeback": "cache.direct=off,aio=threads",
    "none": "cache.direct=on,aio=native",
}


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """One client of a QMP socket; may be used from several threads."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(600)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._lock = threading.Lock()
        assert "QMP" in json.loads(self._file.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """What the command returns; ``_`` in an argument's name stands for ``-``."""
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        with self._lock:
            json.dump({"execute": command, "arguments": arguments}, self._file)
            self._file.flush()
            for line in self._file:
                answer = json.loads(line)
                if "error" in answer:
                    raise QmpError(answer["error"]["desc"])
                if "return" in answer:
                    return answer["return"]
        raise ConnectionError("QEMU closed its QMP socket")

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._socket.close()


class Qemu:
    """A running qemu-storage-daemon; the node and the export are named ``disk``."""

    def __init__(self, process: subprocess.Popen[bytes], nbd_socket: Path, qmp: Qmp) -> None:
        self.process = process
        self.qmp = qmp
        #: another QMP socket, that nobody uses
        self.qmp_socket = nbd_socket.with_name("qmp2")
        self._nbd_socket = nbd_socket

    def take(self, name: str) -> None:
        self.qmp.execute("blockdev-snapshot-internal-sync", device="disk", name=name)

    def delete(self, name: str) -> None:
        self.qmp.execute("blockdev-snapshot-delete-internal-sync", device="disk", name=name)

    @contextmanager
    def guest(self) -> Iterator[nbd.NBD]:
        """The disk as the guest has it, for reading and writing."""
        handle = nbd.NBD()
        handle.set_export_name("disk")
        handle.connect_unix(str(self._nbd_socket))
        try:
            yield handle
        finally:
            with suppress(nbd.Error):  # QEMU may have been killed
                handle.shutdown()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(20)


@contextmanager
def running(
    path: Path, cache: str = "writeback", *, discard: bool = False, secrets: Secrets = ()
) -> Iterator[Qemu]:
    """QEMU with the image (a file or a block device) open until the block ends.

    ``discard``: what QEMU frees is punched out of the file and so reads as zeros.
    """
    driver = "host_device" if stat.S_ISBLK(path.stat().st_mode) else "file"
    key = ",encrypt.format=luks,encrypt.key-secret=s0" if secrets else ""
    unmap = f"discard={'unmap' if discard else 'ignore'}"
    with tempfile.TemporaryDirectory() as directory:
        qmp_socket, nbd_socket = Path(directory, "qmp"), Path(directory, "nbd")
        line = [
            "qemu-storage-daemon",
            *objects(secrets),
            f"--blockdev=driver={driver},node-name=file,{unmap},{CACHE_MODES[cache]},"
            f"filename={path}",
            f"--blockdev=driver=qcow2,node-name=disk,file=file,{unmap}{key}",
            f"--nbd-server=addr.type=unix,addr.path={nbd_socket},max-connections=0",
            "--export=type=nbd,id=export,node-name=disk,name=disk,writable=on",
            f"--chardev=socket,id=qmp,path={qmp_socket},server=on,wait=off",
            "--monitor=chardev=qmp",
            f"--chardev=socket,id=qmp2,path={qmp_socket}2,server=on,wait=off",
            "--monitor=chardev=qmp2",
        ]
        with open(Path(directory, "log"), "w+b") as log:
            process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=log)
            try:
                deadline = time.monotonic() + 30
                while (qmp := _connected(qmp_socket)) is None:
                    said = Path(log.name).read_text()
                    assert process.poll() is None, f"{shlex.join(line)}: {said}"
                    assert time.monotonic() < deadline, "QEMU did not start"
                    time.sleep(0.01)
                try:
                    yield Qemu(process, nbd_socket, qmp)
                finally:
                    qmp.close()
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGCONT)
                    process.terminate()
                    process.wait(30)


def _connected(path: Path) -> Qmp | None:
    """None while QEMU is starting; it answers once the image and the export are there."""
    try:
        return Qmp(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The process hangs where it is (SIGSTOP) until the block ends."""
    process.send_signal(signal.SIGSTOP)
    status = Path(f"/proc/{process.pid}/status")
    while "\nState:\tT" not in status.read_text():
        time.sleep(0.001)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
