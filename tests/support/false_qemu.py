"""Something that speaks QMP and is no QEMU."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Answers = Mapping[str, object]


@contextmanager
def false_qemu(path: Path, replies: Answers) -> Iterator[None]:
    """Something that greets as QEMU does and answers this; at any other command it closes."""

    def serve() -> None:
        client, _ = server.accept()
        with client, client.makefile("rw") as lines:
            print('{"QMP": {}}', file=lines, flush=True)
            for line in lines:
                command = json.loads(line)["execute"]
                if command not in left or not left[command]:
                    return
                print(json.dumps({"return": left[command].pop(0)}), file=lines, flush=True)

    left = {k: list(v) if isinstance(v, tuple) else [v] * 9 for k, v in replies.items()}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(20)
