"""One step of training, as pure functions.

A batch is what `jaxft.data.loader` makes: `input_ids` int32 [b, r, 77] (and `input_ids_2` for a
second text encoder) or `encoder_hidden_states` [b, 75r + 2, d] (and `pooled_text_embeds` [b, p]),
`weight` float32 [b], `moments` float32 [b, h, w, 8] or `pixel_values` uint8 [b, 8h, 8w, 3], for
Stable Diffusion XL `time_ids` float32 [b, 6], where images have masks `mask` float32 [b, h, w], and
for a ControlNet `conditioning_pixel_values` uint8 [b, 8h, 8w, 3], and for inpainting `inpaint_mask`
uint8 [b, 8h, 8w] (1: to be painted anew) with `pixel_values` besides any `moments`;
beside `input_ids`, where words are pairs, `negative_input_ids` of the same shape (and
`negative_input_ids_2`). Where there is a `teacher` float32 [b], the target is what the model
predicted before training.

`gradients` is compiled once for every shape of batch, `update` once: a step calls `gradients` for
each batch (several data sets, accumulation), adding up, then `update`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxft import params
from jaxft.diffusion import importance, losses, schedule, ssim, weighting
from jaxft.diffusion import noise as noises
from jaxft.models import vae
from jaxft.prediction import TEACHER, Objective, Weights, predict, weights_of
from jaxft.shapes import Features, Latents, Params, Pixels, Timesteps
from jaxft.tuning import groups, rounding, schedule_free


class TrainState(NamedTuple):
    """All that training changes."""

    step: Int[Array, ""]
    """Updates made, skipped ones counted."""
    trainable: Weights
    """float32; of layers that are trained in full, bfloat16 if they are to be."""
    opt_state: optax.OptState
    average: Weights
    """Of `trainable`, float32; empty where none is kept."""
    memory: importance.Memory | None = None
    """Of the data sets' losses; None where timesteps are not drawn by them."""


class Draws(NamedTuple):
    """The random part of a step."""

    latent_noise: Latents
    noise: noises.Drawn
    timesteps: Timesteps
    dropout_key: Array
    importance: Float[Array, " b"] | None = None
    """How much images count at these timesteps: 1 / (their chances × T); None: all alike."""
    masked_noise: Latents | None = None
    """For inpainting: as `latent_noise`, of the masked images."""


MASKED = 2**31 - 1
"""What is folded into the dropouts' key for `masked_noise`; no dropout has this number."""


class Judged(NamedTuple):
    """A batch by the network's predictions."""

    loss: Float[Array, ""]
    """What is made small: the mean of the images' errors."""
    errors: Float[Array, " b"]
    weight: Float[Array, " b"]
    """How much each image counts, more at timesteps that are seldom drawn for their small loss."""
    timesteps: Timesteps


def draw(
    key: Array,
    shape: tuple[int, ...],
    num_timesteps: int,
    how: losses.Loss = losses.PLAIN,
    memory: importance.Memory | None = None,
) -> Draws:
    """Noise and timesteps for latents [b, h, w, c]; the same on any number of devices."""
    latent_key, noise_key, time_key, dropout_key = jax.random.split(key, 4)
    chances, counts = how.chances, None
    if how.importance is not None and memory is not None:
        chances = importance.chances(how.importance, memory)
    if chances is None and not how.low_discrepancy:
        timesteps = jax.random.randint(time_key, shape[:1], 0, num_timesteps)
    else:
        chances = weighting.uniform(num_timesteps) if chances is None else chances
        timesteps = weighting.draw(time_key, shape[0], chances, low_discrepancy=how.low_discrepancy)
    if memory is not None:
        counts = 1 / (num_timesteps * jnp.asarray(chances)[timesteps])
    latent_noise = jax.random.normal(latent_key, shape)
    noise = noises.draw(noise_key, shape, how.noise)
    return Draws(latent_noise, noise, timesteps, dropout_key, counts)


def batch_key(key: Array, step: Array | int, dataset: Array | int, part: Array | int) -> Array:
    """The key of one batch: data set number and part (of an accumulated step) within a step."""
    for number in (step, dataset, part):
        key = jax.random.fold_in(key, number)
    return key


