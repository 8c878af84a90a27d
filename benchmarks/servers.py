"""The servers that are compared, each started for one measurement and ended after it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from images import SECRET, SNAPSHOT, Image

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "plugin" / "qcow2snap.py"
EMPTY = Path(__file__).resolve().with_name("empty_plugin.py")

# "plugin" is the plugin with the engine that it chooses itself, or that the environment says.
ENGINES = {"plugin": None, "native": "1", "python": "0"}
_TICK = 1 / os.sysconf("SC_CLK_TCK")


def environment(kind: str) -> dict[str, str]:
    """What a server of that kind is started with."""
    found = dict(os.environ)
    # An installed package has its bytecode: do not measure servers that compile it anew.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    if ENGINES.get(kind) is not None:
        found["QCOW2SNAP_NATIVE"] = str(ENGINES[kind])
    return found


def engine(kind: str) -> str:
    """Which engine the plugin runs when it is asked for one: native or python."""
    line = ["nbdkit", "python", str(PLUGIN), "--dump-plugin"]
    said = subprocess.run(
        line, check=True, capture_output=True, text=True, env=environment(kind)
    ).stdout
    return "native" if "qcow2snap_native=yes" in said.splitlines() else "python"


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

    def cpu(self) -> float:
        """Seconds of CPU so far, the kernel's on its behalf too, of all its threads, also of those
        that have ended."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK


def arguments(kind: str, image: Image, plugin: Path = PLUGIN) -> list[str]:
    """The command line of a server that stays in the foreground, but for its socket."""
    if kind in ENGINES:
        secret = [f"passphrase={SECRET}"] if image.encrypted else []
        keys = [f"file={image.path}", f"snapshot={SNAPSHOT}", *secret]
        return ["nbdkit", "-f", "python", str(plugin), *keys]
    if kind == "empty":
        return ["nbdkit", "-f", "python", str(EMPTY)]
    if kind == "file":
        return ["nbdkit", "-f", "-r", "file", str(image.raw)]
    line = ["qemu-nbd", "-r", "-t", "-e", "16", "-l", f"snapshot.name={SNAPSHOT}"]
    if image.encrypted:
        line += ["--object", f"secret,id=s,data={SECRET}", "--image-opts"]
        return [*line, f"driver=qcow2,file.filename={image.path},encrypt.key-secret=s"]
    return [*line, "-f", "qcow2", str(image.path)]


@contextmanager
def serve(kind: str, image: Image) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder, "s")
        program, *rest = arguments(kind, image)
        line = [program, "-k" if program == "qemu-nbd" else "-U", str(socket), *rest]
        log = Path(folder, "log")
        with open(log, "wb") as err:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stderr=err, env=environment(kind)
            )
        try:
            uri = f"nbd+unix:///?socket={socket}"
            while not socket.exists() or _refused(uri):
                if process.poll() is not None:
                    raise SystemExit(f"{kind} did not start for {image.path}: {log.read_text()}")
                time.sleep(0.01)
            yield Server(uri, process.pid)
        finally:
            process.terminate()
            process.wait()


def _refused(uri: str) -> bool:
    done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False)
    return done.returncode != 0
