"""One folder of images as records: every image decoded once, every misfit reported at once."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from jaxft.builtin.names import resolve
from jaxft.data import captions, images, listing, masks, prompts, templates
from jaxft.data.buckets import VAE_STRIDE
from jaxft.data.captions import shown, some
from jaxft.data.images import CENTRE, View
from jaxft.data.text_transforms import Step
from jaxft.errors import UserError

_MOST_TOLD = 100
"""Problems in one message."""

Crop = Literal["center", "random", "mask"]
"""Which part of an image is kept: `mask`, what its mask shows."""


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
    crop: Crop = "center"
    flip: bool = False
    """Whether it is mirrored half of the time."""
    view: View = CENTRE
    """What is shown of it; see `framed`."""
    mask: masks.Mask | None = None
    """How much its parts count in the loss; None: all alike."""


class Source(NamedTuple):
    """The records of one folder, by name, `repeat` times over; and what its user should know."""

    records: list[Record]
    notices: list[str]


def index(
    img_root: str | Path,
    *,
    recursive: bool = False,
    min_size: int | None = None,
    caption_file: str | Path | captions.Place | None = None,
    caption_lines: captions.Several | None = None,
    missing_captions: captions.Missing = "error",
    prompt_template: str | Path | None = None,
    word_names: Mapping[str, object] | None = None,
    text_transforms: Sequence[Step] = (),
    bg_color: Sequence[int] = (255, 255, 255),
    att_mask: str | Path | None = None,
    crop: Crop = "center",
    flip: bool = False,
    repeat: int = 1,
) -> Source:
    """Reads a folder: decodes every image once, with a progress bar.

    Folders may be `builtin:NAME`; the keywords are the keys of a source in `configs/base.yaml`.

    Raises:
        UserError: lists every image that cannot be read or has no caption, and why.
    """
    lines = templates.load_templates(prompt_template) if prompt_template else ("{caption}",)
    recipe = prompts.recipe(lines, word_names or {}, text_transforms)
    color, root = _color(bg_color), resolve(img_root)
    if repeat < 1:
        raise UserError(f"repeat: {repeat} must be at least 1")
    mask_root = resolve(att_mask) if att_mask is not None else None
    found = listing.find(root, recursive=recursive, without=[mask_root] if mask_root else [])
    covers = _masks(mask_root, root, found.names, crop, recursive=recursive)
    texts = captions.load(
        _place(caption_file),
        found.names,
        root=root,
        several=caption_lines,
        missing=missing_captions,
    )
    looks = _look_at(root, found.names, color, covers.names, mask_root)
    problems = [*found.problems, *texts.problems, *covers.problems]
    told = _all_usable(img_root, problems, found.names, looks)
    notices = [*found.notices, *texts.notices, *covers.notices, *_what_they_are(told)]
    notices += _unused(recipe, caption_file is not None) + _too_small(told, min_size or 0)
    records = [
        Record(
            root / name,
            look.size,
            look.digest,
            text,
            recipe,
            color,
            crop=crop,
            flip=flip,
            mask=look.mask,
        )
        for (name, look), text in zip(told, texts.texts, strict=True)
        if min(look.size) >= (min_size or 0)
    ]
    return Source(records * repeat, [f"{img_root}: {notice}" for notice in notices])


def _masks(
    mask_root: Path | None, root: Path, names: Sequence[str], crop: Crop, *, recursive: bool
) -> masks.Found:
    if mask_root is None and crop == "mask":
        raise UserError("crop: mask keeps what a mask shows; name att_mask, or use center")
    if mask_root is None:
        return masks.Found([None] * len(names), [], [])
    if mask_root.resolve() == root.resolve():
        raise UserError(f"att_mask: {mask_root} is img_root: keep masks in a folder of their own")
    return masks.find(mask_root, names, recursive=recursive)


class _Look(NamedTuple):
    """An image file that can be used."""

    size: tuple[int, int]
    digest: str
    kind: images.Kind
    mask: masks.Mask | None


def _look_at(
    root: Path,
    names: Sequence[str],
    color: tuple[int, int, int],
    covers: Sequence[str | None],
    mask_root: Path | None,
) -> list[_Look | UserError]:
    """What becomes of each image, and of its mask below `mask_root`, when it is read."""

    def look(name: str, cover: str | None) -> _Look | UserError:
        try:
            data = _bytes(root / name)
            size, kind = images.decode(data, color).size, images.kind(data)
        except UserError as error:
            return error
        try:
            path = mask_root / cover if mask_root and cover else None
            mask = masks.check(_bytes(path), path, size) if path else None
        except UserError as error:
            return UserError(f"its mask {shown(str(cover))}: {error}")
        return _Look(size, hashlib.sha256(data).hexdigest(), kind, mask)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return list(
            tqdm(pool.map(look, names, covers), f"reading {root}", len(names), unit="image")
        )
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest


def _all_usable(
    img_root: str | Path,
    problems: Sequence[str],
    names: Sequence[str],
    looks: Sequence[_Look | UserError],
) -> list[tuple[str, _Look]]:
    """The images with their names; else one `UserError` with everything that must be mended."""
    problems = list(problems) + [
        f"{shown(name)}: {look}"
        for name, look in zip(names, looks, strict=True)
        if isinstance(look, UserError)
    ]
    if not problems:
        pairs = zip(names, looks, strict=True)
        return [(name, look) for name, look in pairs if isinstance(look, _Look)]
    more = len(problems) - _MOST_TOLD
    raise UserError(
        f"{img_root}: {len(problems)} of its images and captions cannot be used; mend or "
        + "remove these files:\n  "
        + "\n  ".join(problems[:_MOST_TOLD] + ([f"and {more} more"] if more > 0 else []))
    )


def _what_they_are(told: Sequence[tuple[str, _Look]]) -> list[str]:
    """Notices of images that are not what one would think."""
    misnamed = [
        f"{shown(name)} ({look.kind.format})"
        for name, look in told
        if Path(name).suffix.casefold() not in images.FORMATS[look.kind.format]
    ]
    several = [name for name, look in told if look.kind.frames]
    notices = []
    if misnamed:
        notices.append(f"images whose name says otherwise, and are used: {some(misnamed)}")
    if several:
        notices.append(f"of several frames the first is used: {some(several)}")
    return notices


def _too_small(told: Sequence[tuple[str, _Look]], min_size: int) -> list[str]:
    """A notice of the images that are left out."""
    small = [name for name, look in told if min(look.size) < min_size]
    if len(small) == len(told):
        raise UserError(f"min_size: all images have a side of fewer than {min_size} pixels")
    return [f"left out, smaller than min_size: {len(small)}: {some(small)}"] if small else []


def pixels(record: Record, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The record's view of its image at `size` (width, height): scaled to cover it, or as it is,
    and cropped.

    Raises:
        UserError: the file is gone, or another than when it was indexed.
    """
    data = _unchanged(record.path, record.digest)
    fit = images.resize_and_crop if record.scaled else images.crop_and_pad
    return fit(images.decode(data, record.bg_color), size, record.view)


