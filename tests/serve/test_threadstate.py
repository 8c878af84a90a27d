"""A thread's Python state lives as long as its connection, and no longer.

Shown in a real nbdkit with a small plugin: what Python keeps per thread (threading.local) is there
at the next request exactly when the thread's state is.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.qemu import run
from support.server import ROOT

PROBE = """
import os, sys, threading
import nbdkit
sys.path.insert(0, {root!r})
from qcow2snap_core.serve.threadstate import KeptThreadState

API_VERSION = 2
KEEP = {keep}
per_thread = threading.local()

def thread_model(): return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS
def get_size(h): return 512

def open(readonly):
    per_thread.mark = 1
    return [KeptThreadState() if KEEP else None]

def pread(h, buf, offset, flags):
    buf[0] = getattr(per_thread, "mark", 0)

def close(h):
    for _ in range({releases}):
        h[0].release()
"""


def answers(tmp_path, connections=1, requests=3, **how):
    """What each request of each connection finds of the thread's state: 1 or 0."""
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE.format(root=str(ROOT), **how))
    client = tmp_path / "client.py"
    client.write_text(
        "import nbd, sys\n"
        f"for _ in range({connections}):\n"
        "    h = nbd.NBD()\n"
        "    h.connect_uri(sys.argv[1])\n"
        f"    print(*(h.pread(512, 0)[0] for _ in range({requests})))\n"
        "    h.shutdown()\n"
    )
    command = f'{sys.executable} {client} "$uri"'
    return run("nbdkit", "-U", "-", "python", probe, "--run", command).splitlines()


def test_a_kept_state_is_there_at_the_next_request(tmp_path):
    assert answers(tmp_path, keep=True, releases=1) == ["1 1 1"]


def test_without_it_each_request_begins_anew(tmp_path):
    """The contrary: else the test above would show nothing."""
    assert answers(tmp_path, keep=False, releases=0) == ["0 0 0"]


@pytest.mark.parametrize("releases", [0, 1, 3])
def test_many_connections_may_release_once_repeatedly_or_never(tmp_path, releases):
    found = answers(tmp_path, connections=100, requests=2, keep=True, releases=releases)
    assert found == ["1 1"] * 100


IN_PYTHON_THREADS = """
import sys, threading
sys.path.insert(0, {root!r})
from qcow2snap_core.serve.threadstate import KeptThreadState

def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

{work}
print("whole")
"""


@pytest.mark.parametrize(
    "work",
    [
        # The same thread, again and again.
        "k = KeptThreadState(); k.release(); k.release(); k.release()",
        # Two connections on one thread, closed in either order.
        "a, b = KeptThreadState(), KeptThreadState(); a.release(); b.release(); a.release()",
        # Another thread must not release what this one keeps; this one still can.
        "k = KeptThreadState(); in_thread(k.release); in_thread(k.release); k.release()",
        # A thread that ended with its state kept.
        "in_thread(KeptThreadState)",
        # Its identifier goes to the next thread, which keeps nothing.
        "kept = []\nin_thread(lambda: kept.append(KeptThreadState()))\n"
        "for _ in range(20):\n"
        "    in_thread(lambda: (kept[0].release(), sum(range(1000))))",
    ],
)
def test_a_release_elsewhere_or_too_often_does_no_harm(work):
    done = subprocess.run(
        [sys.executable, "-c", IN_PYTHON_THREADS.format(root=str(ROOT), work=work)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")
