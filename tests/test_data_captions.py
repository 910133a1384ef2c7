import csv
import io
import json
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data import captions
from jaxft.data.text_files import decode
from jaxft.errors import UserError

NAMES = ["1.png", "2.PNG", "a.b.jpg", "é.webp"]
TEXTS = {"1": "one", "2": "two, {braces} {pt1}", "a.b": "three, lines", "é": "vier ünïcode 猫"}
READ = ([(text,) for text in TEXTS.values()], [], [])
SEVERAL = "one\r\n\n two \nthree\n"


def load(*args, **options) -> captions.Captions:
    """`captions.load`, with a list of texts, which can be compared."""
    found = captions.load(*args, **options)
    return found._replace(texts=list(found.texts))


def write(folder, names_to_bytes):
    for name, data in names_to_bytes.items():
        (folder / name).write_bytes(data)
    return folder


def text_files(folder, encoding="utf-8"):
    return write(folder, {f"{stem}.txt": t.encode(encoding) for stem, t in TEXTS.items()})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_text_files(tmp_path, encoding, suffix):
    for path in text_files(tmp_path, encoding).iterdir():
        path.rename(path.with_name(path.name.removesuffix(".txt") + suffix))
    assert load(tmp_path, NAMES) == READ


def json_lines(table):
    rows = ({"file_name": name, "text": text} for name, text in table.items())
    return "\n".join(json.dumps(row) for row in rows)


def comma_separated(table):
    stream = io.StringIO()
    rows = csv.writer(stream)
    rows.writerow(["file_name", "width", "text"])
    rows.writerows((name, 5, text) for name, text in table.items())
    return stream.getvalue()


TABLES = {
    "metadata.csv": comma_separated,
    "captions.json": json.dumps,
    "captions.yaml": lambda table: yaml.safe_dump(table, allow_unicode=True),
    "metadata.jsonl": json_lines,
    "meta_cap.json": lambda table: json.dumps({n: {"caption": t} for n, t in table.items()}),
    "meta_tags.json": lambda table: json.dumps({n: {"tags": t} for n, t in table.items()}),
}


@pytest.mark.parametrize("suffix", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name, encoding, suffix, as_folder):
    keys = NAMES if suffix else TEXTS
    text = TABLES[name](dict(zip(keys, TEXTS.values(), strict=True)))
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    assert load(tmp_path if as_folder else path, NAMES) == READ


def test_kohyas_tags_come_behind_the_caption(tmp_path):
    path = tmp_path / "meta.json"
    entry = {"caption": "a cat\na dog", "tags": "red, blue", "train_resolution": [64, 64]}
    path.write_text(json.dumps({"1": entry, "2": {"tags": ["x", "y"]}}))
    loaded = load(path, ["1.png", "2.png"], several="random")
    assert loaded == ([("a cat, red, blue", "a dog, red, blue"), ("x, y",)], [], [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("1.txt", SEVERAL),
        ("c.json", json.dumps({"1": SEVERAL})),
        ("c.json", json.dumps({"1": ["one", "two", "three"]})),
        ("c.yaml", "1: [one, two, three]"),
        ("c.yaml", "1:\n- one\n- |\n  two\n  three"),
        ("c.jsonl", json.dumps({"file_name": "1.png", "text": ["one", "two", "three"]})),
    ],
)
def test_several_lines(tmp_path, name, text):
    write(tmp_path, {name: text.encode()})
    results = {
        several: load(tmp_path, ["1.png"], several=several)
        for several in ("first", "random", "join")
    }
    assert results["first"] == ([("one",)], [], [])
    assert results["random"] == ([("one", "two", "three")], [], [])
    assert results["join"] == ([("one two three",)], [], [])
    (problem,) = load(tmp_path, ["1.png"]).problems
    assert "1.png" in problem
    assert "caption_lines" in problem


def test_yaml_is_text_as_it_is_written(tmp_path):
    text = "01: no\n1_000.png: 2023\n3: 1girl, solo\n4: 2020-01-01\n5: ''\nnull: 1e3\n"
    write(tmp_path, {"c.yaml": text.encode()})
    names = ["01.png", "1_000.png", "3.png", "4.png", "5.png", "null.png"]
    texts = load(tmp_path, names).texts
    assert [line for (line,) in texts] == ["no", "2023", "1girl, solo", "2020-01-01", "", "1e3"]


