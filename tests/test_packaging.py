"""What the packages say of a release is what the release says."""

from __future__ import annotations

import re
import shutil
import subprocess
from email.utils import parsedate_to_datetime

import pytest
from support.server import ROOT

from qcow2snap_core import __version__

PACKAGING = ROOT / "packaging"
DEBIAN = PACKAGING / "debian"


def test_debian_s_changelog_begins_with_the_newest_release() -> None:
    text = (DEBIAN / "changelog").read_text()
    version = re.match(r"nbdkit-plugin-qcow2snap \(([\d.]+)-\d+\) unstable; ", text)
    assert version
    assert version[1] == __version__
    date = re.search(r"^ -- @PACKAGER@  (.*)$", text, re.MULTILINE)
    assert date
    released = parsedate_to_datetime(date[1]).date()
    assert f"## {__version__} ({released})" in (ROOT / "CHANGELOG.md").read_text()


def test_debian_can_read_its_changelog() -> None:
    if not shutil.which("dpkg-parsechangelog"):
        pytest.skip("not here: dpkg-parsechangelog")
    text = (DEBIAN / "changelog").read_text().replace("@PACKAGER@", "A B <a@b.example>")
    done = subprocess.run(
        ["dpkg-parsechangelog", "--all", "-l", "-", "-S", "Version"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    assert done.stdout.startswith(__version__)


def named(text: str, field: str) -> set[str]:
    """The packages in a field of one of Debian's control files, each on a line of its own."""
    block = re.search(rf"^{field}:\n((?: .*\n)+)", text, re.MULTILINE)
    assert block
    return set(re.findall(r"^ ([a-z0-9.+-]+)", block[1], re.MULTILINE))


def installed(purpose: str) -> set[str]:
    """What packaging/install-deps has for Debian under a name of its own."""
    script = (PACKAGING / "install-deps").read_text().split("elif")[0]
    words = re.search(rf'^    {purpose}="([^"]+)"', script, re.MULTILINE)
    assert words
    return set(words[1].split())


def test_the_package_recommends_no_more_than_make_deps_all_installs() -> None:
    control = (DEBIAN / "control").read_text()
    optional = named(control, "Recommends") | named(control, "Suggests")
    assert optional <= installed("run") | installed("optional") | installed("large")


def test_autopkgtest_has_all_that_is_optional() -> None:
    assert installed("optional") <= named((DEBIAN / "tests" / "control").read_text(), "Depends")


@pytest.mark.parametrize("script", ["examples", "minimal"])
def test_autopkgtest_has_every_script_it_names(script: str) -> None:
    assert f"Tests: {script}\n" in (DEBIAN / "tests" / "control").read_text()
    assert (DEBIAN / "tests" / script).stat().st_mode & 0o111
