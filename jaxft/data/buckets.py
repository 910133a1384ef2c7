"""Buckets: images of like shape share one size.

Sizes are (width, height) in pixels. The kinds of buckets are HCP-Diffusion's, with its features
and the seed of its KMeans; it rounds to multiples of 8, here 64 is the default (fewer shapes, and
levels of the UNet that halve evenly). Centres that round to one size are one bucket. Which size an
image gets follows from its own size and the set's, so equal sizes never part.

Every kind takes `known`: sizes that are there already. Then nothing is fitted, and each image gets
the nearest of them, as that kind measures.

With `no_upscale` no image is enlarged: where an image is smaller than its size, the size is made
small until the image covers it, and rounded down to the step.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from jaxft.errors import UserError

VAE_STRIDE = 8
"""Pixels to one latent, each way: sizes are multiples of it."""

Size = tuple[int, int]
Sizes = Int[np.ndarray, "n 2"]
Originals = Sequence[Size] | Sizes
"""Widths and heights of images."""
Points = Float[np.ndarray, "n f"]


class Buckets(NamedTuple):
    """Sizes, and the index of each image's size."""

    sizes: list[Size]
    assignment: Int[np.ndarray, " n"]
    scaled: bool = True
    """Whether an image is scaled to cover its size; else it keeps its pixels, is cropped where it
    is larger and padded where it is smaller."""
    num_small: int = 0
    """Images that `no_upscale` has given a smaller size."""


def ratio_buckets_from_files(
    sizes: Originals,
    *,
    known: Sequence[Size] = (),
    target_area: float | Sequence[float] = 640 * 640,
    step_size: int = 64,
    num_bucket: int = 10,
    no_upscale: bool = False,
) -> Buckets:
    """At most `num_bucket` aspect ratios, fitted to the images' own: KMeans on log2(width/height).

    Each ratio has a size of about `target_area` pixels. Of several areas an image gets the largest
    that it fills without being enlarged, else the smallest.

    Raises:
        UserError: more buckets than images, or options that give no usable size.
    """
    areas, images = _checked_areas(target_area, step_size), _array(sizes)
    if known:
        chosen = _nearest_ratios(images, _by_area(known, areas, no_upscale))
    else:
        centres, labels = _clusters(_log_ratios(images)[:, None], num_bucket, tol=1e-3)
        ratios = 2.0 ** centres[:, 0]
        chosen = _largest_filled(
            images, [_sizes_of(ratios, area, step_size)[labels] for area in areas]
        )
    return _buckets(images, chosen, "target_area", least=step_size if no_upscale else None)


def ratio_buckets_from_ratios(
    sizes: Originals,
    *,
    known: Sequence[Size] = (),
    target_area: float | Sequence[float] = 640 * 640,
    step_size: int = 64,
    num_bucket: int = 10,
    ratio_max: float = 4.0,
    ratio_min: float | None = None,
    no_upscale: bool = False,
) -> Buckets:
    """`num_bucket` sizes that do not depend on the images; each gets that of the nearest log-ratio.

    Of all sizes in steps of `step_size` those of about `target_area` pixels are clustered by ratio.
    Ratios (width/height) go from `ratio_min` to `ratio_max`; without `ratio_min` from 1/ratio_max,
    a step more or less. Several areas as in `ratio_buckets_from_files`.

    Raises:
        UserError: options that give too few sizes.
    """
    areas, images = _checked_areas(target_area, step_size), _array(sizes)
    least = ratio_max if ratio_min is None else ratio_min
    if not (1 <= ratio_max < math.inf and 0 < least <= ratio_max):
        raise UserError(
            f"ratio_max: {ratio_max} must be at least 1, and ratio_min ({ratio_min}) between 0 and "
            "ratio_max"
        )
    tables = (
        _by_area(known, areas, no_upscale)
        if known
        else [_grid_sizes(area, step_size, num_bucket, ratio_max, ratio_min) for area in areas]
    )
    chosen = _nearest_ratios(images, tables)
    return _buckets(images, chosen, "target_area", least=step_size if no_upscale else None)


def size_buckets_from_files(
    sizes: Originals,
    *,
    known: Sequence[Size] = (),
    step_size: int = 64,
    num_bucket: int = 10,
) -> Buckets:
    """At most `num_bucket` sizes, fitted to the images' own; images are not scaled.

    Raises:
        UserError: more buckets than images, or images smaller than half a step.
    """
    _check_step(step_size)
    images = _array(sizes)

    def rounded(centres: Points) -> Sizes:
        return _multiples(centres, step_size)

    chosen = _fitted(images, known, lambda of: of.astype(float), rounded, num_bucket)
    return _buckets(images, chosen, "step_size", scaled=False)


