"""What training minimises."""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.diffusion import noise as noises
from jaxft.diffusion.importance import Recipe
from jaxft.shapes import Latents, Timesteps

Error = Callable[[Array], Array]
"""The error of each value, from its difference to what is wanted."""


class Width(NamedTuple):
    """Where squares become straight lines, at each timestep."""

    schedule: str
    """A name in `weighting.WIDTHS`."""
    least: float
    power: int
    """By which power of it errors of differences in its units are multiplied."""


class Criterion(NamedTuple):
    """An error, and the weighting of timesteps that belongs to it."""

    error: Error = jnp.square
    weighting: str | None = None
    """A name in `weighting.WEIGHTINGS`."""
    options: Mapping[str, float] = {}
    """Of the weighting."""
    width: Width | None = None
    """Of the error, where it depends on the timestep."""
    ssim: float = 0.0
    """How much `ssim.dissimilarity` is added."""


class Loss(NamedTuple):
    """How predictions are judged, and at which noise."""

    error: Error = jnp.square
    weights: Float[np.ndarray, " T"] | None = None
    """Of the timesteps; None: 1 for each."""
    units: Float[np.ndarray, " T"] | None = None
    """Of the timesteps: what differences are divided by before they are judged; None: 1."""
    ssim: float = 0.0
    """How much `ssim.dissimilarity` of the clean latents is added."""
    normalise_mask: bool = False
    """Whether an image's error is divided by the mean of its mask."""
    chances: Float[np.ndarray, " T"] | None = None
    """Of the timesteps to be drawn; None: all alike."""
    importance: Recipe | None = None
    """How chances follow from the losses so far; None: they do not."""
    low_discrepancy: bool = False
    """Whether the timesteps of a batch are spread evenly over their chances."""
    noise: noises.Recipe = noises.NORMAL
    guidance: Float[np.ndarray, " T"] | None = None
    """Of the timesteps: the scale of guidance at which predictions are judged (`guidance.scales`);
    None: none."""


PLAIN = Loss()


RANGES = 4
"""Into how many ranges timesteps are divided where losses are told by them."""


def image_errors(
    predicted: Latents,
    wanted: Latents,
    *,
    error: Error = jnp.square,
    scale: Float[Array, " b"] | None = None,
    unit: Float[Array, " b"] | None = None,
    mask: Float[Array, "b h w"] | None = None,
    normalise_mask: bool = False,
) -> Float[Array, " b"]:
    """Each image's mean error, float32.

    Args:
        predicted: by the network.
        wanted: its target.
        error: of each value.
        scale: by which an image's error is multiplied; it is not divided by the sum of them.
        unit: what an image's differences are divided by.
        mask: by which the errors of each place are multiplied.
        normalise_mask: whether an image's error is then divided by the mean of its mask.
    """
    difference = predicted.astype(jnp.float32) - wanted.astype(jnp.float32)
    if unit is not None:
        difference = difference / unit[:, None, None, None]
    each = of_each(error(difference), mask, normalise_mask=normalise_mask)
    return each if scale is None else each * scale


def of_each(
    errors: Float[Array, "b h w c"],
    mask: Float[Array, "b h w"] | None = None,
    *,
    normalise_mask: bool = False,
) -> Float[Array, " b"]:
    """Mean error of each image, under its mask."""
    if mask is None:
        return jnp.mean(errors, axis=(1, 2, 3))
    each, share = jnp.mean(errors * mask[..., None], axis=(1, 2, 3)), jnp.mean(mask, axis=(1, 2))
    return each / jnp.where(share > 0, share, 1) if normalise_mask else each


def mean(each: Float[Array, " b"], weight: Float[Array, " b"]) -> jax.Array:
    """Mean of images' errors, each counted by its weight; float32 scalar.

    An image of weight 0 (one that only fills up a batch) changes neither value nor gradient. If
    all weights are 0 the mean is 0.
    """
    total = jnp.sum(weight)
    return jnp.sum(weight * each) / jnp.where(total > 0, total, 1)


def by_range(
    each: Float[Array, " b"],
    weight: Float[Array, " b"],
    timesteps: Timesteps,
    num_timesteps: int,
) -> Float[Array, "2 r"]:
    """Of each range of timesteps the sum of images' errors, each counted by its weight, and the sum
    of the weights; see `range_names`."""
    which = timesteps * RANGES // num_timesteps
    return jax.vmap(lambda values: jax.ops.segment_sum(values, which, RANGES))(
        jnp.stack([weight * each, weight])
    )


def range_names(num_timesteps: int) -> list[str]:
    """The first and the last timestep of each range, `0-249`."""
    ends = [-(-number * num_timesteps // RANGES) for number in range(RANGES + 1)]
    return [f"{first}-{end - 1}" for first, end in itertools.pairwise(ends)]


def huber(delta: float = 1.0, schedule: str = "constant") -> Criterion:
    """`torch.nn.HuberLoss`: squares up to `delta`, then straight lines.

    `schedule`: `constant`, or how that width falls to `delta` over the timesteps, from 1.
    """
    if schedule != "constant":
        return Criterion(_huber(1.0), width=Width(schedule, delta, 2))
    return Criterion(_huber(delta))


def _huber(delta: float) -> Error:
    def error(difference: Array) -> Array:
        size = jnp.abs(difference)
        return jnp.where(size < delta, 0.5 * size**2, delta * (size - 0.5 * delta))

    return error


def smooth_l1(beta: float = 1.0, schedule: str = "constant") -> Criterion:
    """`torch.nn.SmoothL1Loss`: `huber`, divided by `beta`."""
    if schedule != "constant":
        return Criterion(_huber(1.0), width=Width(schedule, beta, 1))
    huber = _huber(beta)
    return Criterion(lambda difference: huber(difference) / beta)
