"""Prompts: a caption, what is done to it, and the template that it is put into."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxft.data import templates
from jaxft.data.text_transforms import (
    CaptionDropout,
    Measure,
    Step,
    TemplateFill,
    Transform,
    without_separators,
)
from jaxft.data.text_transforms import tag_erase as erase
from jaxft.errors import UserError


class Recipe(NamedTuple):
    """How the prompts of a source are made."""

    templates: tuple[str, ...] = ("{caption}",)
    word_names: Mapping[str, str] = {}
    """What the fields of the templates stand for."""
    before: tuple[Transform, ...] = ()
    """What is done to the caption."""
    after: tuple[Transform, ...] = ()
    """What is done to the filled template."""
    opposites: Mapping[str, str] | None = None
    """What the fields stand for in negative prompts; None: there are none."""

    @property
    def negative(self) -> "Recipe | None":
        """How negative prompts are made, if there are any."""
        return None if self.opposites is None else self._replace(word_names=self.opposites)

    @property
    def sides(self) -> "list[Recipe]":
        """How prompts are made and, if there are any, negative prompts."""
        return [self, *([self.negative] if self.negative else [])]

    @property
    def draws(self) -> bool:
        """Whether more than the captions and the templates decides what a prompt is."""
        return any(transform.draws for transform in (*self.before, *self.after))


def recipe(
    lines: Sequence[str], word_names: Mapping[str, object], steps: Iterable[Step] = ()
) -> Recipe:
    """The recipe of templates, words and transforms; the template is filled where `TemplateFill`
    stands among these, or else behind them.

    Raises:
        UserError: a word that is not text, or a second `TemplateFill`.
    """
    steps = list(steps)
    dropped = [erase(step.p) for step in steps if isinstance(step, CaptionDropout)]
    steps = [step for step in steps if not isinstance(step, CaptionDropout)]
    fills = [index for index, step in enumerate(steps) if isinstance(step, TemplateFill)]
    if len(fills) > 1:
        raise UserError("text_transforms: TemplateFill stands there twice; keep one")
    for index in fills:
        fill = steps[index]
        if isinstance(fill, TemplateFill) and fill.word_names is not None:
            word_names = fill.word_names
    place = fills[0] if fills else len(steps)
    transforms = [step for step in steps if isinstance(step, Transform)]
    words, opposites = templates.sides(word_names)
    before, after = transforms[:place], transforms[place:] + dropped
    return Recipe(tuple(lines), words, tuple(before), tuple(after), opposites)


def make(captions: Sequence[str], how: Recipe, pick: int) -> str:
    """The prompt that the number `pick` chooses: one of the captions, what the transforms draw, and
    line `pick` of the templates, counted round and round."""
    several = len(captions) > 1
    text = captions[_bits(pick, 0).random_raw() % len(captions) if several else 0]
    return _written(text, how.templates[pick % len(how.templates)], how, pick)


def every(captions: Sequence[str], how: Recipe) -> list[str]:
    """All prompts that `make` can give by a recipe that draws nothing."""
    assert not how.draws, "there is no end to what is drawn"
    texts = (_written(text, line, how, 0) for text in captions for line in how.templates)
    return list(dict.fromkeys(texts))


def _written(text: str, template: str, how: Recipe, pick: int) -> str:
    """The prompt of one caption and one template."""
    for use, transform in enumerate(how.before, 1):
        text = transform.apply(text, _bits(pick, use))
    text = templates.fill(template, how.word_names, text)
    for use, transform in enumerate(how.after, len(how.before) + 1):
        text = transform.apply(text, _bits(pick, use))
    return _finished(text, how)


def longest(captions: Sequence[str], how: Recipe, measure: Measure) -> str:
    """The longest prompt that can come out; `how` is best one of `with_longest_templates`."""
    texts = list(captions)
    for transform in how.before:
        texts = [transform.longest(text, measure) for text in texts]
    texts = [templates.fill(one, how.word_names, text) for one in how.templates for text in texts]
    for transform in how.after:
        texts = [transform.longest(text, measure) for text in texts]
    return max((_finished(text, how) for text in texts), key=measure)


def with_longest_templates(how: Recipe, measure: Measure) -> Recipe:
    """The recipe with those templates alone that may give the longest prompt: of all that hold the
    caption equally often, one."""
    found: dict[int, str] = {}
    lengths = {line: measure(templates.fill(line, how.word_names, "x")) for line in how.templates}
    for line in sorted(how.templates, key=lambda line: lengths[line]):
        found[templates.count(line, "caption")] = line
    return how._replace(templates=tuple(found.values()))


def room(how: Recipe, most: int) -> int:
    """The characters of a caption with which each prompt has at most `most`, if nothing is done to
    it and all is ASCII; negative if there are none."""
    rooms = []
    for line in how.templates:
        uses, text = templates.count(line, "caption"), templates.fill(line, how.word_names, "x")
        left = most - len(text) + uses if text.isascii() else -1
        rooms.append(left // uses if uses else (sys.maxsize if left >= 0 else -1))
    return min(rooms)


def _bits(pick: int, use: int) -> np.random.Philox:
    """Bits for one use, of the captions or of a transform: the others do not change it."""
    return np.random.Philox(key=np.array([pick, use], np.uint64))


def _finished(text: str, how: Recipe) -> str:
    separators = [transform.separator for transform in (*how.before, *how.after)]
    return without_separators(text, [separator for separator in separators if separator])
