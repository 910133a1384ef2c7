"""Images from prompts: text encoder, sampling loop and decoder as one compiled program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.diffusion.conditioning import encode_text, weigh
from jaxft.diffusion.samplers import Table, sample
from jaxft.models.encoder import Added
from jaxft.params import bind, cast
from jaxft.shapes import Latents, Pixels, TextStates


class Networks(NamedTuple):
    """One thing for each network of a pipeline: its structure, or its weights."""

    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]


class Prompts(NamedTuple):
    """A batch of prompts as numbers."""

    input_ids: tuple[Int[Array, "b r 77"], ...]
    """For each text encoder."""
    weights: Float[Array, "b s"] | None
    """Of the text states, s = 75r + 2; None where no prompt of the batch has any."""


Program = Callable[
    [Networks, Sequence[Prompts], float, Latents, Table], tuple[Pixels, Bool[jax.Array, " b"]]
]


@functools.cache
def program(
    structures: Networks,
    *,
    scaling_factor: float,
    clip_skip: int = 0,
    final_norm: bool = True,
    dtype: Any = jnp.float32,
) -> Program:
    """A compiled function (weights, prompts, guidance scale, noise, table) -> images.

    Prompts are those of `guided_by`. Noise has unit variance, [b, h, w, 4]. Pixels [b, 8h, 8w, 3]
    come back, and for each image whether all of its numbers were finite. Another scale or another
    sampler of the same order and number of steps needs no new compilation; nor does a second call
    with the same arguments.

    Args:
        structures: `nnx.GraphDef` of each network.
        scaling_factor: by which latents were multiplied in training (`vae/config.json`).
        clip_skip: last layers of the text encoder to leave out.
        final_norm: whether the text encoder's final norm is applied.
        dtype: of text encoder and UNet, and of the decoder unless it is float16, in which
            decoders overflow: then float32. The sample itself is float32 always.
    """
    decoder_dtype = jnp.float32 if dtype == jnp.float16 else dtype

    def run(
        weights: Networks, prompts: Sequence[Prompts], scale: float, noise: Latents, table: Table
    ):
        text_encoders = [
            bind(structure, cast(own, dtype))
            for structure, own in zip(structures.text_encoders, weights.text_encoders, strict=True)
        ]
        sides = [_conditions(text_encoders, side, clip_skip, final_norm) for side in prompts]
        states, pooled = (jnp.concatenate(both) for both in zip(*sides, strict=True))
        unet = bind(structures.unet, cast(weights.unet, dtype))
        vae = bind(structures.vae, cast(weights.vae, decoder_dtype))
        height, width = (side * vae.scale for side in noise.shape[1:3])
        sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
        added = Added(pooled, jnp.tile(sizes, (len(pooled), 1)))

        def denoise(x: Latents, timestep: jax.Array) -> jax.Array:
            x = jnp.concatenate([x.astype(dtype)] * len(prompts))
            output = unet(x, jnp.full(len(x), timestep), states, added).astype(jnp.float32)
            first, *others = jnp.split(output, len(prompts))
            return first + scale * (others[0] - first) if others else first

        latents = sample(denoise, noise, table)
        images = vae.decode((latents / scaling_factor).astype(decoder_dtype)).astype(jnp.float32)
        finite = jnp.all(jnp.isfinite(images), axis=(1, 2, 3))
        pixels = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255)
        return jnp.nan_to_num(pixels).astype(jnp.uint8), finite

    return jax.jit(run)


def guided_by(scale: float, negative: Prompts, positive: Prompts) -> list[Prompts]:
    """The prompts that classifier-free guidance asks the network about.

    Its output is `negative + scale * (positive - negative)` (Ho and Salimans 2022,
    https://arxiv.org/abs/2207.12598): of scale 0 and 1, one of them alone.
    """
    return {0.0: [negative], 1.0: [positive]}.get(scale, [negative, positive])


def initial_noise(seeds: Sequence[int], height: int, width: int, channels: int = 4) -> Latents:
    """Noise of unit variance, [b, height, width, channels]; each image's from its own seed."""
    shape = (height, width, channels)
    return jnp.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds])


def _conditions(
    text_encoders: Sequence[Any], prompts: Prompts, clip_skip: int, final_norm: bool
) -> tuple[TextStates, Array]:
    states, pooled = encode_text(
        text_encoders, prompts.input_ids, clip_skip=clip_skip, final_norm=final_norm
    )
    return (states if prompts.weights is None else weigh(states, prompts.weights)), pooled
