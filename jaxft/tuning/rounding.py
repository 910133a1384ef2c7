"""Stochastic rounding: float32 to bfloat16, up or down by chance, right in the mean.

A change of less than 1/256 of a number is lost when the sum is rounded to the nearest bfloat16; so
it counts as often as it is large. What is kept takes half the memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, BFloat16, Float32, UInt32

LOST = 16
"""Bits of a float32 that a bfloat16 lacks."""

SEED = 0x5D
"""Of the chances, which are the step's: the same in every run."""


def stochastic(value: Float32[Array, "..."], seed: UInt32[Array, ""]) -> BFloat16[Array, "..."]:
    """The value rounded to one of its two neighbours, whose mean, weighted by chance, it is."""
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    places = jax.lax.iota(jnp.uint32, value.size).reshape(value.shape)
    chance = _hash(_hash(places) ^ seed) >> LOST
    up_or_down = (bits + chance) >> LOST << LOST
    found = jax.lax.bitcast_convert_type(up_or_down, jnp.float32)
    return jnp.where(jnp.isfinite(value), found, value).astype(jnp.bfloat16)


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """PCG-RXS-M-XS's output; Jarzynski and Olano 2020 (https://jcgt.org/published/0009/03/02/).

    A dozen operations that fuse with what is rounded; JAX's own numbers would be a program of their
    own for each tensor.
    """
    x = x * np.uint32(747796405) + np.uint32(2891336453)
    x = ((x >> ((x >> 28) + 4)) ^ x) * np.uint32(277803737)
    return (x >> 22) ^ x


def like(tree: Any, dtypes: Any, step: Any) -> Any:
    """A tree of float32 in the dtypes of another one's leaves, by the chances of a step."""
    leaves, structure = jax.tree.flatten(tree)
    wanted = [leaf.dtype for leaf in jax.tree.leaves(dtypes)]
    if jnp.bfloat16 not in wanted:
        return tree
    key = jax.random.fold_in(jax.random.key(SEED), step)
    seeds = jax.random.bits(key, (len(leaves),), jnp.uint32)
    rounded = [
        stochastic(leaf, seed) if dtype == jnp.bfloat16 else leaf
        for leaf, dtype, seed in zip(leaves, wanted, seeds, strict=True)
    ]
    return structure.unflatten(rounded)


class HalvedState(NamedTuple):
    """What an optimizer remembers, arrays in bfloat16."""

    step: Array
    """Updates made."""
    inner: Any


def halved(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, which remembers float32 arrays in bfloat16, stochastically rounded."""

    def half(leaf: Array) -> Array:
        kept = leaf.ndim == 0 or leaf.dtype != jnp.float32
        return leaf if kept else leaf.astype(jnp.bfloat16)

    def whole(leaf: Array) -> Array:
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    def init(params: Any) -> HalvedState:
        return HalvedState(jnp.zeros((), jnp.int32), jax.tree.map(half, optimizer.init(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, HalvedState]:
        inner = jax.tree.map(whole, state.inner)
        updates, inner = optimizer.update(updates, inner, params)
        return updates, HalvedState(state.step + 1, like(inner, state.inner, state.step))

    return optax.GradientTransformation(init, update)
