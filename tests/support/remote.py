"""An NBD server that has a file for others to read, as ssh, S3 or Ceph would be reached."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.running import eventually


class Remote:
    """nbdkit with other plugins than ours, on a Unix socket; can be killed and started again."""

    def __init__(self, directory: Path, arguments: tuple[object, ...]) -> None:
        self.socket = directory / "remote.sock"
        self.uri = f"nbd+unix://?socket={self.socket}"
        self._log = directory / "log"
        self._arguments = [str(a) for a in arguments]

    def start(self) -> None:
        ready = self.socket.with_name("pid")
        ready.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        line = ["nbdkit", "-f", "-U", str(self.socket), "-P", str(ready), *self._arguments]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(line, stderr=log, stdin=subprocess.DEVNULL)

        def listening() -> bool:
            said = self._log.read_text()
            assert self._process.poll() is None, f"{shlex.join(line)}: {said}"
            return ready.exists()

        eventually(listening)

    def freeze(self) -> None:
        """From here on it says nothing; whoever connects is let in, and waits."""
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")

        def stopped() -> bool:
            states = [task.read_text() for task in tasks.glob("*/stat")]
            return all(state.rpartition(")")[2].split()[0] == "T" for state in states)

        eventually(stopped)  # the kernel tells one thread after the other

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)


@contextmanager
def remote(*arguments: object) -> Iterator[Remote]:
    """nbdkit with these arguments until the block ends: ``remote("file", path)``."""
    with tempfile.TemporaryDirectory() as directory:
        server = Remote(Path(directory), arguments)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def remote_tcp(*arguments: object) -> Iterator[str]:
    """The same on a free TCP port of this machine; yields the URI."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # As systemd does it: the socket is descriptor 3.
        script = f'LISTEN_FDS=1 LISTEN_PID=$$ exec nbdkit "$@" 3<&{listening.fileno()}'
        line = ["bash", "-c", script, "-", *map(str, arguments)]
        process = subprocess.Popen(line, pass_fds=[listening.fileno()], stdin=subprocess.DEVNULL)
        try:
            yield f"nbd://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.kill()
            process.wait(20)
