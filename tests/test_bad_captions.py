"""Forty bad captions: each is used as its writer would want it, or named before training."""

import json
import os
from pathlib import Path

import pytest

from jaxft.data import captions, source
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder

IMAGE = "0.png"
LONG = "word " * 200_000  # 1 MB
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"

USED: dict[str, tuple[dict[str, bytes], str]] = {
    "UTF-8 with a mark": ({"0.txt": b"\xef\xbb\xbfa cat"}, "a cat"),
    "UTF-16 with a mark": ({"0.txt": "a cat".encode("utf-16")}, "a cat"),
    "UTF-16, big end first": ({"0.txt": b"\xfe\xff" + "a cat".encode("utf-16-be")}, "a cat"),
    "lines of Windows": ({"0.txt": b"a cat\r\n"}, "a cat"),
    "lines of old Macs": ({"0.txt": b"\r\ra cat\r"}, "a cat"),
    "blank around it": ({"0.txt": b"\n\n \t a cat \n\n"}, "a cat"),
    "suffix in capitals": ({"0.TXT": b"a cat"}, "a cat"),
    "fields of a template": ({"0.txt": b"{pt1} {0} {a!r}"}, "{pt1} {0} {a!r}"),
    "a brace alone": ({"0.txt": b"a } cat {"}, "a } cat {"),
    "percent and backslash": ({"0.txt": b"%s \\n \\u0041"}, "%s \\n \\u0041"),
    "emoji": ({"0.txt": "a 🐈‍⬛ cat".encode()}, "a 🐈‍⬛ cat"),
    "a line separator of Unicode": ({"0.txt": "a\u2028cat\x85".encode()}, "a\u2028cat"),
    "control characters": ({"0.txt": b"a \x1b[31m\x07 cat"}, "a \x1b[31m\x07 cat"),
    "hidden files of macOS": ({"0.txt": b"a cat", "._0.txt": b"\0\5\x16"}, "a cat"),
    "a number in YAML": ({"c.yaml": b"0: 2023"}, "2023"),
    "a truth of YAML": ({"c.yaml": b"0: no"}, "no"),
    "JSON behind a mark": ({"c.json": b'\xef\xbb\xbf{"0": "a cat"}'}, "a cat"),
    "JSON lines, blank ones between": (
        {"c.jsonl": b'\r\n\n{"file_name": "0.png", "text": "a cat"}\r\n\n'},
        "a cat",
    ),
}
"""Files -> the caption."""

