"""Optimizers whose second moments are outer products of a row and a column: little to remember.

Of a tensor's last two axes only the means over each are kept; vectors and scalars keep all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft.errors import UserError
from jaxft.tuning.schedules import Rate


class FactoredState(NamedTuple):
    """Of all weights, in the order of the tree's leaves."""

    step: Array
    """Updates made."""
    weights: list[dict[str, Array]]
    """What an optimizer remembers of each weight."""


def adafactor(
    learning_rate: float | Rate,
    *,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = False,
    warmup_init: bool = False,
) -> optax.GradientTransformation:
    """`transformers.optimization.Adafactor`; Shazeer and Stern 2018
    (https://arxiv.org/abs/1804.04235).

    Args:
        learning_rate: of a group; times the weight's root mean square with `scale_parameter`.
        eps: added to the squared gradient; least root mean square of a weight.
        clip_threshold: largest root mean square of an update.
        decay_rate: power of the number of updates, by which old squares are forgotten.
        beta1: of the momentum; None: none is kept.
        weight_decay: times the rate, off each weight.
        scale_parameter: see `learning_rate`.
        relative_step: must be false: groups have rates.
        warmup_init: must be false, as it belongs to `relative_step`.

    Raises:
        UserError: `relative_step` or `warmup_init`.
    """
    if relative_step or warmup_init:
        raise UserError(
            "relative_step and warmup_init would replace the rates of the groups and the schedule; "
            "set both to false"
        )

    def init(weight: Array) -> dict[str, Array]:
        momentum = {} if beta1 is None else {"momentum": jnp.zeros_like(weight)}
        return _means(weight, "square") | momentum

    def update(grad: Array, old: dict[str, Array], weight: Array, count: Array, rate: Array):
        beta2 = 1 - (count + 1.0) ** decay_rate
        new = _averaged(old, jnp.square(grad) + eps[0], beta2, "square")
        change = _clipped(grad * _inverse_root(new, "square"), clip_threshold)
        if scale_parameter:
            rate = rate * jnp.maximum(eps[1], _rms(weight))
        change = rate * change
        if beta1 is not None:
            change = new["momentum"] = beta1 * old["momentum"] + (1 - beta1) * change
        return -change - rate * weight_decay * weight, new

    return _of_each(learning_rate, init, update)


def came(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """`came_pytorch.CAME`; Luo et al. 2023 (https://arxiv.org/abs/2307.02047).

    Args:
        learning_rate: of a group.
        betas: of the momentum, of the squares, of the momentum's squared error.
        eps: added to the squared gradient; added to that error.
        clip_threshold: largest root mean square of an update.
        weight_decay: times the rate, off each weight.
    """

    def init(weight: Array) -> dict[str, Array]:
        error = _means(weight, "error") if weight.ndim > 1 else {}
        return _means(weight, "square") | error | {"momentum": jnp.zeros_like(weight)}

    def update(grad: Array, old: dict[str, Array], weight: Array, count: Array, rate: Array):
        new = _averaged(old, jnp.square(grad) + eps[0], betas[1], "square")
        change = _clipped(grad * _inverse_root(new, "square"), clip_threshold)
        momentum = betas[0] * old["momentum"] + (1 - betas[0]) * change
        confident = momentum
        if weight.ndim > 1:
            error = jnp.square(change - momentum) + eps[1]
            new |= _averaged(old, error, betas[2], "error")
            confident = momentum * _inverse_root(new, "error")
        return -rate * (confident + weight_decay * weight), new | {"momentum": momentum}

    return _of_each(learning_rate, init, update)


def _of_each(
    learning_rate: float | Rate, init: Callable[[Array], Any], update: Callable[..., Any]
) -> optax.GradientTransformation:
    """An optimizer that treats each weight by itself.

    Args:
        learning_rate: a number, or a function of the updates made.
        init: of a weight: what is remembered of it.
        update: of (gradient, what is remembered, weight, updates made, rate): the change, and what
            is remembered then.
    """

    def init_all(params: Any) -> FactoredState:
        return FactoredState(jnp.zeros((), jnp.int32), [init(w) for w in jax.tree.leaves(params)])

    def update_all(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        count = state.step
        rate = jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)
        weights, structure = jax.tree.flatten(params)
        leaves = zip(jax.tree.leaves(updates), state.weights, weights, strict=True)
        pairs = [update(grad, old, weight, count, rate) for grad, old, weight in leaves]
        changes = structure.unflatten([change for change, _ in pairs])
        return changes, FactoredState(count + 1, [new for _, new in pairs])

    return optax.GradientTransformation(init_all, update_all)


def _means(like: Array, name: str) -> dict[str, Array]:
    """Zeros for the means over a tensor's last axis and its last but one."""
    if like.ndim < 2:
        return {name: jnp.zeros_like(like)}
    *start, rows, columns = like.shape
    return {
        f"{name}_rows": jnp.zeros((*start, rows), like.dtype),
        f"{name}_columns": jnp.zeros((*start, columns), like.dtype),
    }


def _averaged(old: dict[str, Array], value: Array, beta: Any, name: str) -> dict[str, Array]:
    """The moving averages of a value's means."""
    if value.ndim < 2:
        means = {name: value}
    else:
        means = {f"{name}_rows": value.mean(-1), f"{name}_columns": value.mean(-2)}
    return {key: beta * old[key] + (1 - beta) * mean for key, mean in means.items()}


def _inverse_root(means: dict[str, Array], name: str) -> Array:
    """1 / √ of what the means stand for."""
    if name in means:
        return jax.lax.rsqrt(means[name])
    rows, columns = means[f"{name}_rows"], means[f"{name}_columns"]
    rows = jax.lax.rsqrt(rows / rows.mean(-1, keepdims=True))
    return rows[..., None] * jax.lax.rsqrt(columns)[..., None, :]


def _clipped(change: Array, most: float) -> Array:
    """The change, its root mean square at most so large."""
    return change / jnp.maximum(1.0, _rms(change) / most)


def _rms(value: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(value)))
