"""make install and pip install: what goes where, that it works there, and that it goes again."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import qemu
from support.server import ROOT, nbdkit_config

import qcow2snap_core

PLUGIN = "nbdkit-qcow2snap-plugin"
UNIT = "lib/systemd/system/nbdkit-qcow2snap@"
ZSH = "vendor-completions" if Path("/etc/debian_version").exists() else "site-functions"


def make(target: str, **variables: object) -> str:
    words = [f"{name}={value}" for name, value in variables.items()]
    return qemu.run("make", "-s", "-C", ROOT, target, *words)


def files(root: Path) -> set[str]:
    return {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file() or f.is_symlink()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    make("install", DESTDIR=root, PREFIX="/usr")
    return root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", 1 << 20)
    qemu.io(path, "write -P 7 64k 64k")
    qemu.take(path, "nightly")
    qemu.io(path, "write -P 8 64k 64k")
    return path


def package_folder(root: Path) -> Path:
    [found] = root.glob("usr/lib/python3*/*-packages")
    return found


def test_every_part_is_in_its_place(installed: Path) -> None:
    package = package_folder(installed).relative_to(installed)
    sources = {f"{package}/{f.relative_to(ROOT)}" for f in (ROOT / "qcow2snap_core").rglob("*.py")}
    engine = f"{package}/qcow2snap_core/_native/engine.abi3.so"
    assert files(installed) == sources | {
        engine,
        f"{package}/qcow2snap_core/py.typed",
        f"{nbdkit_config('plugindir')[1:]}/{PLUGIN}.so",
        f"{nbdkit_config('plugindir')[1:]}/{PLUGIN}.py",
        "usr/bin/qcow2snap",
        "usr/share/bash-completion/completions/qcow2snap",
        f"usr/share/zsh/{ZSH}/_qcow2snap",
        "usr/share/fish/vendor_completions.d/qcow2snap.fish",
        f"usr/{UNIT}.socket",
        f"usr/{UNIT}.service",
        f"usr/share/man/man1/{PLUGIN}.1",
        "usr/share/man/man1/qcow2snap.1",
    }


@pytest.mark.parametrize("prefix", ["/usr", "/usr/local"])
def test_python_looks_where_the_package_is(tmp_path: Path, prefix: str) -> None:
    make("install", DESTDIR=tmp_path, PREFIX=prefix)
    [module] = tmp_path.rglob("threadstate.py")
    where = f"/{module.parents[2].relative_to(tmp_path)}"
    assert where.startswith(f"{prefix}/lib/python3")
    assert where in sys.path


def test_a_prefix_where_python_does_not_look_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="finds no packages below /opt/x"):
        make("install", DESTDIR=tmp_path, PREFIX="/opt/x")
    assert not files(tmp_path)


def test_uninstall_removes_every_file(tmp_path: Path) -> None:
    make("install", DESTDIR=tmp_path, PREFIX="/usr")
    package = package_folder(tmp_path) / "qcow2snap_core"
    qemu.run("/usr/bin/python3", "-m", "compileall", "-q", package)  # as a first run leaves it
    make("uninstall", DESTDIR=tmp_path, PREFIX="/usr")
    assert not files(tmp_path)
    assert not package.exists()


def test_what_is_installed_here_has_its_bytecode(tmp_path: Path) -> None:
    """Whoever serves may not write there; without it a start takes twice as long."""
    places = {"PREFIX": tmp_path, "PLUGINDIR": tmp_path / "plugins", "PYTHONDIR": tmp_path / "lib"}
    make("install", NBDKIT="/usr/sbin/nbdkit", **places)
    sources = list((tmp_path / "lib").rglob("*.py"))
    assert sources
    assert all(list(s.parent.glob(f"__pycache__/{s.stem}.*.pyc")) for s in sources)
    make("uninstall", NBDKIT="/usr/sbin/nbdkit", **places)
    assert not files(tmp_path)


def test_a_module_of_an_older_version_does_not_stay(tmp_path: Path) -> None:
    make("install", DESTDIR=tmp_path, PREFIX="/usr")
    old = package_folder(tmp_path) / "qcow2snap_core" / "old.py"
    old.touch()
    make("install", DESTDIR=tmp_path, PREFIX="/usr")
    assert not old.exists()


def by_path(root: Path) -> list[str | Path]:
    """What `nbdkit qcow2snap` runs: it looks for the plugin in its own directory only."""
    plugins = root / nbdkit_config("plugindir")[1:]
    library = plugins / f"{PLUGIN}.so"
    return ["nbdkit", "-U", "-", library] if library.exists() else [plugins / PLUGIN, "-U", "-"]


@pytest.fixture(scope="module", params=["compiled", "script"])
def either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, installed: Path
) -> Path:
    if request.param == "compiled":
        return installed
    root = tmp_path_factory.mktemp("script")
    make("install", DESTDIR=root, PREFIX="/usr", CC="no-such-compiler")
    return root


def test_the_installed_plugin_serves_a_snapshot(either: Path, image: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package_folder(either))}
    read = 'nbdcopy "$uri" - | od -An -tx1 -j65536 -N2'
    line = [*by_path(either), f"file={image}", "snapshot=nightly", "--run", read]
    assert qemu.run(*line, env=environment).split() == ["07", "07"]
    dumped = qemu.run(*by_path(either), "--dump-plugin", env=environment)
    assert f"qcow2snap_version={qcow2snap_core.__version__}" in dumped


def test_the_installed_plugin_says_what_is_wrong(either: Path, image: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package_folder(either))}
    line = [*by_path(either), f"file={image}", "snapshot=x"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"no snapshot 'x' in '{image}'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_is_left_in_tmp(installed: Path, image: Path) -> None:
    """Where nbdkit makes the folder of its socket, whatever TMPDIR says."""
    line = shlex.join([*map(str, by_path(installed)), f"file={image}", "--run", "true"])
    line = line.replace(str(installed), "/mnt").replace(str(image), "/media/disk.qcow2")
    script = (
        f"mount --bind {shlex.quote(str(installed))} /mnt && "
        f"mount --bind {shlex.quote(str(image.parent))} /media && "
        f"mount -t tmpfs none /tmp && {line} && ls /tmp"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"/mnt/{package_folder(installed).relative_to(installed)}",
    }
    if os.geteuid():
        pytest.skip("only root may mount")
    assert qemu.run("unshare", "--mount", "sh", "-c", script, env=environment) == ""


def test_help_and_version_are_the_plugin_s_own(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package_folder(installed))}
    assert "file=<FILENAME>" in qemu.run(*by_path(installed), "--help", env=environment)
    version = qemu.run(*by_path(installed), "--version", env=environment)
    assert version.splitlines()[-1] == f"qcow2snap {qcow2snap_core.__version__}"


def test_who_may_not_write_there_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir(mode=0o555)
    line = ["make", "-s", "-C", ROOT, "install", "PREFIX=/usr", f"DESTDIR={tmp_path}/usr"]
    if os.geteuid() == 0:  # who may write anywhere, if not kept from it
        line = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *line]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    expected = f"install: {tmp_path}/usr is not writable: sudo make install, or set DESTDIR"
    assert done.stderr.splitlines()[0] == expected
    assert not files(tmp_path)


def test_it_says_what_it_put_where(tmp_path: Path) -> None:
    said = make("install", DESTDIR=tmp_path, PREFIX="/usr")
    places = [line.split()[-1] for line in said.splitlines()]
    assert len(places) == 8  # a completion for each of three shells
    found = {f for f in files(tmp_path) if any(f"{tmp_path}/{f}".startswith(p) for p in places)}
    beside = {f"{nbdkit_config('plugindir')[1:]}/{PLUGIN}.py", f"usr/{UNIT}.service"}
    assert files(tmp_path) - found == beside


def test_the_installed_package_is_the_one_that_is_used(installed: Path, image: Path) -> None:
    taken = 'Taken("d", "n", "", Found("/a b", ()))'
    script = f"from qcow2snap_core.host.take import *; print({taken}.command())"
    environment = {**os.environ, "PYTHONPATH": str(package_folder(installed))}
    said = qemu.run("/usr/bin/python3", "-c", script, env=environment, cwd=image.parent)
    assert said == "nbdkit qcow2snap 'file=/a b' snapshot=n\n"


def test_the_installed_plugin_is_served_on_a_socket_that_it_is_handed(
    either: Path, image: Path, tmp_path: Path
) -> None:
    """As nbdfuse and systemd do."""
    nbdkit = tmp_path / "nbdkit"  # one that has its plugins below our root
    config = f"plugindir={either}{nbdkit_config('plugindir')}"
    real = shutil.which("nbdkit")
    nbdkit.write_text(
        f'#!/bin/sh\n[ "$1" = --dump-config ] && echo "{config}" || exec {real} "$@"\n'
    )
    nbdkit.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(package_folder(either)),
    }
    serve = [either / "usr/bin/qcow2snap", "serve", image, "nightly"]
    assert qemu.run("nbdinfo", "--size", "[", *serve, "]", env=environment) == f"{1 << 20}\n"


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package_folder(installed))}
    said = qemu.run(installed / "usr/bin/qcow2snap", "--version", env=environment, cwd=tmp_path)
    assert said.startswith(f"qcow2snap {qcow2snap_core.__version__} (native engine: ")


def test_the_installed_command_ends_as_a_program_does_from_its_first_line(
    installed: Path, tmp_path: Path
) -> None:
    """Ctrl-C in what it imports, wherever that is: here in the first thing."""
    (tmp_path / "qcow2snap_core").mkdir()
    (tmp_path / "qcow2snap_core" / "__init__.py").write_text("print(flush=True); input()")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [installed / "usr/bin/qcow2snap"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.readline() == b"\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == -signal.SIGINT


def test_the_installed_command_sees_what_python_sees(installed: Path, tmp_path: Path) -> None:
    """It begins without the module site, and makes up for it."""
    (tmp_path / "qcow2snap_core").mkdir()
    (tmp_path / "qcow2snap_core" / "__init__.py").write_text("import sys; sys.exit(str(sys.path))")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    line = [installed / "usr/bin/qcow2snap"]
    said = subprocess.run(line, env=environment, capture_output=True, text=True, check=False).stderr
    expected = qemu.run("/usr/bin/python3", "-c", "import sys; print(sys.path)", env=environment)
    assert ast.literal_eval(said)[1:] == ast.literal_eval(expected)[1:]


@pytest.mark.timeout(400)  # making the environment alone takes long on a busy machine
def test_pip_install_gives_library_and_command(tmp_path: Path, image: Path) -> None:
    # A copy, because setuptools leaves build/ and an egg-info beside what it builds.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "qcow2snap_core", source / "qcow2snap_core")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    venv = tmp_path / "venv"
    qemu.run("/usr/bin/python3", "-m", "venv", "--system-site-packages", venv)
    pip = [venv / "bin/pip", "install", "-q", "--disable-pip-version-check"]
    # What it needs to build and to run is there as system packages: no network.
    qemu.run(*pip, "--no-build-isolation", "--no-deps", "--no-index", source)
    script = (
        "import qcow2snap_core, qcow2snap_core.cli as cli; print(cli.__file__)\n"
        f"with qcow2snap_core.open({str(image)!r}) as image:\n"
        "    print(image.snapshot('nightly').pread(1, 65536))"
    )
    where, byte = qemu.run(venv / "bin/python", "-c", script, cwd=tmp_path).splitlines()
    assert where.startswith(str(venv))
    assert byte == r"b'\x07'"
    done = subprocess.run(
        [venv / "bin/qcow2snap", "no-such-command"], capture_output=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
