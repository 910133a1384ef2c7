"""Adam that finds the size of its rate; Defazio and Mishchenko 2023
(https://arxiv.org/abs/2301.07733)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft.tuning.schedules import Rate


class DAdaptState(NamedTuple):
    """What is remembered of all weights."""

    step: Array
    """Updates made."""
    d: Array
    """The size that was found."""
    numerator: Array
    first: Any
    second: Any
    """Moments; the first in units of the rate."""
    s: Any
    """Weighted sum of the gradients."""


def dadapt_adam(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decouple: bool = False,
    use_bias_correction: bool = False,
    d0: float = 1e-6,
    growth_rate: float = math.inf,
) -> optax.GradientTransformation:
    """`dadaptation.DAdaptAdam`.

    Args:
        learning_rate: a factor of the rate that is found, 1 as a rule; each group finds its own.
        betas: of the moments.
        eps: added to the root of the second.
        weight_decay: times the weight, added to its gradient.
        decouple: whether it is taken off the weight instead, times the rate.
        use_bias_correction: as Adam's.
        d0: size of the rate in the beginning.
        growth_rate: by which it grows at most in an update.
    """
    root = math.sqrt(betas[1])

    def init(params: Any) -> DAdaptState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]
        start = jnp.zeros((), jnp.int32), jnp.asarray(d0, jnp.float32), jnp.zeros(())
        return DAdaptState(*start, *zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, DAdaptState]:
        rate = jnp.asarray(learning_rate(state.step) if callable(learning_rate) else learning_rate)
        count = state.step + 1
        step_size = state.d * rate
        if use_bias_correction:
            step_size *= jnp.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)
        grads = updates
        if not decouple:
            grads = jax.tree.map(lambda g, w: g + weight_decay * w, updates, params)
        along = jax.tree.map(
            lambda g, s, v: jnp.sum(g * s / (jnp.sqrt(v) + eps)), grads, state.s, state.second
        )
        s = _moved(root, state.s, jax.tree.map(lambda g: step_size * g, grads))
        numerator = root * state.numerator + (1 - root) * step_size * sum(jax.tree.leaves(along))
        length = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(s))
        found = numerator / ((1 - root) * jnp.where(length > 0, length, 1))
        d = jnp.maximum(state.d, jnp.minimum(found, state.d * growth_rate))
        first = _moved(betas[0], state.first, jax.tree.map(lambda g: step_size * g, grads))
        second = _moved(betas[1], state.second, jax.tree.map(jnp.square, grads))
        decay = weight_decay * step_size if decouple else 0.0
        changes = jax.tree.map(
            lambda m, v, w: -m / (jnp.sqrt(v) + eps) - decay * w, first, second, params
        )
        new = DAdaptState(count, d, numerator, first, second, s)
        # At rate 0, as a warm-up has it, nothing has been seen.
        new = jax.tree.map(lambda now, old: jnp.where(rate > 0, now, old), new, state)
        changes = jax.tree.map(lambda change: jnp.where(rate > 0, change, 0), changes)
        return changes, new._replace(step=count)

    return optax.GradientTransformation(init, update)


def _moved(beta: float, old: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: beta * a + (1 - beta) * b, old, new)
