"""Images from prompts: text encoder, sampling loop and decoder as one compiled program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxft.diffusion.conditioning import encode_text, weigh
from jaxft.diffusion.samplers import Table, sample
from jaxft.models.encoder import Added
from jaxft.models.vae import as_images, beside, sample_latents
from jaxft.params import bind, cast
from jaxft.shapes import Images, Latents, Pixels, TextStates


class Side(NamedTuple):
    """The networks that answer prompts: their structures, or their weights."""

    unet: Any
    text_encoders: tuple[Any, ...]


class Networks(NamedTuple):
    """One thing for each network of a pipeline: its structure, or its weights."""

    sides: tuple[Side, ...]
    """One for all prompts; or one for each of those that guidance asks about."""
    vae: Any
    controlnet: Any = None


class Seen(NamedTuple):
    """The pictures that images are made by, if any."""

    condition: Pixels | None = None
    """What a ControlNet sees, [b, 8h, 8w, 3]."""
    image: Pixels | None = None
    """What is to be inpainted, [b, 8h, 8w, 3]."""
    hole: UInt8[Array, "b h w"] | None = None
    """1 where it is to be painted anew, [b, 8h, 8w]."""
    noise: Latents | None = None
    """By which the latents of the rest are drawn."""


class Prompts(NamedTuple):
    """A batch of prompts as numbers."""

    input_ids: tuple[Int[Array, "b r 77"], ...]
    """For each text encoder."""
    weights: Float[Array, "b s"] | None
    """Of the text states, s = 75r + 2; None where no prompt of the batch has any."""


Program = Callable[
    [Networks, Sequence[Prompts], float, Latents, Table, Seen, float],
    tuple[Pixels, Bool[jax.Array, " b"]],
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
    """A compiled function (weights, prompts, guidance scale, noise, table, pictures, strength of
    the ControlNet) -> images.

    Prompts are those of `guided_by`, which are shared out evenly among the sides. Noise has unit
    variance, [b, h, w, 4]. Pixels [b, 8h, 8w, 3] come back, and for each image whether all of its
    numbers were finite. Another scale or another sampler of the same order and number of steps
    needs no new compilation; nor does a second call with the same arguments.

    Args:
        structures: `nnx.GraphDef` of each network.
        scaling_factor: by which latents were multiplied in training (`vae/config.json`).
        clip_skip: last layers of the text encoder to leave out.
        final_norm: whether the text encoder's final norm is applied.
        dtype: of text encoder and UNet, and of the decoder unless it is float16, in which
            decoders overflow: then float32. The sample itself is float32 always.
    """
    text_layer = {"clip_skip": clip_skip, "final_norm": final_norm}
    return jax.jit(functools.partial(_run, structures, scaling_factor, dtype, text_layer))


def _run(
    structures: Networks,
    scaling_factor: float,
    dtype: Any,
    text_layer: dict[str, Any],
    weights: Networks,
    prompts: Sequence[Prompts],
    scale: float,
    noise: Latents,
    table: Table,
    seen: Seen,
    strength: float,
) -> tuple[Pixels, Bool[jax.Array, " b"]]:
    """See `program`."""
    decoder_dtype = jnp.float32 if dtype == jnp.float16 else dtype
    each = len(prompts) // len(structures.sides)
    vae = bind(structures.vae, cast(weights.vae, decoder_dtype))
    height, width = (side * vae.scale for side in noise.shape[1:3])
    sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
    asked = []
    for number, (structure, own) in enumerate(zip(structures.sides, weights.sides, strict=True)):
        of_side = prompts[number * each : (number + 1) * each]
        unet, states, pooled = _asked(structure, own, of_side, dtype, text_layer)
        asked.append((unet, states, Added(pooled, jnp.tile(sizes, (len(pooled), 1)))))

    rest, control, hint = _rest(vae, seen, scaling_factor), None, None
    if seen.condition is not None:
        control = bind(structures.controlnet, cast(weights.controlnet, dtype))
        hint = jnp.concatenate([seen.condition.astype(jnp.float32) / 255] * each)

    def denoise(x: Latents, timestep: jax.Array) -> jax.Array:
        x = x if rest is None else jnp.concatenate([x, rest], axis=-1)
        x = jnp.concatenate([x.astype(dtype)] * each)
        times, answers = jnp.full(len(x), timestep), []
        for unet, states, added in asked:
            residuals = control and control(x, times, states, hint, added)
            residuals = jax.tree.map(lambda r: strength * r, residuals)
            answers.append(unet(x, times, states, added, residuals))
        first, *others = jnp.split(jnp.concatenate(answers).astype(jnp.float32), len(prompts))
        return first + scale * (others[0] - first) if others else first

    latents = sample(denoise, noise, table)
    images = vae.decode((latents / scaling_factor).astype(decoder_dtype)).astype(jnp.float32)
    return _as_pixels(images), jnp.all(jnp.isfinite(images), axis=(1, 2, 3))


def _as_pixels(images: Images) -> Pixels:
    rounded = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255)
    return jnp.nan_to_num(rounded).astype(jnp.uint8)


def guided_by(scale: float, negative: Any, positive: Any) -> list[Any]:
    """The prompts that classifier-free guidance asks the network about, or what goes with them.

    Its output is `negative + scale * (positive - negative)` (Ho and Salimans 2022,
    https://arxiv.org/abs/2207.12598): of scale 0 and 1, one of them alone.
    """
    return {0.0: [negative], 1.0: [positive]}.get(scale, [negative, positive])


LEFT = 1
"""Stream of `Seen.noise`."""


def initial_noise(
    seeds: Sequence[int], height: int, width: int, channels: int = 4, stream: int = 0
) -> Latents:
    """Noise of unit variance, [b, height, width, channels]; each image's from its own seed. Another
    stream has other noise."""
    keys = [jax.random.key(seed) for seed in seeds]
    keys = [jax.random.fold_in(key, stream) for key in keys] if stream else keys
    return jnp.stack([jax.random.normal(key, (height, width, channels)) for key in keys])


def _rest(vae: Any, seen: Seen, scaling_factor: float) -> Array | None:
    """What an inpainting UNet sees behind the noisy latents, float32."""
    if seen.image is None or seen.hole is None or seen.noise is None:
        return None
    moments = vae.encode(as_images(seen.image, seen.hole)).astype(jnp.float32)
    return beside(seen.hole, sample_latents(moments, seen.noise) * scaling_factor)


def _asked(
    structure: Side,
    weights: Side,
    prompts: Sequence[Prompts],
    dtype: Any,
    text_layer: dict[str, Any],
) -> tuple[Any, TextStates, Array]:
    """The UNet that answers prompts, and what it is told of them, one after the other."""
    pairs = zip(structure.text_encoders, weights.text_encoders, strict=True)
    encoders = [bind(graphdef, cast(own, dtype)) for graphdef, own in pairs]
    told = [_conditions(encoders, one, text_layer) for one in prompts]
    states, pooled = (jnp.concatenate(parts) for parts in zip(*told, strict=True))
    return bind(structure.unet, cast(weights.unet, dtype)), states, pooled


def _conditions(
    text_encoders: Sequence[Any], prompts: Prompts, text_layer: dict[str, Any]
) -> tuple[TextStates, Array]:
    states, pooled = encode_text(text_encoders, prompts.input_ids, **text_layer)
    return (states if prompts.weights is None else weigh(states, prompts.weights)), pooled