def test_images_in_subfolders(tmp_path):
    names = ["1.png", "sub/1.png", "sub/deep/1.png"]
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text(name)
    wanted = ([(name,) for name in names], [], [])
    assert load(tmp_path, names) == wanted
    for keys in (names, ["./1", r"sub\1", "sub//deep/1.png"]):
        path = tmp_path / "c.json"
        path.write_text(json.dumps(dict(zip(keys, names, strict=True))))
        assert load(path, names) == wanted


def test_a_form_can_be_named(tmp_path):
    text_files(tmp_path)
    write(tmp_path, {"c.json": json.dumps(dict.fromkeys(TEXTS, "json")).encode(), "d.yaml": b"{}"})
    assert load(captions.Place(tmp_path, "text"), NAMES) == READ
    assert load(captions.Place(tmp_path, "json"), NAMES).texts == [("json",)] * 4
    (tmp_path / "c.json").rename(tmp_path / "c.dat")
    assert load(captions.Place(tmp_path / "c.dat", "json"), NAMES).texts[0] == ("json",)


OUTSIDE = [
    "/etc/passwd",
    "/1.png",
    "../1.png",
    "sub/../../1.png",
    "sub/../1.png",
    "..",
    r"..\1.png",
    r"C:\images\1.png",
    "C:/images/1.png",
    r"\\server\share\1.png",
    "//server/share/1.png",
    "~/1.png",
    "1\0.png",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    for file, text in {
        "c.json": json.dumps({"1": "x", name: "y"}),
        "d.jsonl": json_lines({"1.png": "x", name: "y"}),
        "e.yaml": "1: x\n" + json.dumps({name: "y"})[1:-1],
    }.items():
        write(tmp_path, {file: text.encode()})
        (problem,) = load(tmp_path / file, ["1.png"], root=tmp_path).problems
        assert problem.startswith(f"{file}: {name!r} ")


def test_nothing_but_the_caption_file_is_opened(tmp_path):
    path = write(tmp_path, {"c.json": json.dumps(dict.fromkeys(OUTSIDE, "x")).encode()}) / "c.json"
    opened: list[object] = []
    watching = True
    sys.addaudithook(lambda event, args: watching and event == "open" and opened.append(args[0]))
    load(path, ["1.png"], root=tmp_path)
    watching = False
    assert [str(file) for file in opened] == [str(path)]


def test_a_whole_path_below_the_folder_is_inside(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({str(tmp_path / "sub" / "1.png"): "x"}))
    assert load(path, ["sub/1.png"], root=tmp_path) == ([("x",)], [], [])
    assert load(path, ["sub/1.png"], root=tmp_path / "other").problems


def test_names_match_across_unicode_forms_and_case_of_the_suffix(tmp_path):
    write(tmp_path, {"e\N{COMBINING ACUTE ACCENT}.TXT": b"four"})
    assert load(tmp_path, ["é.png", "é.JPG"]).texts == [("four",), ("four",)]
    path = tmp_path / "captions.json"
    path.write_text('{"x.PNG": "x", "y.png": "y"}')
    assert load(path, ["x.png", "y.PNG"]).texts == [("x",), ("y",)]


def test_none_means_no_captions():
    assert load(None, NAMES) == ([("",)] * 4, [], [])


def test_every_image_without_a_caption_is_named(tmp_path):
    text_files(tmp_path)
    problems = load(tmp_path, [*NAMES, "5.png", "6.png"]).problems
    assert problems == ["5.png: no caption", "6.png: no caption"]


def test_captions_of_no_image_and_empty_ones_are_told(tmp_path):
    write(tmp_path, {"1.txt": b"", "9.txt": b"nine"})
    notices = load(tmp_path, ["1.png"]).notices
    assert "9.txt" in notices[0]
    assert "1.png" in notices[1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("été".encode("cp1252"), r"a\.txt: byte 0 \(0xe9\) is not UTF-8"),
        (b"abc\x80", r"a\.txt: byte 3 \(0x80\)"),
        (b"\xef\xbb\xbfabc\x80", r"a\.txt: byte 6 \(0x80\)"),
        ("ab".encode("utf-16") + b"\x00", r"a\.txt: byte 6 .* UTF-16"),
        ("plain".encode("utf-16-le"), r"a\.txt: .*NUL"),
    ],
)
def test_what_does_not_decode_is_named_with_its_byte(tmp_path, data, reason):
    write(tmp_path, {"a.txt": data})
    with pytest.raises(UserError, match=reason):
        decode(tmp_path / "a.txt")
    (problem,) = load(tmp_path, ["a.png"]).problems
    assert "a.txt" in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1}', "'a' is 1, not text"),
        ('{"a": null}', "'a' is null"),
        ('{"a": "x", "a": "y"}', "'a' occurs more than once"),
        ('{"a": "x", "a.png": "y"}', "a.png"),
        ('{"a.png": "x", "a.PNG": "y"}', "same image"),
        (r'{"a": "\ud800"}', "surrogate"),
    ],
)
def test_json_that_is_not_names_to_texts_is_a_problem(tmp_path, text, problem):
    path = write(tmp_path, {"c.json": text.encode()}) / "c.json"
    assert problem in " ".join(load(path, ["a.png"]).problems)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"a": "x"', ""])
