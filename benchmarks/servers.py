"""The three servers that are compared, each started for one measurement and ended after it."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from images import SECRET, SNAPSHOT, Image

PLUGIN = Path(__file__).resolve().parents[1] / "plugin" / "qcow2snap.py"
EMPTY = Path(__file__).resolve().with_name("empty_plugin.py")
SERVERS = ("plugin", "qemu-nbd", "file")


class Server:
    """A running server; ``uri`` is its only export."""

    def __init__(self, uri: str, pid: int) -> None:
        self.uri = uri
        self._pid = pid

    def peak_memory(self) -> int:
        """Peak resident bytes so far."""
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise OSError("no VmHWM")


def command(kind: str, image: Image, socket: Path) -> list[str]:
    """The command line of a server that stays in the foreground."""
    if kind == "plugin":
        secret = [f"passphrase={SECRET}"] if image.encrypted else []
        keys = [f"file={image.path}", f"snapshot={SNAPSHOT}", *secret]
        return ["nbdkit", "-f", "-U", str(socket), "python", str(PLUGIN), *keys]
    if kind == "empty":
        return ["nbdkit", "-f", "-U", str(socket), "python", str(EMPTY)]
    if kind == "file":
        return ["nbdkit", "-f", "-U", str(socket), "-r", "file", str(image.raw)]
    line = [
        "qemu-nbd",
        "-r",
        "-t",
        "-e",
        "16",
        "-k",
        str(socket),
        "-l",
        f"snapshot.name={SNAPSHOT}",
    ]
    if image.encrypted:
        line += ["--object", f"secret,id=s,data={SECRET}", "--image-opts"]
        return [*line, f"driver=qcow2,file.filename={image.path},encrypt.key-secret=s"]
    return [*line, "-f", "qcow2", str(image.path)]


@contextmanager
def serve(kind: str, image: Image) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder, "s")
        process = subprocess.Popen(
            command(kind, image, socket), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            uri = f"nbd+unix:///?socket={socket}"
            while not socket.exists() or _refused(uri):
                if process.poll() is not None:
                    raise SystemExit(f"{kind} did not start for {image.path.name}")
                time.sleep(0.01)
            yield Server(uri, process.pid)
        finally:
            process.terminate()
            process.wait()


def _refused(uri: str) -> bool:
    done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False)
    return done.returncode != 0
