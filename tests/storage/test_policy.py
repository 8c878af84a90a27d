"""Which names inside an image are opened: the policy of ``allow-dir=``."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from support.devices import attached, loop_device, opened
from support.qemu import KiB, create, run

from qcow2snap_core.errors import UsageError
from qcow2snap_core.image.opener import Options, open_image
from qcow2snap_core.storage.policy import Policy, is_below


@pytest.fixture
def tree(tmp_path):
    """An image in images/, and files that hold their own path all around it."""
    for name in (
        *("images/top.qcow2", "images/base", "images/sub/base", "images/a:b", "images/nbd:x"),
        *("images-old/base", "other/base", "other/deep/base", "base"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for link, to in {
        "images/out": "../other/base",
        "images/in": "sub/base",
        "images/outdir": "../other",
        "other/back": "../images/base",
        "elsewhere": "images",
        "top-link": "images/top.qcow2",
    }.items():
        (tmp_path / link).symlink_to(to)
    return tmp_path


def read(tree, name, allow_dirs=(), image="images/top.qcow2", allow_files=()):
    """What the policy opens for a name in an image: the file's path in the tree."""
    policy = Policy((str(tree / d) for d in allow_dirs), (str(tree / f) for f in allow_files))
    with opened(tree / image) as storage:
        found = policy.open(os.fsencode(name.format(tree=tree)), storage, "backing file")
        try:
            return found.read(100, 0).decode()
        finally:
            found.close()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("base", "images/base"),
        ("./base", "images/base"),
        ("../images/base", "images/base"),
        ("sub/base", "images/sub/base"),
        ("in", "images/sub/base"),
        ("{tree}/images/base", "images/base"),
        ("{tree}/elsewhere/base", "images/base"),
        ("../other/back", "images/base"),
        ("./a:b", "images/a:b"),
        ("./nbd:x", "images/nbd:x"),
        ("file:base", "images/base"),
        ("file:a:b", "images/a:b"),
        ("file:./a:b", "images/a:b"),
        ("file:{tree}/images/base", "images/base"),
        ("file://{tree}/images/base", "images/base"),
    ],
)
def test_the_images_own_directory_and_those_below_are_trusted(tree, name, file):
    assert read(tree, name) == file


OUTSIDE = [
    ("../base", "base"),
    ("../images-old/base", "images-old/base"),
    ("{tree}/other/base", "other/base"),
    ("out", "other/base"),
    ("outdir/deep/base", "other/deep/base"),
    ("sub/../../other/base", "other/base"),
    ("file:../other/base", "other/base"),
]


@pytest.mark.parametrize(("name", "file"), OUTSIDE)
def test_a_file_elsewhere_is_refused_with_the_key_that_allows_it(tree, name, file):
    with pytest.raises(UsageError) as caught:
        read(tree, name)
    assert "the backing file of " in str(caught.value)
    written = name.format(tree=tree)
    which = "" if written == str(tree / file) else f"{written!r}, which leads to "
    assert f": {which}'{tree / file}'{',' * bool(which)} lies outside" in str(caught.value)
    add = re.search(r"add allow-dir=(\S+) if", str(caught.value))[1]
    assert add == os.path.dirname(tree / file)
    assert read(tree, name, [add]) == file


@pytest.mark.parametrize(("name", "file"), OUTSIDE)
def test_a_file_elsewhere_may_be_allowed_alone(tree, name, file):
    with pytest.raises(UsageError) as caught:
        read(tree, name)
    add = re.search(r"or allow-file=(\S+) for this file alone", str(caught.value))[1]
    assert add == str(tree / file)
    assert read(tree, name, allow_files=[add]) == file
    others = [f for _, f in OUTSIDE if f != file]
    with pytest.raises(UsageError, match="lies outside"):
        read(tree, name, allow_files=others)


@pytest.mark.parametrize("same", ["images/out", "elsewhere/out", "hard", "images/../other/base"])
def test_an_allowed_file_is_that_file_by_whatever_name(tree, same):
    os.link(tree / "other/base", tree / "hard")
    assert read(tree, "../other/base", allow_files=[same]) == "other/base"
    assert read(tree, "../hard", allow_files=["other/base"]) == "other/base"