def test_json_that_does_not_parse_names_the_file(tmp_path, text):
    path = write(tmp_path, {"c.json": text.encode()}) / "c.json"
    with pytest.raises(UserError, match=r"c\.json"):
        load(path, ["a.png"])


def test_a_choice_that_is_not_clear_is_refused(tmp_path):
    text_files(tmp_path)
    write(tmp_path, {"meta.json": b"{}"})
    with pytest.raises(UserError, match=r"meta\.json"):
        load(tmp_path, NAMES)
    for path in (tmp_path / "1.txt", tmp_path / "none.json", tmp_path / "none"):
        with pytest.raises(UserError, match="caption_file"):
            load(path, NAMES)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_text_or_a_named_reason(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    reason = ""
    try:
        decode(path).encode("utf-8")
    except UserError as error:
        reason = str(error)
    assert not reason or reason.startswith("any.txt: ")


def test_an_imagefolder_has_a_table_in_each_of_its_folders(tmp_path):
    """Names are counted from the table's own folder, which they may not leave."""
    names = ["test/1.png", "train/cats/1.png", "train/dogs/1.png", "train/dogs/2.png"]
    (tmp_path / "train/cats").mkdir(parents=True)
    (tmp_path / "train/dogs").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "train/metadata.jsonl").write_text(json_lines({"cats/1.png": "a", "dogs/1": "b"}))
    (tmp_path / "train/dogs/metadata.csv").write_text(comma_separated({"2.png": 'c, "d"\ne'}))
    (tmp_path / "test/metadata.csv").write_text(comma_separated({"1.png": "f"}))
    read = load(tmp_path, names, root=tmp_path, several="random")
    assert read == ([("f",), ("a",), ("b",), ('c, "d"', "e")], [], [])
    (tmp_path / "test/metadata.csv").write_text(comma_separated({"../train/dogs/1.png": "x"}))
    (tmp_path / "train/dogs/metadata.csv").write_text(comma_separated({"1.png": "y"}))
    problems = "\n".join(load(tmp_path, names, root=tmp_path).problems)
    assert "test/metadata.csv: '../train/dogs/1.png' leads out of the folder" in problems
    assert "train/dogs/1.png has a caption with and one without the suffix" in problems
    (tmp_path / "test/1.txt").write_text("beside")
    with pytest.raises(UserError, match=r"holds 1 .txt or .caption files and test/metadata.csv"):
        load(tmp_path, names)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has the columns none"),
        ("name,text\n1.png,x\n", "has the columns name, text; it must have file_name"),
        ("file_name,text\n1.png\n", "line 2 has no file_name, or another number of columns"),
        ("file_name,text\n1.png,x,y\n", "line 2 has no file_name, or another number of columns"),
        ("file_name,text\n,x\n", "line 2 has no file_name"),
        ('file_name,text\n1.png,"x\n', "line 2 is not CSV"),
        ("file_name,text\n1.png,x\n1.png,y\n", "'1.png' and '1.png' are the same image"),
    ],
)
def test_csv_that_cannot_be_used_is_named(tmp_path, text, told):
    (tmp_path / "m.csv").write_text(text)
    try:
        problems = load(tmp_path / "m.csv", ["1.png"]).problems
    except UserError as error:
        problems = [str(error)]
    assert told in "\n".join(problems)
