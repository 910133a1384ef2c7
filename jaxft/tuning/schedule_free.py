"""AdamW without a schedule; Defazio et al. 2024 (https://arxiv.org/abs/2405.15682).

Gradients are taken at y, between the point z that AdamW moves and the average x of where it was.
While a run lasts its weights are y; what it makes is x: `result`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import mesh as meshes
from jaxft.tuning.schedules import Rate


class ScheduleFreeState(NamedTuple):
    """What is remembered of all weights."""

    step: Array
    """Updates made."""
    largest: Array
    """Of the rates."""
    total: Array
    """Of the weights in the average."""
    beta: Array
    """y = (1 - beta) z + beta x."""
    z: Any
    second: Any
    """Moments."""


def adamw_schedule_free(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> optax.GradientTransformation:
    """`schedulefree.AdamWScheduleFree`; its warm-up is that of the rate.

    Args:
        learning_rate: constant, or constant after a warm-up.
        betas: the average's share in y; of the second moment.
        eps: added to its root.
        weight_decay: times the rate, off y.
        r: power of the number of updates, in an update's weight in the average.
        weight_lr_power: power of the largest rate so far, likewise.
    """

    def init(params: Any) -> ScheduleFreeState:
        zero = jnp.zeros(())
        z, second = jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params)
        beta = jnp.asarray(betas[0], jnp.float32)
        return ScheduleFreeState(jnp.zeros((), jnp.int32), zero, zero, beta, z, second)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count = state.step + 1
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        largest = jnp.maximum(state.largest, rate)
        weight = count**r * largest**weight_lr_power
        total = state.total + weight
        share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)
        second = jax.tree.map(
            lambda v, grad: betas[1] * v + (1 - betas[1]) * jnp.square(grad), state.second, updates
        )

        def direction(grad: Array, v: Array, y: Array) -> Array:
            root = jnp.sqrt(v / (1 - betas[1] ** count)) + eps
            return grad / root + weight_decay * y

        along = jax.tree.map(direction, updates, second, params)
        changes = jax.tree.map(
            lambda d, y, z: share * (z - y) + rate * (betas[0] * (1 - share) - 1) * d,
            along,
            params,
            state.z,
        )
        z = jax.tree.map(lambda z, d: z - rate * d, state.z, along)
        return changes, ScheduleFreeState(count, largest, total, state.beta, z, second)

    return optax.GradientTransformation(init, update)


def result(opt_state: Any, weights: Any) -> Any:
    """What training has made: x of the weights that this optimizer moves, the others as they are.

    Args:
        opt_state: of any optimizer.
        weights: that it moves.
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, ScheduleFreeState)

    for state in filter(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours)):
        weights = jax.tree.map(
            lambda y, z, beta=state.beta: (
                y if isinstance(z, optax.MaskedNode) else y + (1 - 1 / beta) * (z - y)
            ),
            weights,
            meshes.on_device(state.z),
        )
    return weights
