"""What was read before is not opened again, unless it has changed; nothing else is different."""

import json
import os

import pytest

from jaxft.data import images, index, source, text_files
from jaxft.data.columns import Texts
from tests.data_fixtures import photo_folder, photograph


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small folders are worth an index here, and are looked at in small blocks."""
    monkeypatch.setattr(index, "LEAST", 1)
    monkeypatch.setattr(index, "SETTLED", 0)
    monkeypatch.setattr(index, "_BLOCK", 3)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """What is decoded: sizes of images, names of captions."""
    seen = []
    decode, text = images.decode, text_files.decode

    def image(data, *color):
        seen.append(decode(data, *color).size)
        return decode(data, *color)

    def caption(path, *limit):
        seen.append(path.name)
        return text(path, *limit)

    monkeypatch.setattr(images, "decode", image)
    monkeypatch.setattr(text_files, "decode", caption)
    return seen


@pytest.fixture
def read(tmp_path, opened):
    """Indexes the photographs, and gives what was opened for it; it is what no index gives."""
    folder = photo_folder(tmp_path / "photos", 8)
    photo_folder(tmp_path / "masks", 7, captions=False)

    def do() -> list:
        options = {"caption_file": folder, "att_mask": tmp_path / "masks", "repeat": 2}
        opened.clear()
        records, notices = source.index(folder, **options, kept=tmp_path / "index")
        first = list(opened)
        plain, said = source.index(folder, **options)
        assert list(records) == list(plain)
        assert [n for n in notices if "as they were read before" not in n] == said
        return first

    return do


def test_only_what_has_changed_is_opened(tmp_path, read):
    folder = tmp_path / "photos"
    assert len(read()) == 8 + 8 + 7
    assert read() == []
    (folder / "3.txt").write_text("something else")
    assert read() == ["3.txt"]
    photograph(1, (24, 48)).save(folder / "4.png")
    photograph(1, (51, 61)).save(folder / "00.png")
    (folder / "00.txt").write_text("a new one")
    (folder / "7.jpg").unlink()
    assert sorted(map(str, read())) == ["(24, 48)", "(51, 61)", "00.txt"]
    assert read() == []
    photograph(2, (96, 64)).save(tmp_path / "masks/1.jpg", quality=50)
    assert read() == [(96, 64)]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_a_table_is_read_again_when_it_has_changed_and_only_then(tmp_path, opened, form):
    folder, masks = photo_folder(tmp_path / "photos", 4, captions=False), tmp_path / "photos/masks"
    photo_folder(masks, 4, captions=False)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    table = folder / f"metadata.{form}"

    def read(*words: str) -> list[str]:
        rows = [
            {"file_name": name, "text": f"{word}, {name} 猫", "cond": f"masks/{name}"}
            for name, word in zip(names, words, strict=True)
        ]
        if form == "csv":
            lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
            text = "\n".join(["file_name,text,cond", *lines])
        elif form == "json":
            text = json.dumps({row.pop("file_name"): row for row in rows})
        else:
            text = "\n".join(map(json.dumps, rows))
        if not table.exists() or table.read_text() != text:
            table.write_text(text)
        opened.clear()
        options = {"caption_file": table, "cond_column": "cond"}
        records, notices = source.index(folder, **options, kept=tmp_path / "index")
        seen = [name for name in opened if name == table.name]
        plain, said = source.index(folder, **options)
        assert list(records) == list(plain)
        assert [n for n in notices if "as they were read before" not in n] == said
        assert [record.captions for record in records] == [(row["text"],) for row in rows]
        return seen

    assert read("a", "b", "c", "d") == 2 * [table.name]  # captions, and the column
    assert read("a", "b", "c", "d") == []
    assert read("a", "x", "c", "d") == 2 * [table.name]
    for path in (tmp_path / "index").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert read("a", "x", "c", "d") == 2 * [table.name]
    assert read("a", "x", "c", "d") == []


def test_a_file_with_another_content_and_the_same_size_and_time_is_read(tmp_path, read):
    path = tmp_path / "photos/2.txt"
    before = path.stat()
    read()
    path.write_text(path.read_text().replace("photo", "paint"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read() == ["2.txt"]


def test_what_may_change_within_one_tick_of_the_clock_is_not_kept(tmp_path, read, monkeypatch):
    monkeypatch.setattr(index, "SETTLED", 3600 * 10**9)
    assert len(read()) == len(read()) == 8 + 8 + 7


def test_a_damaged_index_is_none(tmp_path, read):
    read()
    for path in (tmp_path / "index").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert len(read()) == 8 + 8 + 7
    assert read() == []
    for path in (tmp_path / "index").iterdir():
        path.write_bytes(b"x")
    assert len(read()) == 8 + 8 + 7


def test_an_index_that_cannot_be_written_stops_nothing(tmp_path, read, caplog):
    (tmp_path / "index").write_text("a file")
    assert len(read()) == 8 + 8 + 7
    assert "cannot be written" in caplog.text


def test_what_was_read_before_a_stop_is_kept(tmp_path):
    folder = photo_folder(tmp_path / "photos", 8, captions=False)
    names = sorted(os.listdir(folder))

    def stamp(place):
        return 1, 1, 1

    def look(read):
        return index.Index(tmp_path / "index", folder, "x", least=1).look(
            names, stamp, read, title=""
        )

    def once(place):
        if place == 6:
            raise KeyboardInterrupt
        return place

    with pytest.raises(KeyboardInterrupt):
        list(look(once))
    seen = []
    assert list(look(lambda place: seen.append(place) or place)) == list(range(8))
    assert seen == [6, 7]
    # Stopped again, after a change of the first, it loses nothing that lies behind.
    stopped = look(lambda place: -1)
    next(stopped)
    stopped.close()
    assert list(look(lambda place: pytest.fail("it was known"))) == list(range(8))


def test_texts_in_one_block_come_back():
    texts = ["", "a", "猫 🐈", "\udcff", "line\nbreak", "x" * 1000, ""]
    built = Texts(texts)
    assert list(built) == list(Texts.of(*built.arrays())) == texts
