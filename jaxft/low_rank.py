"""Low-rank changes of weights: LoRA, Hu et al. 2021 (https://arxiv.org/abs/2106.09685).

A layer's weight is changed by `alpha / rank · up · down`. How such factors lie in files is
`formats.lora`'s matter.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.errors import UserError
from jaxft.lycoris import Change
from jaxft.patterns import match


class LowRank(NamedTuple):
    """The factors of one layer: down [r, i] or [r, i, h, w], up [o, r] or [o, r, 1, 1]."""

    down: Any
    up: Any
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def delta(self, weight: Any = None) -> np.ndarray:
        """What is added to the layer's weight (whatever it is) at strength 1, float32."""
        down, up = (np.asarray(factor, np.float32) for factor in (self.down, self.up))
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        return self.scale * product.reshape(len(up), *down.shape[1:])


Layers = dict[str, LowRank | Change]
"""Module -> factors."""

Lora = dict[str, Layers]
"""Network's folder -> module -> factors."""


def choose(
    layers: Mapping[str, LowRank | Change],
    weights: Mapping[str, Any],
    patterns: str | Sequence[str],
    source: str,
) -> Layers:
    """The layers of a network's LoRA that patterns take (`jaxft.patterns`; `'all'`: all).

    Raises:
        UserError: there are none.
    """
    chosen = dict(layers)
    if patterns != "all":
        wanted = [patterns] if isinstance(patterns, str) else patterns
        taken = set(match(wanted, weights, f"{source}: layers"))
        chosen = {module: low for module, low in layers.items() if f"{module}.weight" in taken}
    if not chosen:
        raise UserError(f"{source}: layers: none of its layers lie in {patterns!r}")
    return chosen


def merge(
    weights: Mapping[str, Any], layers: Mapping[str, LowRank | Change], strength: float = 1.0
) -> dict[str, Any]:
    """Weights with a network's LoRA added, each in its own dtype; the rest are shared."""
    merged = dict(weights)
    for module, low in layers.items():
        name = f"{module}.weight"
        weight = np.asarray(merged[name])
        delta = low.delta(weight).reshape(weight.shape)
        merged[name] = (weight.astype(np.float32) + strength * delta).astype(weight.dtype)
    return merged


def extract(tuned: Any, base: Any, rank: int) -> LowRank:
    """The best factors of this rank for the difference of two weights, by SVD; alpha = rank.

    Eckart and Young 1936. The singular values are shared out evenly between the factors.
    """
    difference = np.asarray(tuned, np.float32) - np.asarray(base, np.float32)
    flat = difference.reshape(len(difference), -1)
    rank = min(rank, *flat.shape)
    u, s, vt = np.linalg.svd(flat, full_matrices=False)
    root = np.sqrt(s[:rank])
    down = (root[:, None] * vt[:rank]).reshape(rank, *difference.shape[1:])
    up = u[:, :rank] * root
    return LowRank(down, up.reshape(*up.shape, *(1,) * (difference.ndim - 2)), float(rank))