def test_an_allowed_file_is_not_what_takes_its_name_later(tree):
    policy = Policy((), [str(tree / "other/base")])
    os.rename(tree / "base", tree / "other/base")
    with (
        opened(tree / "images/top.qcow2") as storage,
        pytest.raises(UsageError, match="lies outside"),
    ):
        policy.open(b"../other/base", storage, "backing file")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "no such file or directory: give an existing file or block device"),
        ("images", "it is a directory: give a regular file or a block device"),
        ("fifo", "it is a FIFO: "),
        ("images/base/x", "not a directory: give an existing"),
    ],
)
def test_an_allowed_file_must_be_one(tree, name, why):
    os.mkfifo(tree / "fifo")
    with pytest.raises(UsageError, match=f"allow-file={tree / name}: {why}"):
        Policy((), [str(tree / name)])


@pytest.mark.parametrize(("name", "file"), OUTSIDE)
def test_allowing_the_root_allows_everything(tree, name, file):
    assert read(tree, name, ["/"]) == file


@pytest.mark.parametrize(
    ("allowed", "name", "works"),
    [
        ("other", "../other/base", True),
        ("other/", "../other/base", True),
        ("other/deep/..", "../other/base", True),
        ("images/outdir", "../other/base", True),
        ("other", "../other/deep/base", True),
        ("other/deep", "../other/base", False),
        ("images/sub", "../other/base", False),
        ("other", "../images-old/base", False),
    ],
)
def test_whole_components_of_real_paths_are_compared(tree, allowed, name, works):
    if works:
        assert read(tree, name, [allowed]) == name[3:]
    else:
        with pytest.raises(UsageError, match="lies outside"):
            read(tree, name, [allowed])


def test_several_directories_may_be_allowed(tree):
    assert read(tree, "../base", ["images-old", "other", "."]) == "base"


@pytest.mark.parametrize("name", ["base", "in", "../images/base"])
def test_an_image_that_is_a_symlink_is_where_it_leads(tree, name):
    assert read(tree, name, image="top-link") == read(tree, name)


def test_the_directory_of_a_symlink_to_the_image_is_not_trusted(tree):
    with pytest.raises(UsageError, match="lies outside"):
        read(tree, "../base", image="top-link")


@pytest.mark.parametrize(
    "name",
    [
        'json:{{"driver":"raw","file":{{"driver":"file","filename":"base"}}}}',
        "nbd:localhost:10809",
        "nbd:x",
        "nbd://localhost/",
        "nbd+unix:///?socket=/run/s",
        "https://example.com/base",
        "ssh://host/base",
        "fat:sub",
        "host_device:/dev/loop0",
        "FILE:base",
        "a:b",
        ":",
    ],
)
def test_a_protocol_name_is_refused_wherever_files_are_trusted(tree, name):
    with pytest.raises(UsageError, match="is a protocol name, only plain files are opened"):
        read(tree, name, ["/"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "no such file"),
        ("sub", "is a directory"),
        ("fifo", "is a FIFO"),
        ("null", "is a character device"),
        ("file:", "is a directory"),
        ("file:json:{{}}", "no such file"),
        ("nul\0", "null byte"),
    ],
)
def test_trust_does_not_make_a_file_of_what_is_none(tree, name, why):
    os.mkfifo(tree / "images" / "fifo")
    (tree / "images" / "null").symlink_to("/dev/null")
    with pytest.raises(UsageError, match=why):
        read(tree, name, ["/"])


@pytest.mark.parametrize("odd", ["a\nb", "\x1b[31m", b"caf\xe9"])
def test_the_refusal_is_one_line_whatever_the_directory_is_called(tree, odd):
    directory = tree / os.fsdecode(odd)
    directory.mkdir()
    (directory / "base").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        read(tree, f"../{directory.name}/base")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("missing", ["nowhere", "base", "images/base"])
def test_an_allowed_directory_must_be_one(tree, missing):
    with pytest.raises(UsageError, match=f"allow-dir={tree / missing}: .* give an existing dir"):
        Policy([str(tree / missing)])


def test_each_layer_trusts_its_own_directory_only(tmp_path):
    """top/ names middle/, which names base/: one permission is not enough for both."""
    chain = [tmp_path / f"{n}/disk.qcow2" for n in ("base", "middle", "top")]
    for path in chain:
        path.parent.mkdir()
    create(chain[0], 64 * KiB)
    create(chain[1], None, backing=("../base/disk.qcow2", "qcow2"))
    create(chain[2], None, backing=("../middle/disk.qcow2", "qcow2"))
    run("qemu-img", "snapshot", "-c", "s", chain[2])
    allowed = []
    for needed in ("middle", "base"):
        with pytest.raises(UsageError, match=f"allow_dirs=.'{tmp_path / needed}'"):
            open_image(str(chain[2]), Options(allow_dirs=allowed))
        allowed.append(str(tmp_path / needed))
    with open_image(str(chain[2]), Options(allow_dirs=allowed)) as image:
        assert image.snapshot("s").pread(512, 0) == bytes(512)


