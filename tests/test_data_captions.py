import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data import captions
from jaxft.errors import UserError

NAMES = ["1.png", "2.PNG", "a.b.jpg", "é.webp"]
TEXTS = {"1": "one", "2": "two, {braces} {pt1}", "a.b": "three\nlines", "é": "vier ünïcode 猫"}


def write(folder, names_to_bytes):
    for name, data in names_to_bytes.items():
        (folder / name).write_bytes(data)
    return folder


def text_files(folder, encoding="utf-8"):
    return write(folder, {f"{stem}.txt": t.encode(encoding) for stem, t in TEXTS.items()})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files(tmp_path, encoding):
    assert captions.load(text_files(tmp_path, encoding), NAMES) == (list(TEXTS.values()), [], [])


@pytest.mark.parametrize("suffix", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
def test_json(tmp_path, suffix, as_folder):
    keys = NAMES if suffix else TEXTS
    path = tmp_path / "captions.json"
    table = dict(zip(keys, TEXTS.values(), strict=True))
    path.write_text(json.dumps(table, ensure_ascii=False), "utf-8")
    loaded = captions.load(tmp_path if as_folder else path, NAMES)
    assert loaded == (list(TEXTS.values()), [], [])


def test_names_match_across_unicode_forms_and_case_of_the_suffix(tmp_path):
    write(tmp_path, {"e\N{COMBINING ACUTE ACCENT}.TXT": b"four"})
    assert captions.load(tmp_path, ["é.png", "é.JPG"]).texts == ["four", "four"]
    path = tmp_path / "captions.json"
    path.write_text('{"x.PNG": "x", "y.png": "y"}')
    assert captions.load(path, ["x.png", "y.PNG"]).texts == ["x", "y"]


def test_none_means_no_captions():
    assert captions.load(None, NAMES) == ([""] * 4, [], [])


def test_every_image_without_a_caption_is_named(tmp_path):
    text_files(tmp_path)
    problems = captions.load(tmp_path, [*NAMES, "5.png", "6.png"]).problems
    assert problems == ["5.png: no caption", "6.png: no caption"]


def test_captions_of_no_image_and_empty_ones_are_told(tmp_path):
    write(tmp_path, {"1.txt": b"", "9.txt": b"nine"})
    notices = captions.load(tmp_path, ["1.png"]).notices
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
        captions.decode(tmp_path / "a.txt")
    (problem,) = captions.load(tmp_path, ["a.png"]).problems
    assert "a.txt" in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1}', "'a' is int"),
        ('{"a": null}', "'a' is NoneType"),
        ('{"a": "x", "a": "y"}', "'a' occurs more than once"),
        ('{"a": "x", "a.png": "y"}', "a.png"),
        ('{"a.png": "x", "a.PNG": "y"}', "same image"),
        (r'{"a": "\ud800"}', "surrogate"),
    ],
)
def test_json_that_is_not_names_to_texts_is_a_problem(tmp_path, text, problem):
    path = write(tmp_path, {"c.json": text.encode()}) / "c.json"
    assert problem in " ".join(captions.load(path, ["a.png"]).problems)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"a": "x"', ""])
def test_json_that_does_not_parse_names_the_file(tmp_path, text):
    path = write(tmp_path, {"c.json": text.encode()}) / "c.json"
    with pytest.raises(UserError, match=r"c\.json"):
        captions.load(path, ["a.png"])


def test_a_choice_that_is_not_clear_is_refused(tmp_path):
    text_files(tmp_path)
    write(tmp_path, {"meta.json": b"{}"})
    with pytest.raises(UserError, match=r"meta\.json"):
        captions.load(tmp_path, NAMES)
    for path in (tmp_path / "1.txt", tmp_path / "none.json", tmp_path / "none"):
        with pytest.raises(UserError, match="caption_file"):
            captions.load(path, NAMES)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_text_or_a_named_reason(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    reason = ""
    try:
        captions.decode(path).encode("utf-8")
    except UserError as error:
        reason = str(error)
    assert not reason or reason.startswith("any.txt: ")


# Templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words", "prompt"),
    [
        ("{pt1}, {caption}", {"pt1": "sks"}, "sks, CAP"),
        ("{pt1}, {caption}", {}, "CAP"),
        ("{pt1}, {caption}", {"pt1": " "}, "CAP"),
        ("{caption}, {pt1}", {}, "CAP"),
        ("{pt1}{caption}", {"pt1": "sks"}, "sksCAP"),
        ("a photo of a {pt1} {class}", {"class": "dog"}, "a photo of a dog"),
        ("a photo of a {pt1} {class}", {"pt1": "sks"}, "a photo of a sks"),
        ("a photo of a {pt1} {class}, {caption}", {"pt1": "sks"}, "a photo of a sks, CAP"),
        ("{a}, {b}, {c}, {caption}", {}, "CAP"),
        ("{caption}, {a}, {b}, {c}", {}, "CAP"),
        ("{a}, {b}, {c}, {d}", {"a": "1", "d": "4"}, "1, 4"),
        ("{pt1}", {}, ""),
        ("{{x}} {pt1}: {caption}", {}, "{x}: CAP"),
        ("{caption}", {"caption": "instead"}, "instead"),
    ],
)
def test_empty_fields_take_a_separator_along(template, words, prompt):
    assert captions.fill(template, words, "CAP") == prompt


@given(st.text(), st.text(), st.sampled_from(["{pt1}, {caption}", "{none} {caption}, {none}"]))
def test_captions_are_never_changed(caption, word, template):
    prompt = captions.fill(template, {"pt1": word}, caption)
    if caption.strip():
        assert caption in prompt


@given(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", "y z", "u, v"]), min_size=3))
def test_full_fields_are_str_format(words):
    template = "one {a},{b}  two {c} . "
    assert captions.fill(template, words, "") == template.format(**words)


def test_template_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a {pt1}\n\n  a photo of {class}, {caption} \n")
    assert captions.load_templates(path) == ("a {pt1}", "a photo of {class}, {caption}")
    for text in ("", "{pt1.__class__}", "{0}", "{a", "{a!r}", "{a:>9999999}", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"t\.txt"):
            captions.load_templates(path)
    with pytest.raises(UserError, match=r"none\.txt"):
        captions.load_templates(tmp_path / "none.txt")


@pytest.mark.parametrize("word", [None, 1, ["a", "b"], True])
def test_words_are_text(word):
    with pytest.raises(UserError, match=r"word_names\.pt1"):
        captions.check_word_names({"class": "dog", "pt1": word})
