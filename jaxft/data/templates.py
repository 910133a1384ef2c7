"""Prompt templates: lines such as `a photo of {pt1}, {caption}`, and what fills their fields."""

import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from jaxft.data.text_files import decode
from jaxft.errors import UserError

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


def sides(
    word_names: Mapping[str, object],
) -> tuple[dict[str, str], dict[str, str] | None]:
    """The words of prompts and, where some are pairs `[positive, negative]`, of negative prompts; a
    word that is no pair is in both.

    Raises:
        UserError: names the first that is neither text nor two texts.
    """
    pairs = {name: (word, word) for name, word in word_names.items()}
    found = {
        name: tuple(word)
        for name, word in word_names.items()
        if isinstance(word, list | tuple) and len(word) == 2
    }
    positive, negative = (
        check_word_names({name: pair[side] for name, pair in (pairs | found).items()})
        for side in range(2)
    )
    return positive, negative if found else None


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


def count(template: str, field: str) -> int:
    """How often a field stands in a template."""
    return _parse(template)[0].count(field)


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
