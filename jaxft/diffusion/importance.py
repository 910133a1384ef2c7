"""Timesteps drawn the more often the larger their losses have been, each then counting the less.

`LossSecondMomentResampler` of improved diffusion; Nichol and Dhariwal 2021, section 3.3
(https://arxiv.org/abs/2102.09672): a timestep's chance grows with the root of the mean square of
its last losses, and a loss is divided by its chance, so that what is learnt stays the same in the
mean, with less noise. There each timestep has losses of its own; here the timesteps of a range
share them, so that a short run has enough. With as many ranges as timesteps both are the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import UserError
from jaxft.shapes import Timesteps


class Recipe(NamedTuple):
    """How chances follow from losses."""

    num_timesteps: int
    ranges: int
    """Into which timesteps are divided, equally."""
    history: int
    """Losses of each range that are remembered; until there are so many, all chances are alike."""
    uniform: float
    """Share of the draws in which all chances are alike."""


class Memory(NamedTuple):
    """The last losses of data sets; of one alone the first axis is not there."""

    losses: Float[Array, "*d r n"]
    """Of each range, in no order."""
    counts: Int[Array, "*d r"]
    """Losses that each range has had."""


class Found(NamedTuple):
    """Losses of one data set, new ones."""

    losses: Float[Array, " b"]
    timesteps: Timesteps
    is_counted: Bool[Array, " b"]


def recipe(
    num_timesteps: int, ranges: int = 20, history: int = 10, uniform: float = 0.001
) -> Recipe:
    """See `Recipe`.

    Raises:
        UserError: a number that is none of those meant.
    """
    for name, value, most in (("ranges", ranges, num_timesteps), ("history", history, None)):
        if not isinstance(value, int) or value < 1 or (most and value > most):
            end = f" to {most}" if most else ""
            raise UserError(f"{name}: {value} must be a whole number from 1{end}")
    if not 0 < uniform <= 1:
        raise UserError(
            f"uniform: {uniform} must be above 0, so that no timestep is left out, to 1"
        )
    return Recipe(num_timesteps, ranges, history, uniform)


def begin(how: Recipe, num_datasets: int) -> Memory:
    """No losses yet."""
    shape = (num_datasets, how.ranges)
    return Memory(jnp.zeros((*shape, how.history)), jnp.zeros(shape, jnp.int32))


def chances(how: Recipe, memory: Memory) -> Float[Array, " T"]:
    """Of each timestep, for one data set; they add up to 1."""
    size = jnp.sqrt(jnp.mean(memory.losses**2, axis=-1))[_range(how, jnp.arange(how.num_timesteps))]
    total = jnp.sum(size)
    is_known = jnp.all(memory.counts >= how.history) & (total > 0)
    alike = 1 / how.num_timesteps
    found = (1 - how.uniform) * size / jnp.where(is_known, total, 1) + how.uniform * alike
    return jnp.where(is_known, found, alike)


def remember(how: Recipe, memory: Memory, found: Sequence[Found]) -> Memory:
    """The memory with more losses of each data set; the oldest go."""
    kept = [
        _remember(how, Memory(memory.losses[number], memory.counts[number]), own)
        for number, own in enumerate(found)
    ]
    return jax.tree.map(lambda *of_each: jnp.stack(of_each), *kept)


def _remember(how: Recipe, memory: Memory, found: Found) -> Memory:
    own, counted = _range(how, found.timesteps), found.is_counted
    is_in = (own[:, None] == jnp.arange(how.ranges)) & counted[:, None]
    place = jnp.cumsum(is_in, axis=0)[jnp.arange(len(own)), own] - 1  # among those of its range
    more = jnp.sum(is_in, axis=0)
    is_kept = counted & (place >= more[own] - how.history)
    row = jnp.where(is_kept, own, how.ranges)  # a row that is not there: left out
    slot = (memory.counts[own] + place) % how.history
    kept = memory.losses.at[row, slot].set(found.losses, mode="drop")
    return Memory(kept, memory.counts + more)


def _range(how: Recipe, timesteps: Array) -> Array:
    return timesteps * how.ranges // how.num_timesteps
