"""What happens to a caption on its way into a prompt: tags shuffled, dropped, erased …

A tag is what stands between two commas that no pair of brackets encloses: the weighted texts
`(blue sky, clouds:1.2)` and `{cat:1.3}` are one tag each and stay as they are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jaxft.errors import UserError

Bits = np.random.Philox
"""Random bits; NumPy promises these, and not its shuffles, to stay the same for ever."""

Measure = Callable[[str], int]
"""The length of a text, in tokens."""


class Transform(NamedTuple):
    """One step on the way, from text to text."""

    apply: Callable[[str, Bits], str]
    longest: Callable[[str, Measure], str] = lambda text, _: text
    """The longest that `apply` can make of a text."""
    draws: bool = True
    """Whether a text may become another one the next time."""
    separator: str | None = None
    """What marks the tags to keep, and is no part of the prompt."""


class TemplateFill(NamedTuple):
    """The place in a list of transforms where the text is put into its template."""

    word_names: Mapping[str, object] | None = None
    """What fills the other fields, instead of the source's `word_names`."""


class CaptionDropout(NamedTuple):
    """The whole prompt is empty with the probability p, wherever this stands in the list."""

    p: float


Step = Transform | TemplateFill | CaptionDropout


def tag_shuffle(*, keep_first: int = 0, keep_separator: str | None = None) -> Transform:
    """Tags in a random order.

    The first `keep_first` stay where they are. So do, in a text with a `keep_separator`, those
    before the first and behind the second of them, and no others.
    """

    def shuffled(tags: list[str], bits: Bits) -> list[str]:
        order = np.argsort(bits.random_raw(len(tags)), kind="stable") if tags else []
        return [tags[index] for index in order]

    return _of_tags(shuffled, keep_first, keep_separator)


def tag_dropout(
    p: float = 0.1,
    *,
    keep: Sequence[str] = (),
    keep_first: int = 0,
    keep_separator: str | None = None,
) -> Transform:
    """Each tag is left out with the probability p, unless it is in `keep` (in any case of letters)
    or kept by its place, as in `tag_shuffle`."""
    kept = {tag.strip().casefold() for tag in keep}
    _check_probability(p)

    def thinned(tags: list[str], bits: Bits) -> list[str]:
        return [tag for tag in tags if not _happens(p, bits) or tag.casefold() in kept]

    return _of_tags(thinned, keep_first, keep_separator)


def tag_erase(p: float = 0.1) -> Transform:
    """Nothing is left of the text with the probability p: of the caption before `TemplateFill`, of
    the whole prompt behind it."""
    _check_probability(p)
    return Transform(lambda text, bits: "" if _happens(p, bits) else text)


def caption_dropout(p: float = 0.1) -> CaptionDropout:
    """The prompt is empty with the probability p."""
    _check_probability(p)
    return CaptionDropout(p)


def wildcards() -> Transform:
    """`{red|green|blue}` becomes one of the three; they nest, and `{cat:1.3}` stays."""

    def longest(text: str, measure: Measure) -> str:
        return _expanded(text, lambda choices: max(choices, key=measure))

    def drawn(text: str, bits: Bits) -> str:
        return _expanded(text, lambda choices: choices[int(bits.random_raw()) % len(choices)])

    return Transform(drawn, longest)


def prefix(text: str) -> Transform:
    """The text, a space, and what there was."""
    return _fixed(lambda caption: f"{text} {caption}".strip())


def suffix(text: str) -> Transform:
    """What there was, a space, and the text; of a text that begins with a comma, just one comma."""

    def added(caption: str) -> str:
        if not text.startswith(","):
            return f"{caption} {text}".strip()
        caption = caption.rstrip(" ,")
        return caption + text if caption else text.lstrip(" ,")

    return _fixed(added)


def _fixed(change: Callable[[str], str]) -> Transform:
    return Transform(lambda text, _: change(text), lambda text, _: change(text), draws=False)


def _of_tags(
    change: Callable[[list[str], Bits], list[str]], keep_first: int, separator: str | None
) -> Transform:
    if keep_first < 0:
        raise UserError(f"keep_first: {keep_first} must be at least 0")
    if separator is not None and not separator.strip(" ,"):
        raise UserError(f"keep_separator: {separator!r} must be a mark such as '|||'")

    def apply(text: str, change: Callable[[list[str]], list[str]]) -> str:
        if separator is not None and separator in text:
            parts = text.split(separator, 2)
            parts[1] = ", ".join(change(tags_of(parts[1])))
            return separator.join(parts)
        tags = tags_of(text)
        return ", ".join(tags[:keep_first] + change(tags[keep_first:]))

    return Transform(
        lambda text, bits: apply(text, lambda tags: change(tags, bits)),
        lambda text, _: apply(text, lambda tags: tags),
        separator=separator,
    )


_BRACKETS = {")": "(", "}": "{", "]": "["}


def tags_of(text: str) -> list[str]:
    """The tags of a text, stripped; empty ones are left out. Brackets without a partner, as in
    `:)`, and those behind a backslash are letters like any other."""
    opened: list[tuple[str, int]] = []
    commas: list[int] = []
    for at, character in enumerate(text):
        if at and text[at - 1] == "\\":
            continue
        if character in "({[":
            opened.append((character, len(commas)))
        elif opened and _BRACKETS.get(character) == opened[-1][0]:
            del commas[opened.pop()[1] :]
        elif character == ",":
            commas.append(at)
    ends = pairwise([-1, *commas, len(text)])
    tags = (text[left + 1 : right].strip() for left, right in ends)
    return [tag for tag in tags if tag]


def _expanded(text: str, choose: Callable[[list[str]], str]) -> str:
    """The text with one alternative of each `{a|b}`, inner ones first."""
    open_braces: list[list[str]] = [[""]]
    for piece in re.split(r"([{|}])", text):
        if piece == "{":
            open_braces.append([""])
        elif piece == "|" and len(open_braces) > 1:
            open_braces[-1].append("")
        elif piece == "}" and len(open_braces) > 1:
            choices = open_braces.pop()
            open_braces[-1][-1] += choose(choices) if len(choices) > 1 else f"{{{choices[0]}}}"
        else:
            open_braces[-1][-1] += piece
    return "{".join("|".join(choices) for choices in open_braces)


def without_separators(text: str, separators: Sequence[str]) -> str:
    """The text with commas where it had separators."""
    for separator in separators:
        if separator in text:
            parts = (part.strip(" ,") for part in text.split(separator))
            text = ", ".join(part for part in parts if part)
    return text


def _happens(p: float, bits: Bits) -> bool:
    return (int(bits.random_raw()) >> 11) * 2.0**-53 < p  # [0, 1) in steps of a float's precision


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise UserError(f"p: {p} must be from 0 to 1")
