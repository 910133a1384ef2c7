import os

import numpy as np
import pytest
from PIL import Image

from jaxft.data import images, source
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder, photograph


def test_records_of_a_folder(tmp_path):
    folder = photo_folder(tmp_path / "photos", 7)
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "._0.png").write_bytes(b"x")
    (folder / "notes.md").write_text("x")
    (folder / "sub").mkdir()
    records, notices = source.index(folder, caption_file=folder)
    assert [r.path.name for r in records] == sorted(p.name for p in photo_images(folder))
    for record in records:
        with Image.open(record.path) as image:
            assert record.size == image.size
        assert record.captions == (f"photo {record.path.stem} of the cat",)
        assert source.prompt(record, 12345) == record.captions[0]
    assert len({record.digest for record in records}) == 7
    assert notices == [f"{folder}: ignored files: 1 .md"]


def photo_images(folder):
    return [p for p in folder.iterdir() if p.stem.isdigit() and p.suffix in (".png", ".jpg")]


def test_repeat_and_templates(tmp_path):
    folder = photo_folder(tmp_path / "photos", 2)
    template = tmp_path / "t.txt"
    template.write_text("a {pt1}\nthe {pt1} {class}")
    records, notices = source.index(
        folder,
        caption_file=folder,
        prompt_template=template,
        word_names={"pt1": "sks", "other": "x"},
        repeat=3,
    )
    assert [r.path.name for r in records] == ["0.png", "1.jpg"] * 3
    assert [source.prompt(records[0], pick) for pick in range(3)] == ["a sks", "the sks", "a sks"]
    assert any("{caption}" in notice for notice in notices)
    assert any("other" in notice for notice in notices)


def test_every_problem_is_told_at_once(tmp_path):
    folder = photo_folder(tmp_path / "photos", 6)
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "1.jpg").write_bytes(b"not an image")
    (folder / "2.txt").unlink()
    (folder / "3.txt").write_bytes(b"caf\xe9")
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dir.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UserError) as caught:
        source.index(folder, caption_file=folder)
    told = str(caught.value)
    for name in ("0.png", "1.jpg", "2.png: no caption", "3.txt: byte 3", "link.png", "loop.png"):
        assert name in told
    for name in ("dir.png: not a file", "pipe.png: not a file"):
        assert name in told
    assert "4.png" not in told
    assert "5.jpg" not in told


@pytest.mark.parametrize(
    "name", ["猫 🐈.png", "line\nbreak.png", "[x].png", "e\u0301.JPG", "a" * 240 + ".png"]
)
def test_any_file_name_works(tmp_path, name):
    photograph(0, (32, 32)).save(tmp_path / name, "PNG")  # content decides, not the name
    assert source.index(tmp_path).records[0].size == (32, 32)


def test_folders_without_images(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        source.index(tmp_path / "none")
    with pytest.raises(UserError, match="holds no images"):
        source.index(tmp_path)
    photo_folder(tmp_path / "sub", 1)
    with pytest.raises(UserError, match="subfolders are not searched"):
        source.index(tmp_path)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"repeat": 0}, "repeat"),
        ({"bg_color": [0, 0]}, "bg_color"),
        ({"bg_color": [0, 0, 256]}, "bg_color"),
        ({"word_names": {"pt1": 5}}, "word_names.pt1"),
        ({"prompt_template": "none.txt"}, "prompt_template"),
        ({"caption_file": "none.json"}, "caption_file"),
    ],
)
def test_options_that_make_no_sense_are_named(tmp_path, options, key):
    photo_folder(tmp_path, 1)
    with pytest.raises(UserError, match=key):
        source.index(tmp_path, **options)


def test_pixels_are_the_crop_and_changes_are_noticed(tmp_path):
    folder = photo_folder(tmp_path / "photos", 2)
    first, second = source.index(folder).records
    expected = images.resize_and_crop(images.decode(first.path.read_bytes()), (32, 48))
    np.testing.assert_array_equal(source.pixels(first, (32, 48)), expected)
    first.path.write_bytes(second.path.read_bytes())
    second.path.unlink()
    with pytest.raises(UserError, match=r"0\.png has changed"):
        source.pixels(first, (32, 48))
    with pytest.raises(UserError, match=r"1\.jpg"):
        source.pixels(second, (32, 48))
