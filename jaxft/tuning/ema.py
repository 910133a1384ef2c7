"""Moving averages of what is trained: HCP-Diffusion's `ModelEMA`, whose rule is crowsonkb's."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxft.errors import UserError


class Average(NamedTuple):
    """How an average follows the weights."""

    decay_max: float
    inv_gamma: float
    power: float | None
    """None: the decay is `decay_max` from the first update on."""
    start_step: int
    every: int
    """Updates of the weights to one of the average."""

    def decay(self, update: int) -> float:
        """The average's own share at an update, 1 - (1 + n / inv_gamma)^(-power) up to decay_max;
        n counts updates from 1, and from `start_step` on."""
        if self.power is None:
            return self.decay_max
        n = self.start_step + update
        return float(np.clip(1 - (1 + n / self.inv_gamma) ** -self.power, 0, self.decay_max))

    def share(self, update: int) -> float:
        """The weights' share when the average moves at this update, the last of `every`.

        What was there before is left the share that it would have if the average had moved at
        each of them.
        """
        since = range(update - self.every + 1, update + 1)
        return 1 - float(np.prod([self.decay(n) for n in since]))


def average(
    decay_max: float = 0.9997,
    inv_gamma: float = 1.0,
    power: float | None = 2 / 3,
    start_step: int = 0,
    *,
    every: int = 1,
) -> Average:
    """An average with a decay that grows up to `decay_max`; `power: null`: it is that always.

    Raises:
        UserError: an option without meaning.
    """
    for name, value, fits, wanted in (
        ("decay_max", decay_max, 0 < decay_max < 1, "between 0 and 1"),
        ("inv_gamma", inv_gamma, inv_gamma > 0, "more than 0"),
        ("power", power, power is None or power > 0, "more than 0, or null"),
        ("start_step", start_step, start_step >= 0, "at least 0"),
        ("every", every, every >= 1, "at least 1"),
    ):
        if not fits:
            raise UserError(f"{name}: {value} must be {wanted}")
    return Average(decay_max, inv_gamma, power, start_step, every)


def averaged(average: Any, weights: Any, share: Float[Array, ""] | float) -> Any:
    """The average (a tree of arrays), moved by `share` of its way towards the weights."""
    return jax.tree.map(lambda old, new: old + share * (new - old), average, weights)
