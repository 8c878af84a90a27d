"""The plugin's keys: what they take, and that an error names the key."""

from __future__ import annotations

import os

import pytest
from support.qemu import KiB, MiB, create, take

from qcow2snap_core.errors import ImageError, UsageError
from qcow2snap_core.format.choosing import Choice
from qcow2snap_core.serve.settings import KEYS, Settings


def given(*pairs):
    settings = Settings()
    for key, value in pairs:
        settings.set(key, str(value))
    return settings


@pytest.fixture
def disk(tmp_path):
    path = create(tmp_path / "disk.qcow2", 64 * KiB)
    take(path, "nightly")
    return path


@pytest.mark.parametrize(
    ("pairs", "choice"),
    [
        ([], None),
        ([("snapshot", "x")], Choice("x")),
        ([("snapshot-id", "1")], Choice(id="1")),
        ([("snapshot.id", "1")], Choice(id="1")),
        ([("snapshot-name", "x")], Choice(name="x")),
        ([("snapshot.name", "x")], Choice(name="x")),
        ([("snapshot-name", "x"), ("snapshot-id", "1")], Choice(id="1", name="x")),
        ([("snapshot", "y"), ("snapshot.name", "x")], Choice("y", name="x")),
        ([("snapshot", "")], Choice("")),
    ],
)
def test_the_choice_of_a_snapshot(pairs, choice):
    assert given(*pairs).choice == choice


@pytest.mark.parametrize(
    "key", ["snapshots", "File", "path", "", "snapshot_id", "snapshot.file", "l2-cache"]
)
def test_an_unknown_key_is_named_and_the_known_are_listed(key):
    with pytest.raises(UsageError, match=f"^unknown key {key}=: the keys are ") as caught:
        given((key, "x"))
    for known in KEYS:
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("file", "", "file= is empty: give a path"),
        ("allow-dir", "", "allow-dir= is empty: give a path"),
        ("allow-file", "", "allow-file= is empty: give a path"),
        ("backing-format", "vmdk", "backing-format=vmdk: give raw or qcow2"),
        ("backing-format", "a\nb", r"backing-format=a\\nb: give raw or qcow2"),
        ("backing-format", "", "backing-format=: give raw or qcow2"),
        ("l2-cache-size", "lots", "l2-cache-size=: 'lots' is no size"),
        ("cluster-cache-size", "-1", "cluster-cache-size=: '-1' is no size"),
        ("remote-timeout", "0", "remote-timeout=: '0' is no time: give seconds, more than 0"),
        ("remote-timeout", "never", "remote-timeout=: 'never' is no time"),
        ("remote-timeout", "1e9", "remote-timeout=: '1e9' is no time"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(key, value, message):
    with pytest.raises(UsageError, match=message):
        given((key, value))


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ("file", "file", "file"),
        ("snapshot", "snapshot", "snapshot"),
        ("snapshot-id", "snapshot.id", "snapshot-id"),
        ("snapshot.name", "snapshot-name", "snapshot-name"),
        ("l2-cache-size", "l2-cache-size", "l2-cache-size"),
    ],
)
def test_a_key_is_given_once(first, second, named):
    with pytest.raises(UsageError, match=f"^{named}= is given twice: give it once$"):
        given((first, "1"), (second, "2"))


def test_the_file_is_required():
    with pytest.raises(UsageError, match="add file=disk.qcow2"):
        given(("snapshot", "nightly")).open_image()


@pytest.mark.parametrize(
    "name", ["disk.qcow2", "./disk.qcow2", "../{here}/disk.qcow2", "link/../disk.qcow2"]
)
def test_a_relative_path_is_taken_from_where_nbdkit_was_started(disk, monkeypatch, name):
    (disk.parent / "elsewhere" / "sub").mkdir(parents=True)
    if name.startswith("link"):  # a symlink's parent is that of where it leads
        (disk.parent / "link").symlink_to("elsewhere/sub")
        os.rename(disk, disk.parent / "elsewhere" / disk.name)
    monkeypatch.chdir(disk.parent)
    settings = given(("file", name.format(here=disk.parent.name)))
    monkeypatch.chdir("/")
    with settings.open_image() as image:
        assert [s.name for s in image.snapshots] == ["nightly"]


def test_relative_allowed_directories_and_files_too(tmp_path, monkeypatch):
    (tmp_path / "bases").mkdir()
    (tmp_path / "images").mkdir()
    create(tmp_path / "bases" / "base.qcow2", 64 * KiB)
    top = create(tmp_path / "images" / "top.qcow2", None, backing=("../bases/base.qcow2", "qcow2"))
    monkeypatch.chdir(tmp_path)
    allowed = [("allow-dir", "images"), ("allow-dir", "bases")]
    files = [("allow-file", "images/top.qcow2"), ("allow-file", "bases/base.qcow2")]
    both = [given(("file", top), *keys) for keys in (allowed, files)]
    monkeypatch.chdir("/")
    for settings in both:
        settings.open_image().close()


def test_the_backing_format_is_for_an_image_that_records_none(tmp_path):
    base = tmp_path / "base"
    base.write_bytes(b"x" * 64 * KiB)
    top = create(tmp_path / "top.qcow2", None, backing=("base", "raw"))
    take(top, "s")
    whole = top.read_bytes()
    recorded = bytes.fromhex("e2792aca00000003") + b"raw"
    top.write_bytes(whole.replace(recorded, bytes.fromhex("0badc0de00000003") + b"raw"))
    with pytest.raises(UsageError, match="add backing-format=raw or backing-format=qcow2"):
        given(("file", top)).open_image()
    with given(("file", top), ("backing-format", "raw")).open_image() as image:
        assert image.snapshot("s").pread(512, 0) == b"x" * 512
    with pytest.raises(ImageError, match="base': not a qcow2 image"):
        given(("file", top), ("backing-format", "qcow2")).open_image()
    top.write_bytes(whole)
    with given(("file", top), ("backing-format", "qcow2")).open_image() as image:
        assert image.snapshot("s").pread(512, 0) == b"x" * 512, "what is recorded comes first"


@pytest.mark.parametrize(
    ("key", "cache", "default"),
    [("l2-cache-size", "l2_cache", 32 * MiB), ("cluster-cache-size", "cluster_cache", 64 * MiB)],
)
def test_the_caches_have_the_size_that_was_asked_for(disk, key, cache, default):
    for pairs, expected in (([], default), ([(key, "3M")], 3 * MiB), ([(key, "0")], 0)):
        with given(("file", disk), *pairs).open_image() as image:
            assert getattr(image.options, f"{cache}_size") == expected
