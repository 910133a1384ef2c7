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
from jaxft.shapes import Latents, Params, Pixels

CONFIG = random_model.VAE | {"block_out_channels": [16, 32, 48, 64], "layers_per_block": 1}
RECIPE = Recipe(3600, 16, 2e-3)
DECODER_RECIPE = Recipe(2400, 4, 1e-3)

CROP = 64
"""Side of the cuts that the VAE learns from, before it sees whole pictures."""

KL_WEIGHT = 2e-4
NUM_MEASURED = 256
"""Pictures from which the scaling factor is measured."""


def draw(rng: np.random.Generator, size: tuple[int, int], crowded: float) -> np.ndarray:
    """A picture to learn from, uint8 [h, w, 3]: a scene, or with this probability a crowd."""
    if rng.random() < crowded:
        return world.paint(world.crowded_scene(rng, size, int(rng.integers(3, 8))))
    return world.paint(world.random_scene(rng, size, int(rng.integers(1, 3))))


def pictures(recipe: Recipe, seed: int, number: int) -> np.ndarray:
    """uint8 [b, h, w, 3]: many cuts, and in the last sixth of the training fewer whole pictures."""
    rng = np.random.default_rng((seed, number))
    width, height = world.SIZES[0]
    if number >= recipe.steps * 5 // 6:
        count = recipe.batch * CROP**2 // (width * height)
        return np.stack([draw(rng, (width, height), 0.3) for _ in range(count)])

    def cut() -> np.ndarray:
        picture = draw(rng, (width, height), 0.3)
        x, y = rng.integers(0, width - CROP + 1), rng.integers(0, height - CROP + 1)
        return picture[y : y + CROP, x : x + CROP]

    return np.stack([cut() for _ in range(recipe.batch)])


def difference(decoder: AutoencoderKL, latents: Latents, pixels: Pixels) -> jax.Array:
    """What is wrong with the decoded latents, float32 [b, h, w, 3] in units of [-1, 1]."""
    return decoder.decode(latents) - (pixels.astype(jnp.float32) / 127.5 - 1)


def distance(error: jax.Array) -> jax.Array:
    """Squared error and a tenth of the absolute one; a scalar."""
    return jnp.mean(error**2) + 0.1 * jnp.mean(jnp.abs(error))


def train(folder: Path, seed: int) -> Params:
    """The autoencoder's weights: `distance`, and a little of the KL divergence."""
    graphdef, shapes = params.abstract(lambda: AutoencoderKL(CONFIG))

    def loss(weights, pixels, key):
        moments = step.encode_pixels(graphdef, weights["vae"], pixels)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        latents = sample_latents(moments, jax.random.normal(key, mean.shape))
        error = difference(params.bind(graphdef, weights["vae"]), latents, pixels)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return distance(error) + KL_WEIGHT * kl

    weights = {"vae": random_model.random_params(shapes, np.random.default_rng(seed))}
    return fit(folder, RECIPE, weights, loss, functools.partial(pictures, RECIPE, seed), seed)[
        "vae"
    ]


def polish(folder: Path, weights: Params, seed: int) -> Params:
    """The weights with a decoder trained further: latents stay as the UNet knows them."""
    graphdef, _ = params.abstract(lambda: AutoencoderKL(CONFIG))
    decoder = {
        name: value for name, value in weights.items() if name.startswith(("decoder.", "post_"))
    }

    def loss(trainable, pixels, key):
        moments = step.encode_pixels(graphdef, weights, pixels)
        latents = sample_latents(moments, jax.random.normal(key, (*moments.shape[:3], 4)))
        return distance(
            difference(params.bind(graphdef, weights | trainable["decoder"]), latents, pixels)
        )

    def batch(number: int) -> np.ndarray:
        rng = np.random.default_rng((seed, 3, number))
        return np.stack([draw(rng, world.SIZES[0], 0.5) for _ in range(DECODER_RECIPE.batch)])

    return weights | fit(folder, DECODER_RECIPE, {"decoder": decoder}, loss, batch, seed)["decoder"]


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
