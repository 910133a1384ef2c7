"""Attention masks: grey images that say how much each part of an image counts in the loss.

They lie in a folder of their own, named as the images. A mask lies over its whole image, whatever
its size in pixels; a dimmed part counts less and a bright one more, by HCP-Diffusion's curve.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxft.data import images, listing
from jaxft.data.buckets import VAE_STRIDE
from jaxft.data.captions import shown, some
from jaxft.data.images import View
from jaxft.errors import UserError

MAX_APART = 0.02
"""By which the shapes (width / height) of an image and its mask may differ."""


class Mask(NamedTuple):
    """A file, of the image of one record."""

    path: Path
    digest: str
    """SHA-256 of it."""
    shown: images.Box = images.WHOLE
    """The part of the image that a crop should keep; see `_shown`."""


class Found(NamedTuple):
    """The masks of a source's images, each a file below the folder; what should be mended, and
    what a user should know."""

    names: list[str | None]
    problems: list[str]
    notices: list[str]


def find(root: Path, names: Sequence[str], *, recursive: bool) -> Found:
    """The masks in the folder `root` of the image files `names`: those of the same path, whatever
    their suffix.

    Raises:
        UserError: there is no such folder, or no mask of these images in it.
    """
    found = listing.find(root, recursive=recursive, key="att_mask")
    by_stem: dict[str, list[str]] = {}
    for name in found.names:
        by_stem.setdefault(_stem(name), []).append(name)
    problems = found.problems + [
        f"{shown(stem)}: several masks: {some(several)}"
        for stem, several in by_stem.items()
        if len(several) > 1
    ]
    chosen = [by_stem.get(_stem(name), [None])[0] for name in names]
    without = [name for name, mask in zip(names, chosen, strict=True) if mask is None]
    if len(without) == len(names):
        raise UserError(f"att_mask: {root} holds no mask that is named as one of the images")
    spare = sorted(set(found.names) - set(chosen))
    notices = []
    if without:
        notices.append(f"images without mask, all of which counts: {some(without)}")
    if spare:
        notices.append(f"masks that name no image: {some(spare)}")
    return Found(chosen, problems, notices)


class Look(NamedTuple):
    """What a mask's file holds."""

    width: int
    height: int
    digest: str
    shown: images.Box


def look(data: bytes) -> Look:
    """What the file of a mask holds.

    Raises:
        UserError: it is no image.
    """
    grey = _grey(data)
    return Look(*grey.size, hashlib.sha256(data).hexdigest(), _shown(np.asarray(grey)))


def misfit(found: Look, original: tuple[int, int]) -> str:
    """What is wrong if an image of the size `original` and its mask differ in shape; else ''."""
    width, height = found[:2]
    if abs(width * original[1] / (height * original[0]) - 1) <= MAX_APART:
        return ""
    return (
        f"the mask is {width}x{height}, its image {original[0]}x{original[1]}: give both one shape"
    )


def _shown(grey: UInt8[np.ndarray, "h w"]) -> images.Box:
    """The box around all that is brighter than the mask's mean; all, where nothing is."""
    bright = grey > grey.mean()
    if not bright.any():
        return images.WHOLE
    (left, right), (top, bottom) = (
        np.flatnonzero(bright.any(axis=axis))[[0, -1]].tolist() for axis in (0, 1)
    )
    height, width = grey.shape
    return left / width, top / height, (right + 1) / width, (bottom + 1) / height


def weights(
    data: bytes, original: tuple[int, int], size: tuple[int, int], view: View, *, scaled: bool
) -> Float[np.ndarray, "h w"]:
    """How much each latent counts, [size[1] / 8, size[0] / 8]: the mean over its pixels.

    Args:
        data: the mask's file.
        original: width and height of the image.
        size: width and height that the image is scaled to, or cropped to unless it is `scaled`.
        view: what is shown of the image.
        scaled: see size. What is padded does not count.
    """
    mask = _grey(data)
    if not scaled:
        kept = images.crop_and_pad(mask.resize(original).convert("RGB"), size, view)
        shown = _curve(kept[..., 0])
        rows, columns = (side // VAE_STRIDE for side in shown.shape)
        return shown.reshape(rows, VAE_STRIDE, columns, VAE_STRIDE).mean(axis=(1, 3))
    left, top, right, bottom = images.covered(original, size, view)
    x, y = mask.width / original[0], mask.height / original[1]
    box = (left * x, top * y, min(right * x, mask.width), min(bottom * y, mask.height))
    latents = (size[0] // VAE_STRIDE, size[1] // VAE_STRIDE)
    fitted = Image.fromarray(_curve(np.asarray(mask))).resize(latents, Image.Resampling.BOX, box)
    pixels = np.asarray(fitted)
    return np.ascontiguousarray(pixels[:, ::-1]) if view.mirrored else pixels


def _curve(grey: np.ndarray) -> Float[np.ndarray, "h w"]:
    """HCP-Diffusion's weight of a grey value: 0 is 0, 127 is 1, 255 is 5, straight between."""
    return np.interp(grey, [0, 127, 255], [0, 1, 5]).astype(np.float32)


def _grey(data: bytes) -> Image.Image:
    """A mask in mode L; what is transparent is black."""
    return images.decode(data, (0, 0, 0)).convert("L")


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