def encode_pixels(
    graphdef: nnx.GraphDef, weights: Params, pixels: Pixels, holes: Array | None = None
) -> Array:
    """VAE moments [b, h/8, w/8, 8] of pixels [b, h, w, 3] with `holes` [b, h, w]; float32."""
    return params.bind(graphdef, weights).encode(vae.as_images(pixels, holes))


def loss(
    objective: Objective, trainable: Weights, frozen: Weights, batch: dict[str, Array], key: Array
) -> Float[Array, ""]:
    """Mean error of the UNet's prediction, squared by default; Ho et al. 2020, eq. 14; float32."""
    return judged(objective, trainable, frozen, batch, key).loss


def judged(
    objective: Objective,
    trainable: Weights,
    frozen: Weights,
    batch: dict[str, Array],
    key: Array,
    memory: importance.Memory | None = None,
) -> Judged:
    """`loss`, and what it is the mean of; `memory` is that of the batch's data set."""
    batch = encoded(objective, frozen, batch)
    num_timesteps, shape = len(objective.schedule.alphas_cumprod), latent_shape(batch["moments"])
    draws = draw(key, shape, num_timesteps, objective.loss, memory)
    if "masked_moments" in batch:
        masked_key = jax.random.fold_in(draws.dropout_key, MASKED)
        draws = draws._replace(masked_noise=jax.random.normal(masked_key, shape))
    found = errors(objective, trainable, frozen, batch, draws)
    weight = batch["weight"]
    if draws.importance is None:
        return Judged(losses.mean(found, weight), found, weight, draws.timesteps)
    value = losses.mean(found * draws.importance, weight)
    return Judged(value, found, weight * draws.importance, draws.timesteps)


def encoded(objective: Objective, frozen: Weights, batch: dict[str, Array]) -> dict[str, Array]:
    """A batch with `moments` [b, h, w, 8], encoded here or before the first step, and for
    inpainting `masked_moments`, those of the images with their holes."""

    def encode(holes: Array | None = None) -> Array:
        graphdef, weights = objective.networks["vae"], frozen["vae"]
        return encode_pixels(graphdef, weights, batch["pixel_values"], holes)

    found = {name: value for name, value in batch.items() if name != "pixel_values"}
    if "moments" not in batch:
        found["moments"] = encode()
    if "inpaint_mask" in batch:
        found["masked_moments"] = encode(batch["inpaint_mask"])
    return found


