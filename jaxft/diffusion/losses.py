"""What training minimises."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.diffusion.noise import NORMAL, Recipe
from jaxft.shapes import Latents

Error = Callable[[Array], Array]
"""The error of each value, from its difference to what is wanted."""


class Criterion(NamedTuple):
    """An error, and the weighting of timesteps that belongs to it."""

    error: Error = jnp.square
    weighting: str | None = None
    """A name in `weighting.WEIGHTINGS`."""
    options: Mapping[str, float] = {}
    """Of the weighting."""


class Loss(NamedTuple):
    """How predictions are judged, and at which noise."""

    error: Error = jnp.square
    weights: Float[np.ndarray, " T"] | None = None
    """Of the timesteps; None: 1 for each."""
    chances: Float[np.ndarray, " T"] | None = None
    """Of the timesteps to be drawn; None: all alike."""
    low_discrepancy: bool = False
    """Whether the timesteps of a batch are spread evenly over their chances."""
    noise: Recipe = NORMAL


PLAIN = Loss()


def mean_error(
    predicted: Latents,
    wanted: Latents,
    weight: Float[Array, " b"],
    *,
    error: Error = jnp.square,
    scale: Float[Array, " b"] | None = None,
    mask: Float[Array, "b h w"] | None = None,
) -> jax.Array:
    """Mean of the images' mean errors, each counted by its weight; float32 scalar.

    An image of weight 0 (one that only fills up a batch) changes neither value nor gradient. If
    all weights are 0 the loss is 0.

    Args:
        predicted: by the network.
        wanted: its target.
        weight: of each image.
        error: of each value.
        scale: by which an image's error is multiplied; it is not divided by the sum of them.
        mask: by which the errors of each place are multiplied; nor is it divided by its sum.
    """
    errors = error(predicted.astype(jnp.float32) - wanted.astype(jnp.float32))
    if mask is not None:
        errors = errors * mask[..., None]
    each = jnp.mean(errors, axis=(1, 2, 3))  # [b]
    if scale is not None:
        each = each * scale
    total = jnp.sum(weight)
    return jnp.sum(weight * each) / jnp.where(total > 0, total, 1)


def huber(delta: float = 1.0) -> Error:
    """`torch.nn.HuberLoss`: squares up to `delta`, then straight lines."""

    def error(difference: Array) -> Array:
        size = jnp.abs(difference)
        return jnp.where(size < delta, 0.5 * size**2, delta * (size - 0.5 * delta))

    return error


def smooth_l1(beta: float = 1.0) -> Error:
    """`torch.nn.SmoothL1Loss`: `huber`, divided by `beta`."""

    def error(difference: Array) -> Array:
        size = jnp.abs(difference)
        return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)

    return error
