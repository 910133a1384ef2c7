import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data import templates
from jaxft.errors import UserError


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
    assert templates.fill(template, words, "CAP") == prompt


@given(st.text(), st.text(), st.sampled_from(["{pt1}, {caption}", "{none} {caption}, {none}"]))
def test_captions_are_never_changed(caption, word, template):
    prompt = templates.fill(template, {"pt1": word}, caption)
    if caption.strip():
        assert caption in prompt


@given(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", "y z", "u, v"]), min_size=3))
def test_full_fields_are_str_format(words):
    template = "one {a},{b}  two {c} . "
    assert templates.fill(template, words, "") == template.format(**words)


def test_template_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a {pt1}\n\n  a photo of {class}, {caption} \n")
    assert templates.load_templates(path) == ("a {pt1}", "a photo of {class}, {caption}")
    for text in ("", "{pt1.__class__}", "{0}", "{a", "{a!r}", "{a:>9999999}", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"t\.txt"):
            templates.load_templates(path)
    with pytest.raises(UserError, match=r"none\.txt"):
        templates.load_templates(tmp_path / "none.txt")


@pytest.mark.parametrize("word", [None, 1, ["a", "b"], True])
def test_words_are_text(word):
    with pytest.raises(UserError, match=r"word_names\.pt1"):
        templates.check_word_names({"class": "dog", "pt1": word})