def latent_shape(moments: Array) -> tuple[int, ...]:
    """[b, h, w, c] of the latents that moments describe."""
    return (*moments.shape[:3], moments.shape[3] // 2)


def errors(
    objective: Objective,
    trainable: Weights,
    frozen: Weights,
    batch: dict[str, Array],
    draws: Draws,
) -> Float[Array, " b"]:
    """The error of each image of a batch with moments, at the noise and the timesteps drawn."""
    nets, noising = objective.networks, objective.schedule
    parts = (*nets, "words")
    weights = {name: weights_of(name, trainable, frozen) for name in parts}
    teacher = {n.removeprefix(TEACHER): own for n, own in frozen.items() if n.startswith(TEACHER)}
    before = {name: weights_of(name, teacher, frozen) for name in parts}
    latents = vae.sample_latents(batch["moments"], draws.latent_noise) * objective.scaling_factor
    asked, added, channels = draws.noise
    if channels is not None:
        offset = noises.offset(channels, latents, objective.loss.noise)
        asked, added = asked + offset, added + offset
    noisy = schedule.add_noise(noising, latents, added, draws.timesteps)
    for number, (name, keys) in enumerate(objective.dropouts.items()):
        drawn = jax.random.split(jax.random.fold_in(draws.dropout_key, number), len(keys))
        weights[name] |= dict(zip(keys, drawn, strict=True))
        before[name] |= dict(zip(keys, drawn, strict=True))
    seen = _seen(objective, noisy, batch, draws).astype(objective.dtype)
    predicted = predict(objective, weights, batch, seen, draws.timesteps)
    if "teacher" in batch:
        wanted = predict(objective, before, batch, seen, draws.timesteps).astype(jnp.float32)
    else:
        wanted = schedule.target(noising, latents, asked, draws.timesteps)
    return _compared(objective, predicted, wanted, noisy, batch, draws.timesteps)


def _seen(objective: Objective, noisy: Latents, batch: dict[str, Array], draws: Draws) -> Features:
    """What the UNet sees of the images: noisy latents; for inpainting behind them the holes, each
    latent's that of its first pixel, and the latents of what is left."""
    if draws.masked_noise is None:
        return noisy
    left = vae.sample_latents(batch["masked_moments"], draws.masked_noise)
    rest = vae.beside(batch["inpaint_mask"], left * objective.scaling_factor)
    return jnp.concatenate([noisy, rest.astype(noisy.dtype)], axis=-1)


def _compared(
    objective: Objective,
    predicted: Latents,
    wanted: Latents,
    noisy: Latents,
    batch: dict[str, Array],
    timesteps: Timesteps,
) -> Float[Array, " b"]:
    """The error of each image's prediction."""
    how, mask = objective.loss, batch.get("mask")
    scale, unit = (
        None if table is None else jnp.asarray(table)[timesteps]
        for table in (how.weights, how.units)
    )
    each = losses.image_errors(
        predicted,
        wanted,
        error=how.error,
        scale=scale,
        unit=unit,
        mask=mask,
        normalise_mask=how.normalise_mask,
    )
    if how.ssim:
        latents, truth = (
            schedule.clean(objective.schedule, one, noisy, timesteps) for one in (predicted, wanted)
        )
        unlike = ssim.dissimilarity(latents, truth)
        inner = None if mask is None else ssim.inner(mask)
        each += how.ssim * losses.of_each(unlike, inner, normalise_mask=how.normalise_mask)
    return each


def gradients(
    objective: Objective,
    factor: Float[Array, ""] | float,
    trainable: Weights,
    frozen: Weights,
    batch: dict[str, Array],
    key: Array,
    total: Weights | None,
    gathered: Callable[[Weights], Weights] = lambda weights: weights,
    memory: importance.Memory | None = None,
) -> tuple[Judged, Weights]:
    """A batch judged, and `total` plus `factor` times its gradient (None: nothing to add to), which
    is float32. `gathered` makes of weights as they lie on devices those that are computed with."""

    def loss_of(trained: Weights) -> tuple[Array, Judged]:
        found = judged(objective, gathered(trained), gathered(frozen), batch, key, memory)
        return factor * found.loss, found

    (_, found), grads = jax.value_and_grad(loss_of, has_aux=True)(_whole(trainable))
    return found, grads if total is None else jax.tree.map(jnp.add, total, grads)


def init(
    optimizer: optax.GradientTransformation, trainable: Weights, averages: bool = False
) -> TrainState:
    """The state before the first step; with an average, which begins as the weights."""
    whole = _whole(trainable)
    average = jax.tree.map(jnp.copy, whole) if averages else {}
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(whole), average)


def _whole(weights: Weights) -> Weights:
    """The weights as float32."""
    return {part: params.cast(own, jnp.float32) for part, own in weights.items()}


def update(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Weights
) -> tuple[TrainState, Float[Array, ""], Weights]:
    """The next state, the gradient's global norm before clipping, and what the weights have got.

    A gradient that is not finite leaves weights and optimizer as they were, bit for bit.
    """
    norm = groups.norm(jax.tree.leaves(grads))
    finite = jnp.isfinite(norm)
    whole = _whole(state.trainable)
    updates: Any
    updates, opt_state = optimizer.update(grads, state.opt_state, whole)
    moved = rounding.like(optax.apply_updates(whole, updates), state.trainable, state.step)
    changed = (moved, opt_state)
    trainable, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), changed, (state.trainable, state.opt_state)
    )
    return (
        state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state),
        norm,
        updates,
    )


def result(state: TrainState) -> Weights:
    """What training has made; of optimizers whose weights in training are others, those to keep."""
    return schedule_free.result(state.opt_state, state.trainable)
