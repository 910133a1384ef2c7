"""What lies in a folder is used as it looks, or named with the reason, before the first step."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxft.data import listing, source
from jaxft.errors import UserError
from tests import bad_images
from tests.conftest import ROOT
from tests.data_fixtures import photograph


def test_what_can_be_used_looks_as_it_should(tmp_path):
    files = list(bad_images.good())
    for file in files:
        (tmp_path / file.name).write_bytes(file.data)
    records, notices = source.index(tmp_path, bg_color=bad_images.GROUND)
    assert [record.path.name for record in records] == sorted(file.name for file in files)
    by_name = {record.path.name: record for record in records}
    for file in files:
        height, width = file.shown.shape[:2]
        record = by_name[file.name]
        assert record.size == (width, height), file.name
        apart = np.abs(source.pixels(record, (width, height)) - file.shown.astype(float))
        assert apart.mean() <= file.atol, file.name
    told = "\n".join(notices)
    assert "whose name says otherwise, and are used: bmp_called.gif (BMP)" in told
    assert "of several frames the first is used: frames.gif, frames.png" in told


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFF tags
def test_what_cannot_be_used_is_named_with_the_reason(tmp_path):
    files = dict(bad_images.bad())
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        source.index(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    told = dict(line.strip().split(": ", 1) for line in lines)
    assert sorted(told) == sorted(files)
    assert all(told.values())
    assert len(files) + sum(1 for _ in bad_images.good()) >= 120


# Linux counts a process's peak anew when its program starts; getrusage's holds its parent's too.
MEASURE = """
import sys
from pathlib import Path
from jaxft.data import source
from jaxft.errors import UserError
def peak():
    status = Path("/proc/self/status").read_text()
    return status.partition("VmHWM:")[2].split()[0]
before = peak()
for folder in sys.argv[1:]:
    try:
        print(len(source.index(folder).records))
    except UserError:
        print("refused")
print(before, peak())
"""


def test_the_corpus_takes_little_memory(tmp_path):
    """Bombs and damaged files, and as many of the largest images allowed as there are threads."""
    for kind, files in {
        "good": [(file.name, file.data) for file in bad_images.good()],
        "bad": bad_images.bad(),
        "large": bad_images.large(os.cpu_count() or 1),
    }.items():
        (tmp_path / kind).mkdir()
        for name, data in files:
            (tmp_path / kind / name).write_bytes(data)
    folders = [str(tmp_path / kind) for kind in ("good", "bad", "large")]
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *folders]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    *counts, peak = told.split("\n")[:4]
    assert counts == [str(len(os.listdir(folders[0]))), "refused", str(len(os.listdir(folders[2])))]
    before, most = (int(kib) / 2**20 for kib in peak.split())
    assert most < 2, f"{most:.2f} GiB, of which {before:.2f} before"


LAYOUTS = {
    "plain": (False, ["a.png", "b.jpg"]),
    "names": (False, ["猫 🐈.png", "line\nbreak.png", "[x].png", "e\u0301.JPG", "é.png"]),
    "long": (False, ["a" * 251 + ".png", " .png", "-rf.png", "%41.png", "~.png", "con.png"]),
    "stems": (False, ["a.png", "a.jpg", "a.b.png", "A.PNG"]),
    "no_suffix": (False, ["photo", "photo.txt.old"]),
    "flat": (False, ["a.png", "sub/b.png"]),
    "deep": (True, ["a.png", "sub/b.png", "sub/sub/c.png", "/".join("d" * 60) + "/e.png"]),
    "only_below": (True, ["x/a.png", "y/a.png"]),
    "folder.png": (True, ["folder.png/a.png"]),
    "hidden": (True, ["a.png", ".b.png", "._a.png", ".git/c.png", "__MACOSX/d.png"]),
}
"""Whether folders below are searched, and the photographs in each."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_of_a_folder_is_found(tmp_path, layout):
    recursive, names = LAYOUTS[layout]
    data = bad_images.encoded(photograph(0, (16, 8)))
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    seen = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    wanted = [n for n in seen if recursive or "/" not in n]
    records, notices = source.index(tmp_path, recursive=recursive)
    assert [r.path.relative_to(tmp_path).as_posix() for r in records] == sorted(wanted)
    assert any("subfolders are not searched" in n for n in notices) == (len(wanted) < len(seen))


def link_to_itself(root):
    (root / "sub").mkdir()
    (root / "sub/up").symlink_to(root)


def two_links_to_each_other(root):
    (root / "x").mkdir()
    (root / "y").mkdir()
    (root / "x/y").symlink_to(root / "y")
    (root / "y/x").symlink_to(root / "x")


def link_to_a_folder_twice(root):
    (root / "sub").mkdir()
    (root / "sub/b.png").write_bytes((root / "a.png").read_bytes())
    (root / "again").symlink_to(root / "sub")


def link_out_of_the_folder(root):
    (root.parent / "else.png").write_bytes((root / "a.png").read_bytes())
    (root / "b.png").symlink_to(root.parent / "else.png")


@pytest.mark.parametrize(
    ("change", "names", "notice"),
    [
        (link_to_itself, {"a.png"}, "links to folders that are searched already: sub/up"),
        (two_links_to_each_other, {"a.png"}, "links to folders that are searched already: "),
        (link_to_a_folder_twice, {"a.png", "b.png"}, "links to folders that are searched already"),
        (link_out_of_the_folder, {"a.png", "b.png"}, "links that lead out of the folder"),
    ],
)
def test_links_are_followed_once(tmp_path, change, names, notice):
    root = tmp_path / "photos"
    root.mkdir()
    (root / "a.png").write_bytes(bad_images.encoded(photograph(0, (16, 8))))
    change(root)
    records, notices = source.index(root, recursive=True)
    assert [r.path.name for r in records] == sorted(names)
    assert any(notice in one for one in notices)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dir.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with pytest.raises(UserError) as caught:
        source.index(tmp_path)
    for name in ("dangling.png: no such file", "loop.png: ", "dir.png: not a file"):
        assert name in str(caught.value)
    for name in ("pipe.png: not a file", "device.png: not a file"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("make", "recursive", "told"),
    [
        (lambda root: None, False, "does not exist"),
        (lambda root: root.write_text("x"), False, "is a file, not a folder"),
        (lambda root: root.mkdir(), False, "holds no images; their names end in"),
        (lambda root: (root / "sub").mkdir(parents=True), False, "subfolders are not searched"),
        (lambda root: (root / "sub").mkdir(parents=True), True, "holds no images; their names"),
        (lambda root: (root / ".cache").mkdir(parents=True), True, "holds no images; their names"),
    ],
)
def test_folders_without_images_say_so(tmp_path, make, recursive, told):
    make(tmp_path / "photos")
    with pytest.raises(UserError, match=told):
        listing.find(tmp_path / "photos", recursive=recursive)
