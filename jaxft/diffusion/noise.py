"""Noise other than a normal number for each value of a latent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.shapes import Latents


class Recipe(NamedTuple):
    """What noise is made of, besides normal numbers."""

    offset: float = 0.0
    """Strength of `offset`."""
    pyramid: dict[str, Any] | None = None
    """Options of `pyramid`; None: none."""
    perturbation: float = 0.0
    """Share of more noise that the network sees and is not asked for; Ning et al. 2023
    (https://arxiv.org/abs/2301.11706)."""


NORMAL = Recipe()


def draw(key: Array, shape: tuple[int, ...], recipe: Recipe = NORMAL) -> tuple[Latents, Latents]:
    """The noise that is asked for, and the noise that is added to latents [b, h, w, c]."""
    noise = jax.random.normal(key, shape)
    pyramid_key, offset_key, more_key = (jax.random.fold_in(key, use) for use in range(3))
    if recipe.pyramid is not None:
        noise = pyramid(pyramid_key, noise, **recipe.pyramid)
    if recipe.offset:
        noise = offset(offset_key, noise, recipe.offset)
    if not recipe.perturbation:
        return noise, noise
    return noise, noise + recipe.perturbation * jax.random.normal(more_key, shape)


def offset(key: Array, noise: Latents, strength: float) -> Latents:
    """The noise with one more number for each image and channel, `strength` large.

    Guttenberg 2023 (https://www.crosslabs.org/blog/diffusion-with-offset-noise): images may so
    become darker or brighter as a whole.
    """
    b, _, _, c = noise.shape
    return noise + strength * jax.random.normal(key, (b, 1, 1, c), noise.dtype)


def pyramid(
    key: Array, noise: Latents, *, level: int = 10, discount: float = 0.9, step_size: float = 2.0
) -> Latents:
    """The noise with coarser and coarser noise added, each image's then of variance 1.

    Whitaker 2023 (multi-resolution noise), in the form of HCP-Diffusion's `PyramidNoiseScheduler`:
    in level i = 1, 2, … noise of 1 / rⁱ of the size, r = 2 U(0, 1) + `step_size`, is scaled up and
    added `discount`ⁱ large, until it is one number. Each image has its own r.

    Args:
        key: of all that is drawn.
        noise: standard normal, [b, h, w, c].
        level: so many less one are added.
        discount: of each level.
        step_size: least r.
    """
    keys = jax.random.split(key, len(noise))
    return jax.vmap(lambda k, n: _pyramid(k, n, level, discount, step_size))(keys, noise)


def _pyramid(
    key: Array, noise: Float[Array, "h w c"], level: int, discount: float, step_size: float
) -> Float[Array, "h w c"]:
    h, w, _ = noise.shape
    total, goes_on = noise, jnp.array(True)
    for i in range(1, level):
        key, factor_key, noise_key = jax.random.split(key, 3)
        factor = (2 * jax.random.uniform(factor_key) + step_size) ** i
        rows, columns = (jnp.maximum(1, jnp.floor(size / factor)) for size in (h, w))
        coarse = jax.random.normal(noise_key, noise.shape, noise.dtype)
        finer = jnp.einsum("hi,wj,ijc->hwc", _upscale(h, rows), _upscale(w, columns), coarse)
        total += jnp.where(goes_on, discount**i, 0.0) * finer
        goes_on &= (rows > 1) & (columns > 1)
    return total / jnp.std(total)


def _upscale(size: int, small: Array) -> Float[Array, "size size"]:
    """The matrix that scales the first `small` of `size` values up to `size`, bilinearly.

    Its shape does not depend on `small`, so that the size of the noise may be drawn in a compiled
    program.
    """
    place = (jnp.arange(size) + 0.5) * small / size - 0.5
    place = jnp.clip(place, 0, small - 1)
    return jnp.maximum(0, 1 - jnp.abs(place[:, None] - jnp.arange(size)))
