"""One folder of images as records: every image decoded once, every misfit reported at once."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxft.builtin.names import resolve
from jaxft.data import (
    beside,
    captions,
    files,
    holes,
    images,
    listing,
    looks,
    masks,
    prompts,
    templates,
)
from jaxft.data.buckets import VAE_STRIDE
from jaxft.data.captions import shown, some
from jaxft.data.files import Span
from jaxft.data.images import View
from jaxft.data.listing import Listing
from jaxft.data.records import Columns, Crop, Record, Records, Seen
from jaxft.data.text_transforms import Step
from jaxft.errors import UserError

_MOST_TOLD = 100
"""Problems in one message."""


class Source(NamedTuple):
    """The records of one folder, by name, `repeat` times over; and what its user should know."""

    records: Records
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
    cond_dir: str | Path | None = None,
    cond_column: str | None = None,
    inpaint_mask: str | Path | None = None,
    crop: Crop = "center",
    flip: bool = False,
    repeat: int = 1,
    kept: Path | None = None,
) -> Source:
    """Reads a folder, or tars: decodes every image once, with a progress bar.

    Folders may be `builtin:NAME`; the keywords are the keys of a source in `configs/base.yaml`.
    `kept` is the folder of an index of what was read before, see `data.index`: what has not changed
    since is not opened.

    Raises:
        UserError: lists every image that cannot be read or has no caption, and why.
    """
    lines = templates.load_templates(prompt_template) if prompt_template else ("{caption}",)
    recipe = prompts.recipe(lines, word_names or {}, text_transforms)
    if repeat < 1:
        raise UserError(f"repeat: {repeat} must be at least 1")
    folder = resolve(img_root)
    place, drawn = _place(caption_file), inpaint_mask == holes.RANDOM
    others = _others(folder, crop, att_mask, cond_dir, None if drawn else inpaint_mask)
    found = listing.find(folder, recursive=recursive, without=[*others.values()], kept=kept)
    found, sides = _beside(found, others, recursive, place, cond_column, kept)
    inside = place is not None and found.texts is not None and place.path == folder
    texts = captions.load(
        place,
        found.names,
        root=found.root,
        several=caption_lines,
        missing=missing_captions,
        members=found.texts if inside else None,
        kept=kept,
    )
    shared = Record(found.root, "", (0, 0), "", (), recipe, _color(bg_color), crop=crop, flip=flip)
    shared = shared._replace(hole=holes.RANDOM if drawn else None)
    columns = Columns(shared, {key: side.root for key, side in sides.items()}, repeat)
    problems = [*found.problems, *texts.problems]
    problems += [problem for side in sides.values() for problem in side.problems]
    told = _look(found, sides, texts.texts, columns, min_size or 0, kept)
    _check_usable(img_root, [*dict.fromkeys(problems + told.problems)])  # tables are read twice
    _check_any(columns, min_size)
    notices = [*found.notices, *texts.notices, *told.notices, *_unused(recipe, place is not None)]
    notices += [notice for side in sides.values() for notice in side.notices]
    return Source(Records([columns]), [f"{img_root}: {notice}" for notice in notices])


class _Told(NamedTuple):
    problems: list[str]
    notices: list[str]


def _look(
    found: Listing,
    sides: Mapping[str, beside.Found],
    texts: Sequence[captions.Lines],
    columns: Columns,
    min_size: int,
    kept: Path | None,
) -> _Told:
    """Looks at all images and what lies beside them; what is used goes to the columns."""
    problems, known, surprises = [], [], looks.Surprises()
    images_of = looks.at_images(found, kept, known)
    beside_of = [looks.beside_images(side, kept) for side in sides.values()]
    together = zip(found.names, images_of, *beside_of, strict=True)
    for place, (name, look, *seen) in enumerate(together):
        try:
            if isinstance(look, UserError):
                raise look
            covers = {
                key: _usable(key, look, side.names[place], one)
                for (key, side), one in zip(sides.items(), seen, strict=True)
            }
        except UserError as error:
            problems.append(f"{shown(name)}: {error}")
            continue
        if min(look.size) < min_size:
            surprises.leave_out(name)
        else:
            surprises.note(name, look)
            span = found.spans[place] if found.spans else None
            columns.append(name, look, texts[place], covers, span)
    return _Told(problems, surprises.notices + known)


def _others(folder: Path, crop: Crop, *given: str | Path | None) -> dict[str, Path]:
    """The folders, by key of `beside.KINDS`, of what lies beside the images."""
    pairs = zip(beside.KINDS, given, strict=True)
    others = {key: resolve(place) for key, place in pairs if place is not None}
    if "att_mask" not in others and crop == "mask":
        raise UserError("crop: mask keeps what a mask shows; name att_mask, or use center")
    for key, place in others.items():
        if place.resolve() == folder.resolve():
            raise UserError(
                f"{key}: {place} is img_root: keep {beside.KINDS[key]}s in a folder of their own"
            )
    return others


def _beside(
    found: Listing,
    others: Mapping[str, Path],
    recursive: bool,
    place: captions.Place | None,
    cond_column: str | None,
    kept: Path | None,
) -> tuple[Listing, dict[str, beside.Found]]:
    """What lies beside the images that were found; of these, without what a column says to be such
    an image. Only a mask may be missing."""
    sides = {}
    if cond_column is not None:
        if "cond_dir" in others or place is None or found.spans is not None:
            raise UserError(
                f"cond_column: {cond_column} is of a table, caption_file, of images in folders; it "
                "stands in place of cond_dir"
            )
        files, wrong = captions.column(place, found.names, cond_column, root=found.root, kept=kept)
        taken, pairs = {*files}, list(zip(found.names, files, strict=True))
        own = [(name, file) for name, file in pairs if name not in taken]
        found = found._replace(names=[name for name, _ in own])
        sides["cond_dir"] = beside.Found(found.root, [file for _, file in own], wrong, [])
    for key, root in others.items():
        sides[key] = beside.find(root, found.names, recursive=recursive, key=key)
    return found, {key: _complete(key, side, found.names) for key, side in sides.items()}


def _complete(key: str, side: beside.Found, names: Sequence[str]) -> beside.Found:
    """What lies beside images, with what there is to say of those that have nothing."""
    pairs = zip(names, side.names, strict=True)
    if not (without := [name for name, other in pairs if other is None]):
        return side
    if key == "att_mask":
        notice = f"images without mask, all of which counts: {some(without)}"
        return side._replace(notices=[notice, *side.notices])
    lacking = [f"{shown(name)}: no {beside.KINDS[key]}" for name in without]
    return side._replace(problems=side.problems + lacking)


def _usable(
    key: str, look: looks.Look, name: str | None, seen: beside.Look | UserError | None
) -> Seen:
    """What lies beside an image; raises UserError where it cannot be used."""
    if name is None or seen is None:
        return None
    kind = beside.KINDS[key]
    if isinstance(seen, UserError):
        raise UserError(f"its {kind} {shown(name)}: {seen}")
    if misfit := beside.misfit(seen, look.size, kind):
        raise UserError(f"its {kind} {shown(name)}: {misfit}")
    return name, seen


def _check_usable(img_root: str | Path, problems: list[str]) -> None:
    """One `UserError` with everything that must be mended."""
    if not problems:
        return
    told, more = problems[:_MOST_TOLD], len(problems) - _MOST_TOLD
    if more > 0:
        told.append(f"and {more} more")
    if any(problem.endswith(": no caption") for problem in problems):
        told.append("(missing_captions: empty trains those without a caption with an empty one)")
    raise UserError(
        f"{img_root}: {len(problems)} of its images and captions cannot be used; mend or "
        + "remove these files:\n  "
        + "\n  ".join(told)
    )


def _check_any(columns: Columns, min_size: int | None) -> None:
    if not len(columns):
        raise UserError(f"min_size: all images have a side of fewer than {min_size} pixels")


def pixels(record: Record, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The record's view of its image at `size` (width, height): scaled to cover it, or as it is,
    and cropped.

    Raises:
        UserError: the file is gone, or another than when it was indexed.
    """
    data = _unchanged(record.path, record.digest, record.span)
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


def conditioning_pixels(record: Record, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """What a ControlNet sees beside `pixels`: the same part of the record's conditioning image.

    Raises:
        UserError: its file is gone, or another than when it was indexed.
    """
    assert record.cond is not None, "is asked for where there is one"
    data = _unchanged(record.cond.path, record.cond.digest)
    image = images.decode(data, record.bg_color)
    return beside.pixels(image, record.size, size, record.view, scaled=record.scaled)


def hole(record: Record, size: tuple[int, int], pick: int) -> UInt8[np.ndarray, "h w"]:
    """What of `pixels` is painted anew, 1 or 0: as the record's mask says, or a number of 64 bits.

    Raises:
        UserError: the mask's file is gone, or another than when it was indexed.
    """
    assert record.hole is not None, "is asked for where there is one"
    if isinstance(record.hole, str):
        return holes.drawn(size, pick)
    data = _unchanged(record.hole.path, record.hole.digest)
    return holes.of_mask(data, record.size, size, record.view, scaled=record.scaled)


def _unchanged(path: Path, digest: str, span: Span | None = None) -> bytes:
    """The content of a file that was indexed."""
    try:
        data = files.read(path, images.MAX_BYTES, span)
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
