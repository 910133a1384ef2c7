"""Captions of a folder of images, and the prompt templates that they are put into."""

import json
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from jaxft.data.images import SUFFIXES
from jaxft.errors import UserError


class Captions(NamedTuple):
    """What was read for a list of images."""

    texts: list[str]
    """One for each image, stripped; '' where there is none."""
    problems: list[str]
    """What makes the captions unusable: each names a file, a key or an image."""
    notices: list[str]
    """What a user should know and need not mend."""


def load(caption_file: str | Path | None, names: Sequence[str]) -> Captions:
    """The captions of the image files `names`.

    `caption_file` is None (no captions), a folder with one `.txt` for each image or one `.json`
    for all of them, or that `.json` itself: `{"1": "text"}` or `{"1.png": "text"}`.

    Raises:
        UserError: `caption_file` is neither of these.
    """
    if caption_file is None:
        return Captions([""] * len(names), [], [])
    path = Path(caption_file)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_file())
        texts = [p for p in files if p.suffix.casefold() == ".txt"]
        tables = [p for p in files if p.suffix.casefold() == ".json"]
        if len(tables) > 1 or (tables and texts):
            raise UserError(
                f"caption_file: the folder {path} holds {len(texts)} .txt and these .json files: "
                f"{_some([p.name for p in tables])}; name the one .json to read, or keep the "
                ".txt files in a folder without .json"
            )
        if not tables:
            return _from_texts(texts, names)
        path = tables[0]
    if not path.is_file():
        raise UserError(f"caption_file: {path} does not exist")
    if path.suffix.casefold() != ".json":
        raise UserError(f"caption_file: {path} is neither a folder nor a .json file")
    return _from_json(path, names)


def _from_texts(files: Sequence[Path], names: Sequence[str]) -> Captions:
    """One text file for each image, of the same name up to the suffix."""
    found: dict[str, str] = {}
    problems: list[str] = []
    wanted = {_stem(name) for name in names}
    for path in files:
        stem = _stem(path.name)
        if stem not in wanted:
            continue
        if stem in found:
            problems.append(f"{path.name}: another .txt has the same name but for its spelling")
        try:
            found[stem] = decode(path)
        except UserError as error:
            found[stem] = ""
            problems.append(str(error))
    spare = [path.name for path in files if _stem(path.name) not in wanted]
    return _matched([found.get(_stem(name)) for name in names], names, problems, spare)


