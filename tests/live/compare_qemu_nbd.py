"""qemu-nbd -l on the tests' own ground: what it returns after the snapshot was deleted.

    make compare-live

The same guest, the same readers and the same delete as in test_live.py, with the snapshot served
by ``qemu-nbd -l`` (``force-share``, without which it refuses an image in use) and by nbdkit with
this plugin.  qemu-nbd reads the snapshot's tables once and never learns that it has gone, so it
goes on answering from clusters that hold something else by then.  Nothing passes or fails here:
the numbers are printed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import nbd

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from support import qemu  # noqa: E402
from support.guest import BLOCK, Guest, Life, Reader, Tally  # noqa: E402
from support.live import CACHE_MODES, running  # noqa: E402
from support.qemu import MiB  # noqa: E402
from support.server import serve  # noqa: E402

ROUNDS = 5
BLOCKS = 8 * MiB // BLOCK
WRITTEN = 7 * MiB // BLOCK
READERS = 3
SECONDS = 0.5  # of reading after the delete
Connect = Callable[[], AbstractContextManager[nbd.NBD]]


@contextmanager
def qemu_nbd(path: Path) -> Iterator[Connect]:
    socket = path.with_name("qemu-nbd.sock")
    image = f"driver=qcow2,file.driver=file,force-share=on,file.filename={path}"
    line = ["qemu-nbd", "-r", "-t", "-e", "8", "-k", str(socket), "-l", "served"]
    process = subprocess.Popen([*line, "--image-opts", image])

    @contextmanager
    def connect() -> Iterator[nbd.NBD]:
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_unix(str(socket))
        yield handle
        with suppress(nbd.Error):
            handle.shutdown()

    try:
        while not socket.exists():
            assert process.poll() is None, "qemu-nbd did not start"
            time.sleep(0.01)
        yield connect
    finally:
        process.terminate()
        process.wait(20)
        socket.unlink(missing_ok=True)


@contextmanager
def ours(path: Path) -> Iterator[Connect]:
    with serve(file=path, snapshot="served") as server:
        yield lambda: server.connect(extents=True)


def play(server: Callable[[Path], AbstractContextManager[Connect]], cache: str) -> Tally:
    """Some rounds; what the readers saw in all of them."""
    total = Tally()
    with tempfile.TemporaryDirectory() as directory:
        path = qemu.create(Path(directory, "disk.qcow2"), BLOCKS * BLOCK)
        guest = Guest(BLOCKS)
        with running(path, cache) as q, q.guest() as disk:
            for _ in range(ROUNDS):
                guest.write_all(disk, WRITTEN)
                expected, life = guest.take(q, "served"), Life()
                guest.write_all(disk, WRITTEN // 3)
                with server(path) as connect:
                    readers = [Reader(connect, expected, life, n) for n in range(READERS)]
                    time.sleep(SECONDS)
                    life.end(lambda: q.delete("served"))
                    guest.write_all(disk, WRITTEN)
                    time.sleep(SECONDS)
                    for reader in readers:
                        total.add(reader.finish())
    return total


def main() -> None:
    print(f"{ROUNDS} rounds each; a wrong byte is one in a block that is not the snapshot's")
    print(f"{'':11}{'cache':>11}{'reads':>9}{'EIO':>9}{'answered after delete':>23}", end="")
    print(f"{'wrong bytes':>14}{'other errors':>14}")
    for name, server in (("qemu-nbd -l", qemu_nbd), ("this plugin", ours)):
        for cache in CACHE_MODES:
            t = play(server, cache)
            print(f"{name:11}{cache:>11}{t.reads:>9}{t.failed:>9}{t.late:>23}", end="")
            print(f"{t.wrong:>14}{len(t.other):>14}", flush=True)


if __name__ == "__main__":
    main()
