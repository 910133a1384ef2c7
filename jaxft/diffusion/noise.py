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
    offset_probability: float = 1.0
    """Share of the images that have one."""
    adaptive_noise_scale: float = 0.0
    """By how much an offset is stronger for each unit of the size of its channel's mean."""
    pyramid: dict[str, Any] | None = None
    """Options of `pyramid`; None: none."""
    perturbation: float = 0.0
    """Share of more noise that the network sees and is not asked for; Ning et al. 2023
    (https://arxiv.org/abs/2301.11706)."""


NORMAL = Recipe()


class Drawn(NamedTuple):
    """Noise for latents [b, h, w, c], without an offset."""

    asked: Latents
    """What the network is asked for."""
    added: Latents
    """What is added to the latents."""
    channels: Float[Array, "b 1 1 c"] | None = None
    """A number for each image and channel, of which `offset` makes that part of both; 0 for images
    that have none, None where no image has."""


def draw(key: Array, shape: tuple[int, ...], recipe: Recipe = NORMAL) -> Drawn:
    """Noise for latents [b, h, w, c]."""
    noise, channels = jax.random.normal(key, shape), None
    pyramid_key, offset_key, more_key, chance_key = (
        jax.random.fold_in(key, use) for use in range(4)
    )
    if recipe.pyramid is not None:
        noise = pyramid(pyramid_key, noise, **recipe.pyramid)
    if recipe.offset or recipe.adaptive_noise_scale:
        b, _, _, c = shape
        channels = jax.random.normal(offset_key, (b, 1, 1, c))
        has = jax.random.bernoulli(chance_key, recipe.offset_probability, (b, 1, 1, 1))
        channels = jnp.where(has, channels, 0.0)
    if not recipe.perturbation:
        return Drawn(noise, noise, channels)
    more = recipe.perturbation * jax.random.normal(more_key, shape)
    return Drawn(noise, noise + more, channels)


def offset(
    channels: Float[Array, "b 1 1 c"], latents: Latents, recipe: Recipe
) -> Float[Array, "b 1 1 c"]:
    """What noise has more, the same for a whole channel, so that images may become darker or
    brighter as a whole.

    Guttenberg 2023 (https://www.crosslabs.org/blog/diffusion-with-offset-noise); how strong it is,
    and that it is never less than nothing, as kohya's trainer has it.
    """
    if not recipe.adaptive_noise_scale:
        return recipe.offset * channels
    level = jnp.abs(jnp.mean(latents, axis=(1, 2), keepdims=True))
    return jnp.maximum(recipe.offset + recipe.adaptive_noise_scale * level, 0) * channels


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
