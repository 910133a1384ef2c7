"""Tars in WebDataset's form are a folder of the same images; what is wrong with one is named."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from jaxft.data import index, shards, source
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder


def packed(path, members: dict[str, bytes], format_=tarfile.GNU_FORMAT):
    """A tar as `tar` or WebDataset's own writer makes it, by Python's library."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format_) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def photos(tmp_path) -> dict[str, bytes]:
    """Name -> content, of photographs and their captions."""
    folder = photo_folder(tmp_path / "photos", 6)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_tars_are_a_folder_of_their_members(tmp_path, photos):
    folder, tars = tmp_path / "photos", tmp_path / "tars"
    deep = {f"{'d' * 90}/{'e' * 90}/{name}": data for name, data in photos.items() if name < "3"}
    packed(tars / "a-000.tar", deep)
    ends = {name: data for name, data in photos.items() if name >= "3"}
    packed(tars / "a-001.tar", dict(reversed(ends.items())), tarfile.PAX_FORMAT)
    plain = source.index(folder, caption_file=folder).records
    records, notices = source.index(tars, caption_file=tars)
    assert notices == [f"{tars}: 6 images in 2 tars"]
    for ours, theirs in zip(records, plain, strict=True):
        assert ours.path.name == theirs.path.name
        assert ours[2:5] == theirs[2:5]  # size, digest, captions
        np.testing.assert_array_equal(
            source.pixels(ours, (64, 64)), source.pixels(theirs, (64, 64))
        )
    (one, _) = source.index(tars / "a-000.tar", caption_file=tars / "a-000.tar")
    assert list(one) == list(records)[:3]
    packed(tars / "a-000.tar", {name: data[::-1] for name, data in deep.items()})
    with pytest.raises(UserError, match=r"0\.png has changed"):
        source.pixels(records[0], (64, 64))


def test_captions_of_a_sample_are_text_or_json(tmp_path, photos):
    members = {
        "a.jpg": photos["1.jpg"],
        "a.json": json.dumps({"caption": "not this", "width": 5}).encode(),
        "a.txt": b"of a",
        "b.c.d.png": photos["0.png"],  # its field is c.d.png
        "c.JPG": photos["3.jpg"],
        "c.json": json.dumps({"text": ["one", "two"]}).encode(),
        "c.cls": b"3",
        "x/a.png": photos["2.png"],
        "x/a.caption": b"of x",
        "z.txt": b"of nothing",
    }
    tar = packed(tmp_path / "s.tar", members)
    options = {"caption_file": tar, "caption_lines": "random"}
    records, notices = source.index(tar, **options)
    assert [record.name for record in records] == ["s.tar/a.jpg", "s.tar/c.JPG", "s.tar/x/a.png"]
    assert [record.captions for record in records] == [("of a",), ("one", "two"), ("of x",)]
    assert f"{tmp_path}/s.tar: ignored files: 1 .cls, 1 .png" in notices
    assert any("captions that name no image: s.tar/z.txt" in notice for notice in notices)
    assert source.index(tar).records[0].captions == ("",)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: gzip.compress(data), "s.tar is compressed; unpack it with gunzip"),
        (lambda data: data[: len(data) // 2], "s.tar is cut off within"),
        (lambda data: data[:512], "s.tar is cut off within"),
        (lambda data: data[: -len(data) % 10240 or -10240], "s.tar is"),
        (lambda data: data[:1000], "s.tar is cut off within"),
        (lambda data: b"x" * 3000, "s.tar is no tar, or cut off"),
        (lambda data: b"", "s.tar is no tar, or cut off"),
    ],
)
def test_a_damaged_tar_is_named(tmp_path, photos, spoil, told):
    tar = packed(tmp_path / "s.tar", photos)
    tar.write_bytes(spoil(tar.read_bytes()))
    with pytest.raises(UserError, match=told):
        source.index(tmp_path)


def test_a_damaged_header_is_not_the_end(tmp_path, photos):
    tar = packed(tmp_path / "s.tar", photos)
    with tarfile.open(tar) as whole:
        at = whole.getmembers()[4].offset
    data = bytearray(tar.read_bytes())
    data[at + 10] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=f"damaged or cut off at byte {at}"):
        source.index(tar)


def test_every_member_that_cannot_be_used_is_named(tmp_path, photos):
    picture = photos["0.png"]
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "../b.png", "/c.png", "x/../d.png", "a.png", "e.png", "e.webp"):
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
        for name, kind in (("f.png", tarfile.SYMTYPE), ("g.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("h.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"bad"))
        info = tarfile.TarInfo("a.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"caf\xe9"))
    with pytest.raises(UserError) as caught:
        source.index(path, caption_file=path, missing_captions="empty")
    told = str(caught.value)
    for part in (
        *("'../b.png' leads out", "'/c.png' leads out", "'x/../d.png' leads out"),
        *("'a.png' is there twice", "'e' has several images", "'f.png' is a link"),
        *("'g.png' is a link", "s.tar/h.png: not an image", "s.tar/a.txt: byte 3 (0xe9)"),
    ):
        assert part in told


def test_what_tars_hold_is_known_the_next_time(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(index, "LEAST", 1)
    monkeypatch.setattr(index, "SETTLED", 0)
    monkeypatch.setattr(shards, "LEAST", 1)
    tars = tmp_path / "tars"
    packed(tars / "0.tar", photos)
    options = {"caption_file": tars, "kept": tmp_path / "index"}
    first = list(source.index(tars, **options).records)
    monkeypatch.setattr(shards, "contents", lambda path: pytest.fail("opened"))
    known = source.index(tars, **options)
    assert list(known.records) == first
    assert any("6 of 6 images are as they were" in notice for notice in known.notices)
    monkeypatch.undo()
    packed(tars / "0.tar", {"9.png": photos["2.png"], "9.txt": b"another"})
    (record,) = source.index(tars, **options).records
    assert record.captions == ("another",)


def test_a_folder_of_images_is_not_one_of_tars(tmp_path, photos):
    packed(tmp_path / "photos/0.tar", photos)
    records, notices = source.index(tmp_path / "photos")
    assert len(records) == 6
    assert any("ignored files: 1 .tar" in notice for notice in notices)
    packed(tmp_path / "none/0.tar", {"a.txt": b"x"})
    with pytest.raises(UserError, match=r"no image in 0\.tar"):
        source.index(tmp_path / "none")
