"""Which files are images, whatever they are called, and which are left out."""

import numpy as np
import pytest
from PIL import Image

from jaxft.data import images, source
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder, photograph

PHOTO = photograph(1, (96, 64))


def test_folders_below_are_searched_when_asked(tmp_path):
    for name in ("", "a", "a/b"):
        photo_folder(tmp_path / name, 1)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "0.txt").write_text("of a")
    flat = source.index(tmp_path, caption_file=tmp_path)
    assert [record.path for record in flat.records] == [tmp_path / "0.png"]
    assert any("subfolders are not searched" in notice for notice in flat.notices)
    deep = source.index(tmp_path, caption_file=tmp_path, recursive=True)
    names = {record.path.relative_to(tmp_path).as_posix(): record for record in deep.records}
    assert list(names) == ["0.png", "a/0.png", "a/b/0.png"]
    assert names["a/0.png"].captions == ("of a",)
    assert any("searched already: a/loop" in notice for notice in deep.notices)


def test_content_decides_what_is_an_image(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    for name, format_ in (("b.png", "JPEG"), ("c", "WEBP"), ("d.dat", "BMP"), ("e.jfif", "JPEG")):
        PHOTO.save(tmp_path / name, format_)
    PHOTO.save(tmp_path / "raw.nef", "TIFF")  # a camera's raw file begins so
    records, notices = source.index(tmp_path)
    assert [r.path.name for r in records] == ["a.png", "b.png", "c", "d.dat", "e.jfif"]
    told = " ".join(notices)
    assert "otherwise, and are used: b.png (JPEG), c (WEBP), d.dat (BMP), e.jfif (JPEG)" in told
    assert "ignored files: 1 .nef" in told
    shown = np.asarray(images.decode((tmp_path / "d.dat").read_bytes()))
    np.testing.assert_array_equal(shown, np.asarray(PHOTO))


def test_images_without_caption_and_small_ones(tmp_path):
    photo_folder(tmp_path, 1)
    photograph(0, (63, 99)).save(tmp_path / "9.png")
    with pytest.raises(UserError, match=r"9\.png: no caption"):
        source.index(tmp_path, caption_file=tmp_path)
    allowed = {"caption_file": tmp_path, "missing_captions": "empty"}
    records, notices = source.index(tmp_path, **allowed)
    assert records[1].captions == ("",)
    assert any("9.png" in notice for notice in notices)
    records, notices = source.index(tmp_path, **allowed, min_size=64)
    assert [record.path.name for record in records] == ["0.png"]
    assert any("9.png" in notice and "min_size" in notice for notice in notices)


def test_files_that_are_too_large_are_not_read(tmp_path):
    photo_folder(tmp_path, 1)
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(100 * 2**30)  # takes no room
    with pytest.raises(UserError, match=r"1\.png: more than 512 MiB"):
        source.index(tmp_path)


def test_16_bit_grey_where_white_is_zero(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.tif", tiffinfo={262: 0})
    got = np.asarray(images.decode((tmp_path / "a.tif").read_bytes()))
    np.testing.assert_array_equal(got[..., 0], 255 - np.rint(ramp / 257))
