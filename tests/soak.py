"""A server that is used, and misused, for a long time: does it keep anything?

    make soak MINUTES=60

One nbdkit serves an image that a running QEMU writes to.  Clients come, read a while and leave, or
are killed in the middle; snapshots are taken and deleted, also those that somebody is reading; the
file is cut short under the server and made whole again.  Every minute a line says how many file
descriptors, threads and bytes of memory the server has.  In the end, when all clients are gone, it
must have about as many as after the first rounds.  The bound is wide, since a heap never shrinks to
what it was; what leaks with each client or each deletion is beyond it after some minutes.  The
caches are small, or they would still be filling.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1)]

import nbd
from support import qemu
from support.live import running
from support.qemu import KiB, MiB
from support.running import eventually
from support.server import Server, serve

SIZE = 16 * MiB
SMALL = {"l2_cache_size": "1M", "cluster_cache_size": "1M"}  # full before the first look
KEPT = "kept"  # a snapshot that stays, and whose bytes are known


class Use(NamedTuple):
    """What the server has in use."""

    descriptors: int
    threads: int
    memory: int

    @classmethod
    def of(cls, server: Server) -> Use:
        return cls(
            len(os.listdir(f"/proc/{server.pid}/fd")),
            len(os.listdir(f"/proc/{server.pid}/task")),
            server.memory(),
        )

    def __str__(self) -> str:
        memory = self.memory / MiB
        return f"{self.descriptors} descriptors, {self.threads} threads, {memory:.1f} MiB"


class Soak:
    """The server, the writer and their clients; each method is something that happens."""

    def __init__(self, path: Path, server: Server, writer, rng: random.Random) -> None:
        self._path, self._server, self._writer, self._rng = path, server, writer, rng
        self._right = qemu.content(path, KEPT)
        self._taken: list[str] = []
        self._number = 0
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def round(self) -> None:
        """A few clients at once, and one thing that happens meanwhile."""
        clients = [
            threading.Thread(target=self._client, args=(self._rng.randrange(1 << 30),))
            for _ in range(self._rng.randrange(1, 6))
        ]
        for client in clients:
            client.start()
        happens = self._rng.choice((self._take, self._take, self._delete, self._cut, self._kill))
        happens()
        self.seen[happens.__name__.strip("_")] += 1
        for client in clients:
            client.join()

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        name = rng.choice((KEPT, *self._taken, "no such snapshot"))
        try:
            with self._server.connect(name, extents=True) as handle:
                for _ in range(rng.randrange(40)):
                    length = rng.choice((512, 64 * KiB, MiB))
                    offset = rng.randrange((SIZE - length) // 512 + 1) * 512
                    data = handle.pread(length, offset)
                    self.seen["reads"] += 1
                    if name == KEPT and data != self._right[offset : offset + length]:
                        self.wrong.append(f"wrong bytes at {offset:#x}")
                if rng.random() < 0.3:
                    handle.block_status(SIZE, 0, lambda *_: 0)
        except nbd.Error as e:
            self.seen[f"clients with {e.errno or 'no connection'}"] += 1
        self.seen["clients"] += 1

    def _take(self) -> None:
        self._number += 1
        with self._writer.guest() as disk:
            for _ in range(16):
                disk.pwrite(self._rng.randbytes(4 * KiB), self._rng.randrange(SIZE // 4096) * 4096)
        self._writer.take(f"s{self._number}")
        self._taken = [*self._taken, f"s{self._number}"]
        if len(self._taken) > 6:
            self._delete()

    def _delete(self) -> None:
        if self._taken:
            name = self._rng.choice(self._taken)
            self._taken = [n for n in self._taken if n != name]
            self._writer.delete(name)

    def _cut(self) -> None:
        """Of a copy of the file, since QEMU would not survive it."""
        copy = self._path.with_name("copy.qcow2")
        copy.write_bytes(self._path.read_bytes())
        with serve(file=copy, snapshot=KEPT) as server, server.connect() as handle:
            before = Use.of(server)
            for _ in range(20):
                os.truncate(copy, self._rng.randrange(copy.stat().st_size))
                with suppress(nbd.Error):
                    handle.pread(64 * KiB, self._rng.randrange(SIZE // 65536) * 65536)
                copy.write_bytes(self._path.read_bytes())
            after = Use.of(server)
            if after.descriptors > before.descriptors + 4:
                self.wrong.append(f"truncations cost descriptors: {before}, then {after}")

    def _kill(self) -> None:
        """A client that has requests in flight, and one that has said half a word."""
        out = self._path.with_name("out")
        process = subprocess.Popen(
            ["nbdcopy", self._server.uri(KEPT), out], stderr=subprocess.DEVNULL
        )
        time.sleep(self._rng.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.wait()


def soak(minutes: float, seed: int) -> int:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        path = qemu.create(Path(directory) / "disk.qcow2", SIZE)
        qemu.io(path, "write -P 7 0 8M", "write -c -P 8 8M 64k", "write -P 9 12M 1M")
        qemu.take(path, KEPT)
        with running(path) as writer, serve(file=path, **SMALL) as server:
            it = Soak(path, server, writer, rng)
            for _ in range(20):
                it.round()
            first = idle(server)
            print(f"after 20 rounds: {first}", flush=True)
            end = time.monotonic() + 60 * minutes
            told = time.monotonic()
            rounds = 20
            while time.monotonic() < end and not it.wrong:
                it.round()
                rounds += 1
                if time.monotonic() > told + 60:
                    told = time.monotonic()
                    print(f"after {rounds} rounds: {idle(server)}", flush=True)
            last = idle(server)
            lines = server.log.splitlines()
            print(f"after {rounds} rounds: {last}")
            print(", ".join(f"{n} {what}" for what, n in sorted(it.seen.items())))
            traces = [line for line in lines if "Traceback" in line]
            print(f"{len(lines)} lines in the log, {len(traces)} tracebacks")
            problems = [*it.wrong, *traces]
            if last.descriptors > first.descriptors + 16:
                problems.append("descriptors grew")
            if last.threads > first.threads + 16:
                problems.append("threads grew")
            if last.memory > first.memory + 32 * MiB:
                problems.append("memory grew")
            for problem in problems:
                print(problem)
            return 1 if problems else 0


def idle(server: Server) -> Use:
    """When the last connection's threads have ended, which the next client may not wait for."""
    eventually(lambda: Use.of(server).threads < 8)
    return Use.of(server)


def main() -> int:
    parser = argparse.ArgumentParser(description="Use a server for a long time")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    return soak(args.minutes, args.seed)


if __name__ == "__main__":
    sys.exit(main())
