"""What the networks of a step say of a batch: guided away from negative prompts, by a ControlNet's
images, by words."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxft import params
from jaxft.diffusion import conditioning, losses, schedule
from jaxft.models.encoder import Added
from jaxft.shapes import (
    NEGATIVE,
    TEXT_INPUTS,
    TEXT_STATES,
    Features,
    Latents,
    Params,
    Timesteps,
)

Weights = dict[str, Params]
"""Network (`unet`, `vae`, `text_encoder`, `controlnet`) -> its weights, or some of them;
`lora_unet`, … -> the factors of a network's LoRAs; `words` -> word -> its rows [n, d];
`lora_negative_unet`, … -> those of the network as it answers negative prompts, where it has others
for these; `teacher_unet`, `teacher_lora_unet`, … -> what is trained, as it began."""

TEACHER = "teacher_"
"""Beginning of the names of what is trained, as it began."""


class Objective(NamedTuple):
    """What a step minimises, apart from weights and data; nothing in it changes in a run."""

    networks: dict[str, nnx.GraphDef]
    """`negative_unet`, … too, where negative prompts have LoRAs of their own."""
    schedule: schedule.NoiseSchedule
    scaling_factor: float
    """Of the VAE's latents."""
    dtype: Any
    """Of the activations of UNet and text encoders."""
    clip_skip: int = 0
    clip_final_norm: bool = True
    loss: losses.Loss = losses.PLAIN
    dropouts: Mapping[str, Sequence[str]] = {}
    """Network -> names of the keys by which its LoRAs drop values."""


def weights_of(name: str, trainable: Weights, frozen: Weights) -> Params:
    """All that a network computes with: frozen and trained weights, factors of its LoRAs."""
    own = name.removeprefix(NEGATIVE)
    return frozen.get(own, {}) | trainable.get(own, {}) | trainable.get(f"lora_{name}", {})


def predict(
    objective: Objective,
    weights: Weights,
    batch: dict[str, Array],
    seen: Features,
    timesteps: Timesteps,
) -> Latents:
    """What the UNet says of what it sees; guided, where there are negative prompts."""
    asked = {name: value for name, value in batch.items() if not name.startswith(NEGATIVE)}
    if len(asked) == len(batch):
        return _answer(objective, weights, batch, seen, timesteps)
    against = asked | {name.removeprefix(NEGATIVE): batch[name] for name in batch.keys() - asked}
    if any(name.startswith(NEGATIVE) for name in objective.networks):
        other = objective._replace(networks=_of_negatives(objective.networks))
        negative = _answer(other, _of_negatives(weights), against, seen, timesteps)
        positive = _answer(objective, weights, asked, seen, timesteps)
    else:  # at once, which takes less time than twice
        both = [(against, seen, timesteps), (asked, seen, timesteps)]
        inputs = jax.tree.map(lambda *each: jnp.concatenate(each), *both)
        negative, positive = jnp.split(_answer(objective, weights, *inputs), 2)
    assert objective.loss.guidance is not None, "a plan has guidance where words are pairs"
    negative, positive = negative.astype(jnp.float32), positive.astype(jnp.float32)
    scale = jnp.asarray(objective.loss.guidance)[timesteps][:, None, None, None]
    return negative + scale * (positive - negative)


def _of_negatives(named: Mapping[str, Any]) -> dict[str, Any]:
    """Networks, or their weights, as they answer negative prompts."""
    return {name: named.get(f"{NEGATIVE}{name}", own) for name, own in named.items()}


def _answer(
    objective: Objective,
    weights: Weights,
    batch: dict[str, Array],
    seen: Features,
    timesteps: Timesteps,
) -> Latents:
    """What the UNet says of what it sees and of the prompts."""
    text, pooled = _text(objective, weights, batch)
    added = Added(pooled, batch["time_ids"]) if "time_ids" in batch else None
    residuals = None
    if "controlnet" in objective.networks:
        control = params.bind(objective.networks["controlnet"], weights["controlnet"])
        image = batch["conditioning_pixel_values"].astype(jnp.float32) / 255
        residuals = control(seen, timesteps, text, image, added)
    unet = params.bind(objective.networks["unet"], weights["unet"])
    return unet(seen, timesteps, text, added, residuals)


def _text(objective: Objective, weights: Weights, batch: dict[str, Array]) -> tuple[Any, Any]:
    """What the UNet is told of the prompts: encoded here, or before the first step."""
    states, pooled = TEXT_STATES
    if states in batch:
        return batch[states], batch.get(pooled)
    encoders = [name for name in TEXT_INPUTS if name in objective.networks]
    return conditioning.encode_text(
        [
            params.bind(objective.networks[name], params.cast(weights[name], objective.dtype))
            for name in encoders
        ],
        [batch[TEXT_INPUTS[name]] for name in encoders],
        conditioning.stack(weights["words"]),
        clip_skip=objective.clip_skip,
        final_norm=objective.clip_final_norm,
    )