def refusal(path, name, **allowed):
    """What the policy says to a name in an image."""
    with opened(path) as storage, pytest.raises(UsageError) as caught:
        Policy(**allowed).open(os.fsencode(name), storage, "backing file")
    return str(caught.value)


def opens(path, name, expected, **allowed):
    with opened(path) as storage:
        found = Policy(**allowed).open(os.fsencode(name), storage, "backing file")
        try:
            assert found.read(512, 0) == expected
        finally:
            found.close()


def test_an_image_on_a_device_trusts_no_other_device(tmp_path):
    """All devices are in one directory, or would be in its own."""
    content = bytes([5]) * 4096
    (tmp_path / "other.img").write_bytes(content)
    with loop_device(tmp_path, bytes(4096)) as image, attached(tmp_path / "other.img") as other:
        for name in (other, f"/dev/../{other}", other.name):
            said = refusal(image, name)
            assert "is a block device, and those are in no image's directory" in said
            assert f"'{other}'" in said
            add = re.search(r"add allow-file=(\S+) if", said)[1]
            assert add == str(other)
            opens(image, name, content[:512], allow_files=[add])
            opens(image, name, content[:512], allow_dirs=["/dev"])
            assert "is a block device" in refusal(image, name, allow_files=[str(image)])
        said = refusal(image, tmp_path / "other.img")
        assert f"an image that is itself in no directory: add allow-dir={tmp_path} " in said
        opens(image, tmp_path / "other.img", content[:512], allow_dirs=[str(tmp_path)])
        opens(image, tmp_path / "other.img", content[:512], allow_files=[f"{tmp_path}/other.img"])


def test_an_image_in_a_file_trusts_no_device_beside_it(tmp_path):
    with loop_device(tmp_path, bytes(4096)) as device:
        node = tmp_path / "node"
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
        (tmp_path / "link").symlink_to(device)
        (tmp_path / "image").touch()
        for name, add in (("node", node), ("link", device)):
            assert f"add allow-file={add} if" in refusal(tmp_path / "image", name)
            # One device, whatever its node.
            for allowed in (node, device, tmp_path / "link"):
                opens(tmp_path / "image", name, bytes(512), allow_files=[str(allowed)])


def test_names_in_an_image_on_a_device_start_where_its_own_name_is(tmp_path):
    """As for QEMU: a volume is /dev/group/name, and the base beside that is another link."""
    group = tmp_path / "group"
    group.mkdir()
    (tmp_path / "base.img").write_bytes(bytes([6]) * 4096)
    with loop_device(tmp_path, bytes(4096)) as image, attached(tmp_path / "base.img") as base:
        (group / "top").symlink_to(image)
        (group / "base").symlink_to(base)
        # The link is anybody's who may write there, so it is not what the advice names.
        assert f"add allow-file={base} if" in refusal(group / "top", "base")
        opens(group / "top", "base", bytes([6]) * 512, allow_files=[str(group / "base")])
        opens(group / "top", "../group/base", bytes([6]) * 512, allow_dirs=["/dev"])
        assert "no such file" in refusal(image, "base")


def test_the_advice_names_a_device_by_its_lasting_name(tmp_path):
    link = Path(f"/dev/qcow2snap-{os.getpid()}")
    with loop_device(tmp_path, bytes(4096)) as device:
        link.symlink_to(device)
        try:
            (tmp_path / "image").touch()
            said = refusal(tmp_path / "image", link)
            assert f"'{link}', which leads to '{device}', is a block device" in said
            assert f"add allow-file={link} if" in refusal(tmp_path / "image", link)
            os.chown(link, 65534, 65534, follow_symlinks=False)
            assert f"add allow-file={device} if" in refusal(tmp_path / "image", link)
        finally:
            link.unlink()


def test_a_file_of_an_unmounted_filesystem_lies_nowhere():
    """The kernel's word for the path of a file that no directory leads to any more."""
    assert not is_below("(unreachable)/srv/images/base", "/srv/images")
    assert not is_below("(unreachable)/srv/images/base", "/")
