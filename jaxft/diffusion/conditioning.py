"""From token ids to the states that the UNet attends to."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.shapes import TextStates


def encode_text(
    text_encoder: Any,
    input_ids: Int[Array, "b r 77"],
    *,
    clip_skip: int = 0,
    final_norm: bool = True,
) -> TextStates:
    """States of prompts that are r rows of CLIP's 77 tokens long, [b, 75r + 2, d].

    The encoder sees each row alone. Joined, they keep one start (the first row's) and one end
    (the last row's); this is HCP-Diffusion's layout of `tokenizer_repeats`. One row is unchanged.

    Args:
        text_encoder: a `CLIPTextModel` with its weights.
        input_ids: each row begins with the start token and ends with end or padding.
        clip_skip: last layers to leave out.
        final_norm: whether the final layer norm is applied.
    """
    b, r, n = input_ids.shape
    states, _ = text_encoder(input_ids.reshape(b * r, n), clip_skip, final_norm)
    rows = states.reshape(b, r, n, -1)
    content = rows[:, :, 1:-1].reshape(b, r * (n - 2), -1)
    return jnp.concatenate([rows[:, 0, :1], content, rows[:, -1, -1:]], axis=1)


def weigh(states: TextStates, weights: Float[Array, "b s"]) -> TextStates:
    """States multiplied by their weights, then each [s, d] rescaled to its mean before.

    What HCP-Diffusion and AUTOMATIC1111's webui do with weighted prompts; float32 inside.
    """
    whole = states.astype(jnp.float32)
    weighted = whole * weights[:, :, None]
    before, after = (x.mean(axis=(1, 2), keepdims=True) for x in (whole, weighted))
    return (weighted * (before / after)).astype(states.dtype)
