"""A real nbdkit with the plugin in it, and real libnbd clients."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import nbd

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugin" / "qcow2snap.py"
#: How nbdkit is told; the installed plugin where the tests were copied without the sources.
PLUGIN_WORDS = ["python", str(PLUGIN)] if PLUGIN.exists() else ["qcow2snap"]


def command(*arguments: object, filters: tuple[str, ...] = (), **keys: object) -> list[str]:
    """The nbdkit command line; ``_`` in a key stands for ``-``; a list gives a key repeatedly."""
    line = ["nbdkit", *(f"--filter={f}" for f in filters), *PLUGIN_WORDS]
    for key, value in keys.items():
        for one in value if isinstance(value, list) else [value]:
            line.append(f"{key.replace('_', '-')}={one}")
    return line + [str(a) for a in arguments]


def refused(*arguments: object, cwd: Path | None = None, **keys: object) -> str:
    """The one line that nbdkit prints when the plugin refuses to start."""
    done = subprocess.run(
        [*command(*arguments, **keys), "--run", "true"],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode != 0, f"nbdkit started: {done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


class Server:
    """A running nbdkit."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
        self.process = process
        self.socket = socket
        self._log = log

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return self._log.read_text(errors="surrogateescape")

    @property
    def pid(self) -> int:
        return self.process.pid

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{quote(export, safe='')}?socket={self.socket}"

    @contextmanager
    def connect(self, export: str = "", *, extents: bool = False) -> Iterator[nbd.NBD]:
        """A libnbd handle that is connected to one export."""
        handle = nbd.NBD()
        handle.set_export_name(export)
        handle.set_strict_mode(0)  # let the server be the one to refuse
        if extents:
            handle.add_meta_context("base:allocation")
        handle.connect_unix(str(self.socket))
        try:
            yield handle
        finally:
            handle.shutdown()

    def read(self, export: str = "") -> bytes:
        """The whole export."""
        with self.connect(export) as handle:
            size = handle.get_size()
            step = 1 << 20
            return b"".join(
                bytes(handle.pread(min(step, size - at), at)) for at in range(0, size, step)
            )

    def copy(self, export: str = "") -> bytes:
        """The whole export as nbdcopy gets it, over several connections."""
        out = self.socket.with_name("copy")
        done = subprocess.run(
            ["nbdcopy", self.uri(export), out], capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{done.stderr!r}: {self.log}"
        try:
            return out.read_bytes()
        finally:
            out.unlink()

    def extents(self, export: str = "") -> list[tuple[int, int, int]]:
        """All extents as (offset, length, type), merged."""
        with self.connect(export, extents=True) as handle:
            return block_status(handle, 0, handle.get_size())

    def threads(self) -> int:
        """How many the process has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def memory(self) -> int:
        """Resident bytes of the process."""
        with open(f"/proc/{self.pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def nbdkit_config(key: str) -> str:
    """What this nbdkit was built with."""
    line = ["nbdkit", "--dump-config"]
    said = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in said.splitlines())[key]


def has_filter(name: str) -> bool:
    return Path(nbdkit_config("filterdir"), f"nbdkit-{name}-filter.so").exists()


def block_status(
    handle: nbd.NBD, offset: int, length: int, flags: int = 0
) -> list[tuple[int, int, int]]:
    """The extents of a range, merged; asks again where the server answered in part.

    With flags (REQ_ONE) it asks once.
    """
    found: list[tuple[int, int, int]] = []
    at, end = offset, offset + length

    def collect(context: str, start: int, entries: list[int], error: object) -> None:
        nonlocal at
        assert context == "base:allocation"
        for n, kind in zip(entries[::2], entries[1::2], strict=True):
            if found and found[-1][2] == kind:
                found[-1] = (found[-1][0], found[-1][1] + n, kind)
            else:
                found.append((start, n, kind))
            start += n
        at = start

    while at < end:
        handle.block_status(min(end - at, 1 << 30), at, collect, flags)
        if flags:
            break
    return found


@contextmanager
def serve(*arguments: object, filters: tuple[str, ...] = (), **keys: object) -> Iterator[Server]:
    """nbdkit on a Unix socket until the block ends; it must still be alive then."""
    with tempfile.TemporaryDirectory() as directory:
        socket, log = Path(directory, "nbd.sock"), Path(directory, "log")
        ready = Path(directory, "pid")  # written when it listens; the socket is there before
        line = command(*arguments, filters=filters, **keys)
        line[1:1] = ["-f", "-U", str(socket), "-P", str(ready)]
        with open(log, "wb") as stderr:
            process = subprocess.Popen(line, stderr=stderr, stdin=subprocess.DEVNULL)
        server = Server(process, socket, log)
        try:
            deadline = time.monotonic() + 30
            while not ready.exists():
                assert process.poll() is None, f"{shlex.join(line)}: {server.log}"
                assert time.monotonic() < deadline, "nbdkit did not start"
                time.sleep(0.01)
            yield server
            assert process.poll() is None, f"nbdkit died: {server.log[-2000:]}"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    raise
        assert process.returncode == 0, f"it ended with {process.returncode}: {server.log[-2000:]}"