def _from_json(path: Path, names: Sequence[str]) -> Captions:
    """One object of image name (with or without suffix) to text."""
    problems: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        problems.extend(f"{path.name}: the key {key!r} occurs more than once" for key in twice)
        return dict(pairs)

    try:
        table = json.loads(decode(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"caption_file: {path} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f'caption_file: {path} must be one object, {{"image name": "caption"}}')
    captions: dict[str, str] = {}
    spelling: dict[str, str] = {}
    for key, text in table.items():
        if not isinstance(text, str):
            problems.append(f"{path.name}: the caption of {key!r} is {type(text).__name__}")
            text = ""
        elif fault := _fault(text):
            problems.append(f"{path.name}: the caption of {key!r} holds {fault}")
        name = _folded(key)
        if name in captions:
            problems.append(f"{path.name}: {spelling[name]!r} and {key!r} are the same image")
        captions[name], spelling[name] = text.strip(), key
    texts: list[str | None] = []
    used: set[str] = set()
    for name in names:
        hits = [key for key in (_folded(name), _stem(name)) if key in captions]
        if len({captions[key] for key in hits}) > 1:
            problems.append(f"{name}: {path.name} has a caption with and one without the suffix")
        texts.append(captions[hits[0]] if hits else None)
        used.update(hits)
    spare = [spelling[key] for key in captions if key not in used]
    return _matched(texts, names, problems, spare)


def _matched(
    texts: list[str | None], names: Sequence[str], problems: list[str], spare: list[str]
) -> Captions:
    """Captions with the images that have none and the captions that no image has reported."""
    problems = problems + [
        f"{name}: no caption" for name, text in zip(names, texts, strict=True) if text is None
    ]
    empty = [name for name, text in zip(names, texts, strict=True) if text == ""]
    notices = [f"captions that name no image: {_some(spare)}"] if spare else []
    if empty and not problems:
        notices.append(f"images whose caption is empty: {_some(empty)}")
    return Captions([text or "" for text in texts], problems, notices)


def decode(path: Path) -> str:
    """The stripped text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        UserError: names the file and the byte that does not decode.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.name}: {error.strerror}") from None
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)  # counted without the mark, or with
        raise UserError(
            f"{path.name}: byte {offset} (0x{data[offset]:02x}) is not "
            f"{'UTF-16' if utf16 else 'UTF-8'}: save it as UTF-8"
        ) from None
    if fault := _fault(text):
        raise UserError(f"{path.name}: holds {fault}: save it as UTF-8 text")
    return text.strip()


def _fault(text: str) -> str:
    """What keeps a tokenizer from reading the text; '' if nothing does."""
    if "\0" in text:
        return f"a NUL character at {text.index(chr(0))}"
    lone = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    return "" if lone is None else f"half a surrogate pair at {lone}"


def _folded(name: str) -> str:
    """A name as it is compared: composed Unicode, an image's suffix in lower case."""
    name = unicodedata.normalize("NFC", name)
    suffix = Path(name).suffix
    if suffix.casefold() in SUFFIXES:
        return name.removesuffix(suffix) + suffix.casefold()
    return name


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", Path(name).stem)


def _some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# Prompt templates -----------------------------------------------------------------------------

_SEPARATORS = " \t,"
_CLOSING = (".", ":", ";", "!", "?", ")")  # stands right behind what comes before it


def load_templates(path: str | Path) -> tuple[str, ...]:
    """The lines of a prompt template file, such as `a photo of {pt1}, {caption}`; blank ones out.

    Raises:
        UserError: no such file, no line in it, or a line with a field that is not a plain name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt_template: {path} does not exist")
    lines = tuple(line.strip() for line in decode(path).splitlines() if line.strip())
    if not lines:
        raise UserError(f"prompt_template: {path} has no line")
    for line in lines:
        try:
            _parse(line)
        except ValueError as error:
            raise UserError(f"prompt_template: {path}: {line!r}: {error}") from None
    return lines


def check_word_names(word_names: Mapping[str, object]) -> dict[str, str]:
    """The words to put into templates, each a string.

    Raises:
        UserError: names the first that is not.
    """
    for name, word in word_names.items():
        if not isinstance(word, str):
            raise UserError(
                f"word_names.{name}: {word!r} is {type(word).__name__}, not text; quote it, or "
                "write '' for nothing"
            )
    return {name: str(word) for name, word in word_names.items()}


@lru_cache(maxsize=4096)
def _parse(template: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the fields, and the text before, between and after them (one more)."""
    gaps, names, text = [], [], ""
    for literal, field, spec, conversion in string.Formatter().parse(template):
        text += literal
        if field is None:  # the end, or an escaped brace
            continue
        if spec or conversion or not field.replace("-", "_").isidentifier():
            raise ValueError(f"{{{field}}} is no field; write {{pt1}}, {{class}}, {{caption}} …")
        gaps.append(text)
        names.append(field)
        text = ""
    return tuple(names), (*gaps, text)


def fields(templates: Sequence[str]) -> set[str]:
    """Names of the fields of all templates."""
    return {name for template in templates for name in _parse(template)[0]}


def fill(template: str, word_names: Mapping[str, str], caption: str) -> str:
    """The template with its fields filled in; `{caption}` is the image's unless a word replaces it.

    A field without a value takes one of the separators beside it along: `{pt1}, {caption}` without
    pt1 is the caption alone. What is filled in is never changed.
    """
    values = {"caption": caption, **word_names}
    names, gaps = _parse(template)
    done, gap = "", gaps[0]
    for index, (name, following) in enumerate(zip(names, gaps[1:], strict=True)):
        value = values.get(name, "")
        if value.strip():
            done, gap = done + gap + value, following
        else:
            gap = _closed(gap, following, first=not done, last=index + 1 == len(names))
    return done + gap


def _closed(left: str, right: str, *, first: bool, last: bool) -> str:
    """The text on both sides of an empty field, with the longer separator of the two between."""
    before, after = left.rstrip(_SEPARATORS), right.lstrip(_SEPARATORS)
    if (first and not before) or (last and not after) or after.startswith(_CLOSING):
        return before + after
    separators = left[len(before) :], right[: len(right) - len(after)]
    return before + max(separators, key=len) + after
