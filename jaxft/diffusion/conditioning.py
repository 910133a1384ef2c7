"""From token ids to what the UNet is told: the text's states, and in XL its pooled state."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.shapes import Params, TextStates

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
"""A text encoder's weight whose rows are its tokens."""


def add_rows(weights: Params, rows: Float[Array | np.ndarray, "n d"]) -> Params:
    """A text encoder's weights with rows of words behind its table of tokens.

    Their ids go on from the table's length (`Tokenizer.add_words`). For words that stay as they
    are: those that are trained lie beside the table (`encode_text`), of which they are no part.
    """
    return weights | {TOKEN_TABLE: jnp.concatenate([weights[TOKEN_TABLE], rows])}


def stack(words: Mapping[str, Float[Array, "_ d"]]) -> Float[Array, "n d"] | None:
    """The rows of all words, in the order of their names, which is that of their ids."""
    return jnp.concatenate([words[word] for word in sorted(words)]) if words else None


def encode_text(
    text_encoders: Sequence[Any],
    input_ids: Sequence[Int[Array, "b r 77"]],
    words: Float[Array, "n d"] | None = None,
    *,
    clip_skip: int = 0,
    final_norm: bool = True,
) -> tuple[TextStates, Float[Array, "b p"]]:
    """States of prompts that are r rows of CLIP's 77 tokens long, and the pooled state.

    An encoder sees each row alone. Joined, they keep one start (the first row's) and one end
    (the last row's); this is HCP-Diffusion's layout of `tokenizer_repeats`. One row is unchanged.
    States [b, 75r + 2, d] of several encoders lie side by side on the last axis. The pooled state
    is that of the last encoder, of the first row.

    Args:
        text_encoders: `CLIPTextModel`s with their weights.
        input_ids: of each encoder; each row begins with the start token and ends with end or
            padding.
        words: rows of words, whose ids go on from the lengths of the tables of tokens; of several
            encoders the columns lie side by side.
        clip_skip: last layers to leave out.
        final_norm: whether the final layer norm is applied.
    """
    joined, pooled = [], None
    widths = [
        encoder.text_model.embeddings.token_embedding.weight.shape[1] for encoder in text_encoders
    ]
    ends = np.cumsum(widths)[:-1]
    columns = [None] * len(widths) if words is None else jnp.split(words, ends, axis=1)
    for text_encoder, ids, own in zip(text_encoders, input_ids, columns, strict=True):
        b, r, n = ids.shape
        states, pooled = text_encoder(ids.reshape(b * r, n), clip_skip, final_norm, own)
        rows = states.reshape(b, r, n, -1)
        content = rows[:, :, 1:-1].reshape(b, r * (n - 2), -1)
        joined.append(jnp.concatenate([rows[:, 0, :1], content, rows[:, -1, -1:]], axis=1))
        pooled = pooled.reshape(b, r, -1)[:, 0]
    assert pooled is not None, "there is at least one text encoder"
    return jnp.concatenate(joined, axis=-1), pooled


def weigh(states: TextStates, weights: Float[Array, "b s"]) -> TextStates:
    """States multiplied by their weights, then each [s, d] rescaled to its mean before.

    What HCP-Diffusion and AUTOMATIC1111's webui do with weighted prompts; float32 inside.
    """
    whole = states.astype(jnp.float32)
    weighted = whole * weights[:, :, None]
    before, after = (x.mean(axis=(1, 2), keepdims=True) for x in (whole, weighted))
    return (weighted * (before / after)).astype(states.dtype)
