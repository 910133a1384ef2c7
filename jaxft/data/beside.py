"""Images that lie beside those of a source, in a folder of their own: masks, and what a ControlNet
sees. They are named as the images, whatever their suffix, and cover them, whatever their size."""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxft.data import images, listing
from jaxft.data.captions import shown, some
from jaxft.data.images import View
from jaxft.errors import UserError

KINDS = {"att_mask": "mask", "cond_dir": "conditioning image"}
"""Key of a source -> what lies in its folder."""

MAX_APART = 0.02
"""By which the shapes (width / height) of an image and of what lies beside it may differ."""


class File(NamedTuple):
    """What lies beside the image of one record."""

    path: Path
    digest: str
    """SHA-256 of it."""
    shown: images.Box = images.WHOLE
    """The part of the image that a mask shows; see `look`."""


class Found(NamedTuple):
    """What lies beside a source's images, each a file below a folder; what should be mended, and
    what a user should know."""

    root: Path
    names: list[str | None]
    problems: list[str]
    notices: list[str]


def find(root: Path, names: Sequence[str], *, recursive: bool, key: str) -> Found:
    """What lies in the folder `root` beside the image files `names`: files of the same path,
    whatever their suffix. `key`, of `KINDS`, names the folder in messages.

    Raises:
        UserError: there is no such folder, or nothing of these images in it.
    """
    found, kind = listing.find(root, recursive=recursive, key=key), KINDS[key]
    by_stem: dict[str, list[str]] = {}
    for name in found.names:
        by_stem.setdefault(_stem(name), []).append(name)
    problems = found.problems + [
        f"{shown(stem)}: several {kind}s: {some(several)}"
        for stem, several in by_stem.items()
        if len(several) > 1
    ]
    chosen = [by_stem.get(_stem(name), [None])[0] for name in names]
    if not any(chosen):
        raise UserError(f"{key}: {root} holds no {kind} that is named as one of the images")
    spare = sorted(set(found.names) - set(chosen))
    notices = [f"{kind}s that name no image: {some(spare)}"] if spare else []
    return Found(root, chosen, problems, notices)


class Look(NamedTuple):
    """What such a file holds."""

    width: int
    height: int
    digest: str
    shown: images.Box
    """Of a mask: the box around all that is brighter than its mean; all, where nothing is."""


def look(data: bytes) -> Look:
    """What a file holds.

    Raises:
        UserError: it is no image.
    """
    pixels = grey(data)
    return Look(*pixels.size, hashlib.sha256(data).hexdigest(), _shown(np.asarray(pixels)))


def misfit(found: Look, original: tuple[int, int], kind: str) -> str:
    """What is wrong if an image of the size `original` and what covers it differ in shape; else
    ''."""
    width, height = found[:2]
    if abs(width * original[1] / (height * original[0]) - 1) <= MAX_APART:
        return ""
    return (
        f"the {kind} is {width}x{height}, its image {original[0]}x{original[1]}: give both one "
        "shape"
    )


def pixels(
    image: Image.Image,
    original: tuple[int, int],
    size: tuple[int, int],
    view: View,
    *,
    scaled: bool,
) -> UInt8[np.ndarray, "h w 3"]:
    """The part of `image`, which covers one of the size `original`, that lies beside what is shown
    of that: scaled, cropped and mirrored in the same way.

    Args:
        image: in mode RGB.
        original: width and height of the image that it lies beside.
        size: width and height that the image is scaled to, or cropped to unless it is `scaled`.
        view: what is shown of the image.
        scaled: see size.
    """
    if scaled:
        return images.resize_and_crop(image, size, view, original)
    whole = image if image.size == original else image.resize(original)
    return images.crop_and_pad(whole, size, view)


def _shown(values: UInt8[np.ndarray, "h w"]) -> images.Box:
    bright = values > values.mean()
    if not bright.any():
        return images.WHOLE
    (left, right), (top, bottom) = (
        np.flatnonzero(bright.any(axis=axis))[[0, -1]].tolist() for axis in (0, 1)
    )
    height, width = values.shape
    return left / width, top / height, (right + 1) / width, (bottom + 1) / height


def grey(data: bytes) -> Image.Image:
    """A file in mode L; what is transparent is black."""
    return images.decode(data, (0, 0, 0)).convert("L")


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