def ratio_size_buckets_from_files(
    sizes: Originals,
    *,
    known: Sequence[Size] = (),
    max_area: float = 640 * 640,
    step_size: int = 64,
    num_bucket: int = 10,
    no_upscale: bool = False,
) -> Buckets:
    """At most `num_bucket` sizes, fitted to the images' ratios and areas, these up to `max_area`.

    Raises:
        UserError: more buckets than images, or options that give no usable size.
    """
    _check_step(step_size)
    _check_area("max_area", max_area)
    images = _array(sizes)

    def features(of: Sizes) -> Points:
        areas = np.minimum(of.prod(axis=1), max_area)
        return np.stack([_log_ratios(of), np.log2(areas)], axis=1)

    def rounded(centres: Points) -> Sizes:
        return _sizes_of(2.0 ** centres[:, 0], 2.0 ** centres[:, 1], step_size)

    chosen = _fitted(images, known, features, rounded, num_bucket)
    return _buckets(images, chosen, "max_area", least=step_size if no_upscale else None)


def long_edge_buckets_from_files(
    sizes: Originals,
    *,
    target_edge: int,
    known: Sequence[Size] = (),
    step_size: int = 64,
    num_bucket: int = 10,
    no_upscale: bool = False,
) -> Buckets:
    """At most `num_bucket` sizes, fitted to the images scaled to a long edge of `target_edge`.

    Raises:
        UserError: more buckets than images, or options that give no usable size.
    """
    _check_step(step_size)
    if not VAE_STRIDE <= target_edge <= 8192:
        raise UserError(f"target_edge: {target_edge} must be pixels, from {VAE_STRIDE} to 8192")
    images = _array(sizes)

    def features(of: Sizes) -> Points:
        return np.round(of * (target_edge / of.max(axis=1, keepdims=True)))

    def rounded(centres: Points) -> Sizes:
        return _multiples(centres, step_size)

    chosen = _fitted(images, known, features, rounded, num_bucket)
    return _buckets(images, chosen, "target_edge", least=step_size if no_upscale else None)


def fixed_bucket(
    sizes: Originals,
    *,
    known: Sequence[Size] = (),
    target_size: int | Sequence[int] = 512,
) -> Buckets:
    """One size, a side or (width, height), for all images; `known` can only be the same.

    Raises:
        UserError: not one or two multiples of 8 from 8 to 8192.
    """
    del known
    pair = [target_size] * 2 if isinstance(target_size, int) else list(target_size)
    if len(pair) != 2 or any(side not in range(VAE_STRIDE, 8193, VAE_STRIDE) for side in pair):
        raise UserError(
            f"target_size: {target_size} must be a side or [width, height], multiples of "
            f"{VAE_STRIDE} up to 8192"
        )
    return Buckets([(int(pair[0]), int(pair[1]))], np.zeros(len(sizes), dtype=int))


# Options, clusters, sizes -----------------------------------------------------------------------


def _check_step(step: int) -> None:
    if step < VAE_STRIDE or step % VAE_STRIDE:
        raise UserError(f"step_size: {step} must be a multiple of {VAE_STRIDE}")


def _check_area(option: str, area: float) -> None:
    if not 32 * 32 <= area <= 4096 * 4096:
        raise UserError(f"{option}: {area:g} must be a number of pixels, such as 512*512")


def _checked_areas(target_area: float | Sequence[float], step: int) -> list[float]:
    """The areas, from small to large."""
    _check_step(step)
    given = [target_area] if isinstance(target_area, int | float) else target_area
    areas = sorted({float(area) for area in given})
    if not areas:
        raise UserError("target_area: an empty list; name at least one area, such as 512*512")
    for area in areas:
        _check_area("target_area", area)
    return areas


def _array(sizes: Originals) -> Sizes:
    return np.array(sizes, dtype=int).reshape(-1, 2)


def _log_ratios(sizes: Sizes) -> Float[np.ndarray, " n"]:
    return np.log2(sizes[:, 0] / sizes[:, 1])


