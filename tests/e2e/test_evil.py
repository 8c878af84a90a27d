"""An image behind a server that lies or errs: an error and a line, and the server goes on.

A wrong bit in plain data cannot be noticed, since qcow2 has no checksums for it; it is so with
QEMU too.  But no bit anywhere may end or hang the server, or come back as more than a line.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import nbd
import pytest
from support import qemu
from support.qemu import KiB, MiB, RandomImage
from support.remote import remote
from support.server import Server, block_status, command, has_filter, serve

EVIL = Path(__file__).resolve().parents[1] / "support" / "evil.py"
SIZE = MiB
STEP = 16 * KiB


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evil") / "disk.qcow2"
    RandomImage(path, seed=5, compressed=True, size=SIZE, options={"cluster_size": 4096}).make(
        ["one", "two"]
    )
    return path


def metadata(path: Path) -> list[tuple[int, int]]:
    """Header, snapshot table, L1 tables and L2 tables, as (begin, end)."""
    found = [(0, 200)]
    for s in qemu.snapshots(path).values():
        found += [(s.entry_offset, s.entry_offset + s.entry_length)]
        found += [(s.l1_table_offset, s.l1_table_offset + 8 * s.l1_size)]
        for n in range(s.l1_size):
            l2 = qemu.field64(path, s.l1_table_offset + 8 * n) & (1 << 56) - 512
            found += [(l2, l2 + 4096)] * bool(l2)
    return found


def only_eio(e: nbd.Error) -> None:
    if e.errno != "EIO":
        raise e


def read_all(server: Server, name: str) -> tuple[int, int]:
    """How many pieces could be read, and how many could not."""
    good = bad = 0
    try:
        with server.connect(name, extents=True) as handle:
            for at in range(0, handle.get_size() - STEP + 1, STEP):
                for ask in (handle.pread, lambda n, at: block_status(handle, at, n)):
                    try:
                        ask(STEP, at)
                        good += 1
                    except nbd.Error as e:
                        only_eio(e)
                        bad += 1
    except nbd.Error as e:
        if e.errno is None:  # it hung up
            raise
        bad += 1  # no such export, or one that is damaged
    return good, bad


def only_lines(log: str) -> None:
    assert "Traceback" not in log
    for line in log.splitlines():
        assert line.startswith(("nbdkit: ", "qcow2snap: ")), line
        assert line.isprintable()
        assert len(line) < 2000


def only_lines_of(uri: str) -> None:
    """Refused with one line, or served to the end whatever is read."""
    line = [*command("-U", "-", file=uri), "--run", "true"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    only_lines(done.stderr)
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1
        return
    with serve(file=uri) as ours:
        for name in ("one", "two"):
            read_all(ours, name)
        only_lines(ours.log)


@pytest.mark.parametrize("seed", range(12))
def test_wrong_bits_in_the_metadata(tmp_path: Path, image: Path, seed: int) -> None:
    where = ",".join(f"{a}-{b}" for a, b in metadata(image))
    lying = remote(
        *("python", EVIL, f"file={image}", f"seed={seed}", f"bits={1 << seed % 6}"),
        f"where={where}",
    )
    with lying as there:
        only_lines_of(there.uri)


@pytest.mark.parametrize("bits", [1, 20, 2000])
def test_other_wrong_bits_in_each_read(tmp_path: Path, image: Path, bits: int) -> None:
    """Of a server that was right at first; the guard's own reads are among them.  One that never
    sees the same header twice gives up after some seconds."""
    where = ",".join(f"{a}-{b}" for a, b in metadata(image))
    when = tmp_path / "now"
    lying = remote(
        *("python", EVIL, f"file={image}", "seed=1", f"bits={bits}", "rays=1", f"when={when}"),
        f"where={where}",
    )
    with lying as there, serve(file=there.uri, snapshot="two") as ours, ours.connect() as early:
        when.touch()
        bad = 0
        for at in range(0, SIZE, SIZE // 4):
            try:
                early.pread(STEP, at)
            except nbd.Error as e:
                only_eio(e)
                bad += 1
        assert bad or bits < 2000
        when.unlink()
        only_lines(ours.log)
        assert ours.process.poll() is None


def test_a_server_that_errs_now_and_then(tmp_path: Path, image: Path) -> None:
    """Right bytes or EIO, a line for each; and when it errs no more, neither do we."""
    when = tmp_path / "now"
    right = qemu.content(image, "two")
    erring = remote("--filter=error", "file", image, "error-pread-rate=30%", f"error-file={when}")
    with erring as there, serve(file=there.uri, snapshot="two") as ours, ours.connect() as handle:
        when.touch()
        failed = 0
        for at in range(0, SIZE, STEP):
            try:
                assert handle.pread(STEP, at) == right[at : at + STEP]
            except nbd.Error as e:
                only_eio(e)
                failed += 1
        assert failed
        assert len([line for line in ours.log.splitlines() if "pread" in line]) == failed
        only_lines(ours.log)
        when.unlink()
        assert ours.read() == right


@pytest.mark.skipif(not has_filter("evil"), reason="nbdkit has it since 1.36")
@pytest.mark.parametrize("how", ["cosmic-rays", "stuck-bits", "stuck-wires"])
@pytest.mark.parametrize("probability", ["1e-6", "1e-4"])
def test_below_nbdkits_evil_filter(image: Path, how: str, probability: str) -> None:
    """Where the wrong bits are in the metadata it is as above; in data they come as they are."""
    wrong = (f"evil={how}", f"evil-probability={probability}", "evil-seed=1")
    with remote("--filter=evil", "file", image, *wrong) as there:
        only_lines_of(there.uri)