def loss_weights(record: Record, size: tuple[int, int]) -> Float[np.ndarray, "h/8 w/8"]:
    """How much each latent of the record's view counts: 1, or as its mask says.

    Raises:
        UserError: the mask's file is gone, or another than when it was indexed.
    """
    if record.mask is None:
        return np.ones((size[1] // VAE_STRIDE, size[0] // VAE_STRIDE), np.float32)
    data = _unchanged(record.mask.path, record.mask.digest)
    return masks.weights(data, record.size, size, record.view, scaled=record.scaled)


def _unchanged(path: Path, digest: str) -> bytes:
    """The content of a file that was indexed."""
    try:
        data = _bytes(path)
    except UserError as error:
        raise UserError(f"{path}: {error} (it was there when this run began)") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{path} has changed since this run began: start it again")
    return data


def framed(record: Record, size: tuple[int, int], pick: int) -> Record:
    """The record with the view at `size` that a number of 64 bits chooses."""
    record = _settled(record, size)
    view = record.view
    if record.crop == "random":
        columns, rows = map(round, images.slack(record.size, size, scaled=record.scaled))
        left, top = (pick >> 1) % 2**31 % (columns + 1), (pick >> 32) % (rows + 1)
        view = View(left / columns if columns else 0.5, top / rows if rows else 0.5)
    return record._replace(view=view.mirror() if record.flip and pick % 2 else view)


def views(record: Record, size: tuple[int, int]) -> list[Record]:
    """The record with each of the views at `size` that `framed` can give it; none of them drawn at
    random."""
    assert record.crop != "random", "such views are not counted"
    record = _settled(record, size)
    return [record] + ([record._replace(view=record.view.mirror())] if record.flip else [])


def _settled(record: Record, size: tuple[int, int]) -> Record:
    """The record with the view that its mask asks for, if that says what is kept."""
    if record.crop != "mask" or record.mask is None:
        return record
    view = images.around(record.mask.shown, record.size, size, scaled=record.scaled)
    return record._replace(view=view)


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
        if path.stat().st_size > images.MAX_BYTES:
            raise UserError(f"more than {images.MAX_BYTES >> 20} MiB: scale it down")
        return path.read_bytes()
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None


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