def _clusters(
    points: Points, num_bucket: int, *, tol: float = 1e-4
) -> tuple[Points, Int[np.ndarray, " n"]]:
    """Centres, and each point's."""
    if not 1 <= num_bucket <= len(points):
        raise UserError(
            f"num_bucket: {num_bucket} buckets for {len(points)} images; choose 1 to {len(points)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer shapes than buckets
        fitted = KMeans(num_bucket, random_state=3407, tol=tol).fit(points)
    return fitted.cluster_centers_, np.asarray(fitted.labels_)


def _fitted(
    images: Sizes,
    known: Sequence[Size],
    features: Callable[[Sizes], Points],
    sizes_of: Callable[[Points], Sizes],
    num_bucket: int,
) -> Sizes:
    """Each image's size, by clusters of features or by the nearest features of known sizes."""
    if not known:
        centres, labels = _clusters(features(images), num_bucket)
        return sizes_of(centres)[labels]
    table = _array(known)
    apart = features(images)[:, None] - features(table)
    return table[(apart**2).sum(axis=2).argmin(axis=1)]


def _multiples(sides: Points, step: int) -> Sizes:
    """Sides to the nearest multiples of the step, half to even."""
    return (np.round(sides / step) * step).astype(int)


def _sizes_of(ratios: Float[np.ndarray, " k"], areas: Any, step: int) -> Sizes:
    """Sizes of ratios at areas, one or one for each."""
    heights = np.sqrt(areas / ratios)
    return _multiples(np.stack([heights * ratios, heights], axis=1), step)


def _grid_sizes(
    area: float, step: int, count: int, ratio_max: float, ratio_min: float | None
) -> Sizes:
    """`count` sizes of different ratios: of the 3 · count nearest to the area, the median ones."""
    extreme = max(ratio_max, 1 / ratio_min) if ratio_min else ratio_max
    low = int(math.sqrt(area / extreme))
    high = int(extreme * low)
    sides = range(max(low // step, 1) * step, high // step * step + 1, step)
    grid = _array([(width, height) for width in sides for height in sides])
    if ratio_min is not None:
        ratios = grid[:, 0] / grid[:, 1]
        grid = grid[(ratio_min <= ratios) & (ratios <= ratio_max)]
    if not 1 <= count <= len(grid):
        raise UserError(
            f"num_bucket: {count} buckets, and {len(grid)} sizes near {area:g} pixels in steps of "
            f"{step}; choose fewer buckets, other ratios or a smaller step_size"
        )
    nearest = np.argsort(np.abs(grid.prod(axis=1) - area), kind="stable")
    grid = grid[nearest[: 3 * count]]
    ratios = _log_ratios(grid)
    _, labels = _clusters(ratios[:, None], count)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return grid[[m[np.abs(ratios[m] - np.median(ratios[m])).argmin()] for m in members]]


def _by_area(known: Sequence[Size], areas: Sequence[float], no_upscale: bool) -> list[Sizes]:
    """Known sizes, those of each area together; an area that none is near has no table.

    With `no_upscale` sizes far below the areas were made for small images, and are left out.
    """
    table = _array(known)
    large = table.prod(axis=1) > areas[0] * 2 / 3
    if no_upscale and large.any():
        table = table[large]
    apart = np.abs(np.log2(table.prod(axis=1))[:, None] - np.log2(areas))
    groups = [table[apart.argmin(axis=1) == index] for index in range(len(areas))]
    return [group for group in groups if len(group)]


def _nearest_ratios(images: Sizes, tables: Sequence[Sizes]) -> Sizes:
    """Each image's size in that of the tables, from small to large areas, whose area it fills."""
    apart = [np.abs(_log_ratios(table) - _log_ratios(images)[:, None]) for table in tables]
    nearest = [table[a.argmin(axis=1)] for table, a in zip(tables, apart, strict=True)]
    return _largest_filled(images, nearest)


def _largest_filled(images: Sizes, choices: Sequence[Sizes]) -> Sizes:
    """Of each image's choices, from small to large, the last that is not larger than it."""
    chosen = choices[0]
    for choice in choices[1:]:
        chosen = np.where((choice <= images).all(axis=1, keepdims=True), choice, chosen)
    return chosen


def _buckets(
    images: Sizes, chosen: Sizes, option: str, *, scaled: bool = True, least: int | None = None
) -> Buckets:
    """Buckets of each image's size; equal images have one, whatever KMeans' rounding says. With a
    step, the `least` change of a size, none enlarges its images."""
    _, first, same = np.unique(images, axis=0, return_index=True, return_inverse=True)
    chosen = chosen[first][same.reshape(-1)]
    small = (chosen > images).any(axis=1, keepdims=True) & (least is not None)
    if least is not None:
        shrunk = chosen * (images / chosen).min(axis=1, keepdims=True)
        # A side that the image gives exactly may come out a little less than whole.
        chosen = np.where(small, np.floor(shrunk / least + 1e-9).astype(int) * least, chosen)
    empty = np.flatnonzero(chosen.min(axis=1) < VAE_STRIDE)
    if empty.size:
        worst = max(empty.tolist(), key=lambda image: abs(_log_ratios(images[[image]])[0]))
        width, height = images[worst].tolist()
        raise UserError(
            f"{option}: nothing is left of an image of {width}x{height} when its sides are "
            f"rounded to step_size; crop or remove that image, or change {option}"
        )
    kept, assignment = np.unique(chosen, axis=0, return_inverse=True)
    sizes = [(width, height) for width, height in kept.tolist()]
    return Buckets(sizes, assignment.reshape(-1), scaled, int(small.sum()))


class Fit(NamedTuple):
    """What becomes of each image at the size of its bucket."""

    scale: Float[np.ndarray, " n"]
    """By which its sides are multiplied."""
    lost: Float[np.ndarray, " n"]
    """The share of it that is cropped away, 0 to 1."""
    padding: Float[np.ndarray, " n"]
    """The share of the training image that is padding."""


def fit(sizes: Originals, buckets: Buckets) -> Fit:
    """How well the buckets fit the images."""
    images, wanted = _array(sizes), _array(buckets.sizes)[buckets.assignment]
    if not buckets.scaled:
        kept = np.minimum(wanted, images).prod(axis=1)
        lost = 1 - kept / images.prod(axis=1)
        return Fit(np.ones(len(images)), lost, 1 - kept / wanted.prod(axis=1))
    scale = (wanted / images).max(axis=1)
    kept = np.minimum(wanted / scale[:, None], images).prod(axis=1)  # in the image's own pixels
    return Fit(scale, 1 - kept / images.prod(axis=1), np.zeros(len(images)))
