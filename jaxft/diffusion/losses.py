"""What training minimises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.shapes import Latents


def weighted_mean_squared_error(
    predicted: Latents, wanted: Latents, weight: Float[Array, " b"]
) -> jax.Array:
    """Mean of the images' mean squared errors, each counted by its weight; float32 scalar.

    An image of weight 0 (one that only fills up a batch) changes neither value nor gradient. If
    all weights are 0 the loss is 0.
    """
    difference = predicted.astype(jnp.float32) - wanted.astype(jnp.float32)
    error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))  # [b]
    total = jnp.sum(weight)
    return jnp.sum(weight * error) / jnp.where(total > 0, total, 1)
