"""The autoencoder of the demo's base model."""

import functools
from collections.abc import Iterator
from pathlib import Path

import demo_world as world
import jax
import jax.numpy as jnp
import numpy as np
import random_model

from demo_base.fit import Recipe, fit
from jaxft import params, step
from jaxft.models.vae import AutoencoderKL, sample_latents
from jaxft.shapes import Latents, Params

CONFIG = random_model.VAE | {"block_out_channels": [16, 32, 48, 64], "layers_per_block": 1}
RECIPE = Recipe(2400, 4, 5e-3)

KL_WEIGHT = 3e-3
HALVED_WEIGHT = 0.25
"""Of the loss at half size: averaged latents should decode to the averaged picture, which makes
latents smooth and a UNet learn them sooner (EQ-VAE, Kouzelis et al. 2025)."""

NUM_MEASURED = 256
"""Pictures from which the scaling factor is measured."""


def draw(rng: np.random.Generator, size: tuple[int, int], crowded: float) -> np.ndarray:
    """A picture to learn from, uint8 [h, w, 3]: a scene, or with this probability a crowd."""
    if rng.random() < crowded:
        return world.paint(world.crowded_scene(rng, size, int(rng.integers(3, 8))))
    return world.paint(world.random_scene(rng, size, int(rng.integers(1, 3))))


def pictures(recipe: Recipe, seed: int, number: int) -> np.ndarray:
    """A batch to learn from, uint8 [b, h, w, 3]."""
    rng = np.random.default_rng((seed, number))
    return np.stack([draw(rng, world.SIZES[0], 0.3) for _ in range(recipe.batch)])


def distance(decoder: AutoencoderKL, latents: Latents, pixels: jax.Array) -> jax.Array:
    """What is wrong with the decoded latents: squared error and a tenth of the absolute one.

    `pixels` are float32 [b, h, w, 3], 0 … 255; errors are in units of [-1, 1].
    """
    error = decoder.decode(latents) - (pixels / 127.5 - 1)
    return jnp.mean(error**2) + 0.1 * jnp.mean(jnp.abs(error))


def halved(x: jax.Array) -> jax.Array:
    """[b, h, w, c] at half size: means of 2×2."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def train(folder: Path, seed: int) -> Params:
    """The autoencoder's weights: `distance` at two sizes, and a little of the KL divergence."""
    graphdef, shapes = params.abstract(lambda: AutoencoderKL(CONFIG))

    def loss(weights, pixels, key):
        moments = step.encode_pixels(graphdef, weights["vae"], pixels)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        latents = sample_latents(moments, jax.random.normal(key, mean.shape))
        decoder, pixels = params.bind(graphdef, weights["vae"]), pixels.astype(jnp.float32)
        small = distance(decoder, halved(latents), halved(pixels))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return distance(decoder, latents, pixels) + HALVED_WEIGHT * small + KL_WEIGHT * kl

    weights = {"vae": random_model.random_params(shapes, np.random.default_rng(seed))}
    return fit(folder, RECIPE, weights, loss, functools.partial(pictures, RECIPE, seed), seed)[
        "vae"
    ]


def held_out(seed: int) -> Iterator[np.ndarray]:
    """Renders that training has not seen, uint8 [16, h, w, 3] at a time."""
    rng = np.random.default_rng((seed, 1, 1))
    for _ in range(0, NUM_MEASURED, 16):
        scenes = [world.random_scene(rng, world.SIZES[0], 1 + i % 2, True) for i in range(16)]
        yield np.stack([world.paint(scene) for scene in scenes])


def scaling_factor(weights: Params, seed: int) -> float:
    """The factor that gives the latents of held-out renders unit variance."""
    graphdef, _ = params.abstract(lambda: AutoencoderKL(CONFIG))
    encode = jax.jit(functools.partial(step.encode_pixels, graphdef, weights))
    moments = np.concatenate([encode(pixels) for pixels in held_out(seed)])
    noise = jax.random.normal(jax.random.key(seed), (*moments.shape[:3], 4))
    return float(1 / jnp.std(sample_latents(jnp.asarray(moments), noise)))
