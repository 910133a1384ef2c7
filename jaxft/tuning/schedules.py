"""Learning-rate schedules by the names that configurations use."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxft.errors import UserError

Rate = Callable[[Any], Any]
"""A learning rate as a function of the number of updates made so far."""


def _one_cycle(warmup: int, total: int, div_factor: float = 25.0, final_div_factor: float = 1e4):
    """`torch.optim.lr_scheduler.OneCycleLR` with cosine legs; Smith and Topin 2018.

    Only the rate cycles: betas stay as they are.
    """
    start, end = 1 / div_factor, 1 / div_factor / final_div_factor
    peak = warmup - 1

    def half_cosine(progress):
        return 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))

    def factor(step):
        up = half_cosine(step / max(peak, 1))
        down = half_cosine((step - peak) / max(total - 1 - peak, 1))
        return jnp.where(step <= peak, start + (1 - start) * up, 1 + (end - 1) * down)

    return factor


def _warm(warmup: int, after: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A linear rise from 0 over `warmup` updates, then `after` of the updates since."""
    return lambda step: jnp.where(step < warmup, step / max(warmup, 1), after(step - warmup))


def _constant(warmup: int, total: int):
    return lambda step: jnp.ones_like(step, jnp.float32)


def _constant_with_warmup(warmup: int, total: int):
    return _warm(warmup, lambda since: 1.0)


def _linear(warmup: int, total: int):
    length = max(total - warmup, 1)
    return _warm(warmup, lambda since: jnp.maximum(0.0, (length - since) / length))


def _cosine(warmup: int, total: int, num_cycles: float = 0.5):
    speed = 2 * math.pi * num_cycles / max(total - warmup, 1)
    return _warm(warmup, lambda since: 0.5 + 0.5 * jnp.cos(speed * since))


def _cosine_with_restarts(warmup: int, total: int, num_cycles: int = 1):
    length = max(total - warmup, 1)

    def falling(since):
        progress = since / length
        within = jnp.mod(num_cycles * progress, 1.0)
        return jnp.where(progress < 1, 0.5 + 0.5 * jnp.cos(jnp.pi * within), 0.0)

    return _warm(warmup, falling)


def _polynomial(warmup: int, total: int, power: float = 1.0, end: float = 0.0):
    """`end`: the last factor."""
    length = max(total - warmup, 1)

    def falling(since):
        left = jnp.clip(1 - since / length, 0, 1)
        return end + (1 - end) * left**power

    return _warm(warmup, falling)


def _rex(warmup: int, total: int):
    """Chen et al. 2021, reflected exponential (https://arxiv.org/abs/2107.04197), eq. 4."""
    length = max(total - warmup, 1)

    def falling(since):
        left = jnp.clip(1 - since / length, 0, 1)
        return left / (0.5 + 0.5 * left)

    return _warm(warmup, falling)


def _warmup_stable_decay(warmup: int, total: int, num_decay_steps: int | None = None):
    """Hu et al. 2024 (https://arxiv.org/abs/2404.06395): falls linearly at the end, over a tenth
    of the updates unless told otherwise."""
    decay = max(round(0.1 * total), 1) if num_decay_steps is None else num_decay_steps
    if not 0 <= decay <= total - warmup:
        raise UserError(
            f"train.scheduler.scheduler_kwargs.num_decay_steps: {decay} updates of decay and "
            f"{warmup} of warm-up do not fit into {total}"
        )
    start = total - warmup - decay
    return _warm(warmup, lambda since: jnp.clip(1 - (since - start) / max(decay, 1), 0, 1))


def _piecewise_constant(warmup: int, total: int, step_rules: str = "1"):
    """diffusers' rules, such as `1:100,0.1:200,0.01`: factor:update until which it holds, …,
    the last factor."""
    *rules, last = step_rules.split(",")
    try:
        factors = [float(rule.partition(":")[0]) for rule in rules] + [float(last)]
        ends = [int(rule.partition(":")[2]) for rule in rules]
    except ValueError:
        factors, ends = [], [0, 0]
    if ends != sorted(set(ends)):
        raise UserError(
            f"train.scheduler.scheduler_kwargs.step_rules: {step_rules!r} is not of the form "
            "'1:100,0.1:200,0.01', factor:update until which it holds, …, the last factor"
        )
    return lambda step: jnp.asarray(factors)[jnp.searchsorted(jnp.asarray(ends), step, "right")]


SCHEDULES: dict[str, Callable[..., Callable[[Any], Any]]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "linear": _linear,
    "one_cycle": _one_cycle,
    "piecewise_constant": _piecewise_constant,
    "polynomial": _polynomial,
    "rex": _rex,
    "warmup_stable_decay": _warmup_stable_decay,
}
"""Factors of the rate as functions of (warm-up updates, updates in all); as in diffusers, but for
the last two, which it lacks."""

WITHOUT_WARMUP = ("constant", "piecewise_constant")
"""Schedules that ignore it."""


def schedule(name: str, lr: float, warmup: int, total: int, **options: Any) -> Rate:
    """The rate lr · factor over `total` updates, the first `warmup` of them rising.

    Raises:
        UserError: an unknown name or option, or a warm-up as long as the run.
    """
    if name not in SCHEDULES:
        raise UserError(f"train.scheduler.name: {name!r} is not one of {', '.join(SCHEDULES)}")
    if name not in WITHOUT_WARMUP and warmup >= total:
        raise UserError(
            f"train.scheduler.num_warmup_steps: {warmup} updates of warm-up do not fit into "
            f"{total} updates; lower it or train longer"
        )
    try:
        factor = SCHEDULES[name](warmup, total, **options)
    except TypeError:
        raise UserError(
            f"train.scheduler.scheduler_kwargs: {name} does not take {', '.join(options)}"
        ) from None
    return lambda step: lr * factor(step)
