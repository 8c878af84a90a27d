"""The documentation does what it says: what each page shows is run, and its output compared."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import nbd
import pytest
from support.documents import Section, examples, run, sections
from support.qemu import MiB
from support.sample import make_encrypted_sample, make_sample
from support.server import ROOT, command

PAGES = ["README.md", "docs/recipes.md", "docs/remote.md"]
MANUALS = ["docs/nbdkit-qcow2snap-plugin.pod", "docs/qcow2snap.pod"]
SECTIONS = [s for page in PAGES for s in sections(ROOT / page)]
SECTIONS += [s for page in MANUALS for s in examples(ROOT / page)]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("image")
    make_encrypted_sample(directory)
    return make_sample(directory)


@pytest.mark.parametrize("section", SECTIONS, ids=[f"{s.page}: {s.title}" for s in SECTIONS])
def test_what_is_shown_is_what_happens(section: Section, image: Path, tmp_path: Path) -> None:
    if missing := section.missing():
        pytest.skip(f"not here: {', '.join(missing)}")
    for name in ("disk.qcow2", "secret.qcow2", "secret.txt"):
        shutil.copy(image.with_name(name), tmp_path)
    run(section, tmp_path)


def test_it_serves_on_a_socket_that_it_is_handed(image: Path, tmp_path: Path) -> None:
    # What systemd does: the socket is descriptor 3, and two variables say so.
    with socket.socket(socket.AF_UNIX) as listening, open(tmp_path / "log", "wb") as log:
        listening.bind(str(tmp_path / "nbd.sock"))
        listening.listen()
        script = f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listening.fileno()}'
        line = command(filters=("exitlast",), file=image)
        process = subprocess.Popen(
            ["bash", "-c", script, "-", *line], pass_fds=[listening.fileno()], stderr=log
        )
    try:
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///nightly?socket={tmp_path}/nbd.sock")
        assert client.get_size() == 64 * MiB
        client.shutdown()
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_the_runner_sees_other_output(tmp_path: Path) -> None:
    wrong = Section("page", "wrong", [], [("echo one", "two\n")])
    with pytest.raises(AssertionError, match="should print\ntwo"):
        run(wrong, tmp_path)
