"""What `make demo` runs: it says what it did, and it notices when a byte is wrong."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.qemu import MiB, create, io, run, take
from support.server import ROOT

DEMO = ROOT / "tests" / "demo.py"


def demo(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it; ``path`` is a directory whose programs come before the system's."""
    env = dict(os.environ)
    if path is not None:
        env["PATH"] = f"{path}:{env['PATH']}"
    return subprocess.run(
        [sys.executable, str(DEMO), "--", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=env,
    )


@pytest.fixture(name="image")
def fixture_image(tmp_path: Path) -> Path:
    """The snapshots first and nightly, and other content after them."""
    image = create(tmp_path / "my disk.qcow2", 4 * MiB)
    for value, name in enumerate(("first", "nightly"), 1):
        io(image, f"write -P {value} {value}M 1M")
        take(image, name)
    io(image, "write -P 9 0 4M")
    return image


def test_its_own_image_shows_three_exports_and_two_equal_copies() -> None:
    done = demo("", "")
    assert (done.returncode, done.stderr) == (0, "")
    exports = [line.split()[0] for line in done.stdout.splitlines() if " bytes  (" in line]
    assert exports == ["monday", "tuesday", "wednesday"]
    assert done.stdout.count(": all 67108864 bytes are the same") == 2
    assert "Try next" in done.stdout


@pytest.mark.parametrize(
    ("wanted", "compared"),
    [("", "first"), ("nightly", "nightly"), ("2", "nightly")],
    ids=["none given", "by name", "by ID"],
)
def test_an_image_of_ones_own_is_only_read(image: Path, wanted: str, compared: str) -> None:
    before = image.read_bytes()
    done = demo(image, wanted)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"'{compared}': all 4194304 bytes are the same" in done.stdout
    assert image.read_bytes() == before
    assert os.listdir(image.parent) == [image.name]


def test_a_name_that_is_anothers_id_is_told_from_it(image: Path) -> None:
    io(image, "write -P 5 3M 1M")
    take(image, "")
    take(image, "3")
    assert "'': all 4194304 bytes" in demo(image, "3").stdout
    assert "'3': all 4194304 bytes" in demo(image, "4").stdout


@pytest.mark.parametrize("size", ["8M", "--shrink 2M"])
def test_a_resized_disk_is_compared_as_far_as_qemu_goes(image: Path, size: str) -> None:
    run("qemu-img", "resize", "-q", *size.split()[:-1], image, size.split()[-1])
    done = demo(image, "nightly")
    assert (done.returncode, done.stderr) == (0, "")
    common = min(4 * MiB, int(size.split()[-1][0]) * MiB)
    assert f"all of the first {common} bytes are the same; the snapshot has 4194304" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["image", "nightly"]], ids=["own image", "given image"])
@pytest.mark.parametrize("offset", [5 * MiB // 4, -1], ids=["middle", "last byte"])
def test_one_wrong_byte_makes_it_fail(
    arguments: list[str], offset: int, image: Path, tmp_path: Path
) -> None:
    """The real nbdcopy, after which somebody changes a byte of the copy."""
    programs = tmp_path / "bin"
    programs.mkdir()
    liar = programs / "nbdcopy"
    liar.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        f"subprocess.run([{shutil.which('nbdcopy')!r}, *sys.argv[1:]], check=True)\n"
        "with open(sys.argv[-1], 'r+b') as copy:\n"
        f"    copy.seek({offset}, 2 if {offset} < 0 else 0)\n"
        "    byte = copy.read(1)\n"
        "    copy.seek(-1, 1)\n"
        "    copy.write(bytes([byte[0] ^ 1]))\n"
    )
    liar.chmod(0o755)
    done = demo(*(image if a == "image" else a for a in arguments), path=programs)
    assert done.returncode == 1
    size = 4 * MiB if arguments else 64 * MiB
    assert f"DIFFERS from qemu-img's at byte {offset % size}\n" in done.stderr


@pytest.mark.parametrize(
    ("make", "wanted", "said"),
    [
        (lambda path: None, "", "there is no "),
        (lambda path: path.write_bytes(bytes(4096)), "", "not in qcow2 format"),
        (lambda path: create(path, MiB), "", "has no internal snapshots"),
        (lambda path: take(create(path, MiB), "only"), "x", "no snapshot 'x' in "),
    ],
    ids=["missing", "not qcow2", "no snapshots", "no such snapshot"],
)
def test_an_error_is_one_line(make, wanted: str, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "disk")
    done = demo(tmp_path / "disk", wanted)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_it_suggests_works(image: Path, tmp_path: Path) -> None:
    said = demo(image, "nightly").stdout.replace("\\\n", "")
    port = free_port()
    said = said.replace("-i localhost", f"-i localhost -p {port}")
    said = said.replace("nbd://localhost", f"nbd://localhost:{port}")
    steps = [x.strip() for x in said.split("Try next:\n")[1].splitlines() if "  # " not in x]
    serving = [s for s in steps if s.startswith("nbdkit -f ")]
    with subprocess.Popen(["sh", "-c", f"exec {serving[0]}"], cwd=tmp_path) as server:
        try:
            wait_for(port, server)
            for step in steps:
                if step not in serving and "qemu-system" not in step:
                    run("sh", "-c", step, cwd=tmp_path)
        finally:
            server.terminate()
    assert (tmp_path / "copy.raw").read_bytes()[2 * MiB : 3 * MiB] == b"\2" * MiB
    same = run("qemu-img", "compare", tmp_path / "copy.raw", tmp_path / "copy.qcow2")
    assert "identical" in same
    scratch = next(s for s in steps if "qemu-system" in s).split("'qemu-system", 1)[0]
    run("sh", "-c", f'{scratch} \'qemu-io -f raw -c "write -P 7 0 1M" "$uri"\'', cwd=tmp_path)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("localhost", port)).close()
            return
        except ConnectionRefusedError:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
