"""One folder of images as records: every image decoded once, every misfit reported at once."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from jaxft.builtin.names import resolve
from jaxft.data import captions, images, prompts, templates
from jaxft.data.text_transforms import Step
from jaxft.errors import UserError

_MOST_TOLD = 100
"""Problems in one message."""


class Record(NamedTuple):
    """One image of a data set, with all that is needed to make its pixels and its prompt."""

    path: Path
    size: tuple[int, int]
    """Width and height, upright."""
    digest: str
    """SHA-256 of the file."""
    captions: tuple[str, ...]
    """One, or several of which one is drawn each time."""
    recipe: prompts.Recipe
    """What its prompts are made by."""
    bg_color: tuple[int, int, int]
    scaled: bool = True
    """Whether it is scaled to cover the size of its bucket; else it is cropped and padded."""


class Source(NamedTuple):
    """The records of one folder, by name, `repeat` times over; and what its user should know."""

    records: list[Record]
    notices: list[str]


def index(
    img_root: str | Path,
    *,
    caption_file: str | Path | captions.Place | None = None,
    caption_lines: captions.Several | None = None,
    prompt_template: str | Path | None = None,
    word_names: Mapping[str, object] | None = None,
    text_transforms: Sequence[Step] = (),
    bg_color: Sequence[int] = (255, 255, 255),
    repeat: int = 1,
) -> Source:
    """Reads a folder (not its subfolders): decodes every image once, with a progress bar.

    Without `prompt_template` the prompt is the caption. Folders may be `builtin:NAME`.

    Raises:
        UserError: lists every image that cannot be read or has no caption, and why.
    """
    lines = templates.load_templates(prompt_template) if prompt_template else ("{caption}",)
    recipe = prompts.recipe(lines, word_names or {}, text_transforms)
    color = _color(bg_color)
    if repeat < 1:
        raise UserError(f"repeat: {repeat} must be at least 1")
    paths, notices = _listing(resolve(img_root))
    texts = captions.load(
        _place(caption_file),
        [path.name for path in paths],
        root=resolve(img_root),
        several=caption_lines,
    )
    problems = list(texts.problems)

    def look(path: Path) -> tuple[tuple[int, int], str] | UserError:
        try:
            data = _bytes(path)
            height, width = images.read(data, color).shape[:2]
        except UserError as error:
            return error
        return (width, height), hashlib.sha256(data).hexdigest()

    records = []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        looks = tqdm(pool.map(look, paths), f"reading {img_root}", len(paths), unit="image")
        for path, lines, found in zip(paths, texts.texts, looks, strict=True):
            if isinstance(found, UserError):
                problems.append(f"{path.name}: {found}")
            else:
                records.append(Record(path, *found, lines, recipe, color))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    if problems:
        more = len(problems) - _MOST_TOLD
        raise UserError(
            f"{img_root}: {len(problems)} of its images and captions cannot be used; mend or "
            + "remove these files:\n  "
            + "\n  ".join(problems[:_MOST_TOLD] + ([f"and {more} more"] if more > 0 else []))
        )
    notices += texts.notices + _unused(recipe, caption_file is not None)
    return Source(records * repeat, [f"{img_root}: {notice}" for notice in notices])


def pixels(record: Record, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The record's image at `size` (width, height): scaled to cover it, or as it is, and cropped.

    Raises:
        UserError: the file is gone, or another than when it was indexed.
    """
    try:
        data = _bytes(record.path)
    except UserError as error:
        raise UserError(f"{record.path}: {error} (it was there when this run began)") from None
    if hashlib.sha256(data).hexdigest() != record.digest:
        raise UserError(f"{record.path} has changed since this run began: start it again")
    fit = images.resize_and_crop if record.scaled else images.crop_and_pad
    return fit(images.read(data, record.bg_color), size)


def prompt(record: Record, pick: int) -> str:
    """The record's prompt that a number chooses: 0, 1 … are the lines of the prompt template."""
    return prompts.make(record.captions, record.recipe, pick)


def negative(record: Record, pick: int) -> str:
    """The prompt that stands against `prompt` with the same number: the same, but with the negative
    words of pairs."""
    return prompts.make(record.captions, record.recipe.negative or record.recipe, pick)


def _place(caption_file: str | Path | captions.Place | None) -> captions.Place | None:
    if caption_file is None or isinstance(caption_file, captions.Place):
        return caption_file and caption_file._replace(path=resolve(caption_file.path))
    return captions.Place(resolve(caption_file))


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise UserError("no such file" if not path.exists() else "not a file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None


def _listing(folder: Path) -> tuple[list[Path], list[str]]:
    """The image files of a folder by name, and a notice of the others."""
    if not folder.is_dir():
        raise UserError(f"img_root: the folder {folder} does not exist")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    paths = [path for path in entries if path.suffix.casefold() in images.SUFFIXES]
    if not paths:
        nested = " (subfolders are not searched)" if any(path.is_dir() for path in entries) else ""
        raise UserError(
            f"img_root: {folder} holds no images{nested}; their names end in "
            + ", ".join(sorted(images.SUFFIXES))
        )
    known = images.SUFFIXES | captions.FILES
    others = Counter(
        path.suffix.casefold() or "without suffix"
        for path in entries
        if path.suffix.casefold() not in known and not path.is_dir()
    )
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    return paths, [f"ignored files: {ignored}"] if ignored else []


def _color(bg_color: Sequence[int]) -> tuple[int, int, int]:
    if len(bg_color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in bg_color):
        raise UserError(f"bg_color: {bg_color} must be three whole numbers from 0 to 255")
    red, green, blue = bg_color
    return red, green, blue


def _unused(recipe: prompts.Recipe, captioned: bool) -> list[str]:
    """Notices of what the template leaves out."""
    fields = templates.fields(recipe.templates)
    notices = []
    if captioned and "caption" not in fields:
        notices.append("captions are not used: the prompt template has no {caption}")
    if spare := [name for name in recipe.word_names if name not in fields and name != "caption"]:
        notices.append(f"word_names not used by the prompt template: {', '.join(spare)}")
    if not captioned and any(transform.draws for transform in recipe.before):
        notices.append("text_transforms before TemplateFill have no captions to change")
    return notices
