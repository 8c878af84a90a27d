"""A socket that leads to another one."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def relayed(directory: Path, to: Path) -> Iterator[Path]:
    """Another socket that leads to QEMU's, for one client.  Who asks the kernel learns of this
    process instead, as where libvirt has made the socket, or QEMU runs in a container."""
    path = directory / "relay"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=_relay, args=(server, to), daemon=True)
        thread.start()
        yield path
        thread.join(20)


def _relay(server: socket.socket, path: Path) -> None:
    client, _ = server.accept()
    with client, socket.socket(socket.AF_UNIX) as qemu_end:
        qemu_end.connect(str(path))
        other = {client: qemu_end, qemu_end: client}
        while True:
            for end in select.select(list(other), [], [])[0]:
                data = end.recv(1 << 16)
                if not data:
                    return
                other[end].sendall(data)