NAMED: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "no file": ({}, ("0.png: no caption",)),
    "another's": ({"1.txt": b"a cat"}, ("0.png: no caption",)),
    "suffix twice": ({"0.png.txt": b"a cat"}, ("0.png: no caption",)),
    "cp1252": ({"0.txt": b"caf\xe9"}, ("0.txt: byte 3 (0xe9)",)),
    "Shift JIS": ({"0.txt": "猫です".encode("shift-jis")}, ("0.txt: byte 0",)),
    "UTF-16 without a mark": ({"0.txt": "a cat".encode("utf-16-le")}, ("0.txt", "NUL")),
    "UTF-32": ({"0.txt": "a cat".encode("utf-32")}, ("0.txt", "NUL")),
    "UTF-16, half a character": ({"0.txt": b"\xff\xfea\0b"}, ("0.txt: byte 4",)),
    "an image": ({"0.txt": b"\x89PNG\r\n\x1a\n"}, ("0.txt: byte 0 (0x89)",)),
    "1 MB": ({"0.txt": LONG.encode()}, ("0.png", "characters, more than 20000")),
    "2 MB": ({"0.txt": 2 * LONG.encode()}, ("0.txt", "1 MiB")),
    "a pointer of Git LFS": ({"0.txt": LFS}, ("0.png", "caption_lines")),
    "two files": ({"0.txt": b"a cat", "0.caption": b"a dog"}, ("0.caption and 0.txt",)),
    "text and table": ({"0.txt": b"a cat", "c.json": b"{}"}, ("1 .txt", "c.json")),
    "two tables": ({"c.json": b"{}", "d.yaml": b"{}"}, ("c.json, d.yaml",)),
    "JSON, broken off": ({"c.json": b'{"0": "a c'}, ("c.json is not JSON",)),
    "JSON, a list": ({"c.json": b'["a cat"]'}, ("c.json must be one object",)),
    "JSON, very deep": ({"c.json": b"[" * 10**6}, ("c.json is not JSON",)),
    "JSON, a key twice": ({"c.json": b'{"0": "a", "0": "b"}'}, ("'0' occurs more than once",)),
    "JSON, null": ({"c.json": b'{"0": null}'}, ("c.json: the caption of '0' is null",)),
    "JSON, half a surrogate": ({"c.json": rb'{"0": "\ud83d"}'}, ("'0'", "surrogate")),
    "JSON, a NUL": ({"c.json": rb'{"0": "a\u0000"}'}, ("'0'", "NUL")),
    "JSON, an object": ({"c.json": b'{"0": {"prompt": "a"}}'}, ("'0' has neither `caption`",)),
    "JSON, an empty list": ({"c.json": b'{"0": []}'}, ("'0' is a list",)),
    "JSON, out of the folder": ({"c.json": b'{"../0.png": "a"}'}, ("'../0.png' leads out",)),
    "YAML, a tab": ({"c.yaml": b"0:\n\t- a"}, ("c.yaml is not YAML", "line 2")),
    "YAML that wants to run": ({"c.yaml": b"0: !!python/name:os.system"}, ("line 1", "tag")),
    "YAML, a billion": (
        {"c.yaml": b"a: &a [x, x]\nb: &b [*a, *a]\n0: [*b, *b]"},
        ("c.yaml: line 2", "alias"),
    ),
    "YAML, two documents": ({"c.yaml": b"0: a\n---\n0: b"}, ("c.yaml is not YAML",)),
    "YAML, empty": ({"c.yaml": b""}, ("c.yaml must be one mapping",)),
    "YAML, a name that is a list": ({"c.yaml": b"? [a]\n: b"}, ("c.yaml: line 1",)),
    "JSON lines, one broken": (
        {"c.jsonl": b'{"file_name": "0.png", "text": "a"}\n{"file_name": '},
        ("c.jsonl: line 2 is not JSON",),
    ),
    "JSON lines, no name": ({"c.jsonl": b'{"text": "a"}'}, ("c.jsonl: line 1", "file_name")),
    "JSON lines, two texts": (
        {"c.jsonl": b'{"file_name": "0.png", "text": "a", "caption": "b"}'},
        ("c.jsonl: line 1", "another `text`"),
    ),
    "JSON lines, an image twice": (
        {"c.jsonl": 2 * b'{"file_name": "0.png", "text": "a"}\n'},
        ("'0.png' and '0.png' are the same image",),
    ),
}
"""Files -> what the message says."""

EMPTY = [b"", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xff\xfe"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> bytes:
    folder = photo_folder(tmp_path_factory.mktemp("one"), 1, captions=False)
    return (folder / IMAGE).read_bytes()


@pytest.fixture
def folder(tmp_path, picture) -> Path:
    (tmp_path / IMAGE).write_bytes(picture)
    return tmp_path


def test_there_are_forty():
    assert len(USED) + len(NAMED) + len(EMPTY) >= 40


@pytest.mark.parametrize(("files", "caption"), USED.values(), ids=USED)
def test_used(folder, files, caption):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (record,) = source.index(folder, caption_file=folder).records
    assert source.prompt(record, 0) == caption


@pytest.mark.parametrize(("files", "says"), NAMED.values(), ids=NAMED)
def test_named(folder, files, says):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        source.index(folder, caption_file=folder)
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize("data", EMPTY)
def test_empty_captions_are_used_and_told(folder, data):
    (folder / "0.txt").write_bytes(data)
    (record,), (notice,) = source.index(folder, caption_file=folder)
    assert record.captions == ("",)
    assert "empty: 0.png" in notice


def test_what_is_no_file_is_no_caption(folder):
    os.mkfifo(folder / "0.txt")
    (folder / "0.caption").symlink_to("0.caption")
    with pytest.raises(UserError, match=r"0\.png: no caption\n.*missing_captions: empty"):
        source.index(folder, caption_file=folder)
    (folder / "0.caption").unlink()
    (folder / "0.caption").mkdir()
    with pytest.raises(UserError, match=r"0\.png: no caption"):
        source.index(folder, caption_file=folder)


def test_messages_can_be_written_whatever_a_name_is(folder):
    """Names that are not UTF-8, or hold a line feed, do not break the report or its lines."""
    (folder / "0.txt").write_bytes(b"a cat")
    for name in (b"\xff.txt", b"a\nb.txt"):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(b"x")
    (notice,) = source.index(folder, caption_file=folder).notices
    assert "\n" not in notice
    notice.encode("utf-8")


def test_a_table_names_every_problem_at_once(folder):
    entries = {"0": 1, "1": None, "../2": "x", "3": ["a", 1]}
    path = folder / "c.json"
    path.write_text(json.dumps(entries))
    problems = captions.load(path, [IMAGE], root=folder).problems
    assert len(problems) == 4
