"""Adapters of other kinds than LoRA, on the host: what `models.adapters` has at work.

How such factors lie in files is `formats.lora`'s matter.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models import adapters
from jaxft.models.adapters import Factors

RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Factors with a row for each rank, one of which a kind has that has a rank."""


class Change(NamedTuple):
    """An adapter of one layer."""

    kind: str
    """See `models.adapters`; not `lora`, which is `low_rank.LowRank`."""
    factors: Mapping[str, Any]
    alpha: float

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None: by nothing."""
        return rank(self.factors)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by; of `oft` the limit of a turn."""
        return scale(self.kind, self.factors, self.alpha)

    def delta(self, weight: Any) -> np.ndarray:
        """What is added to the layer's weight at strength 1, float32, in the weight's shape."""
        weight = np.asarray(weight, np.float32)
        with jax.default_device(jax.devices("cpu")[0]):
            factors = {n: jnp.asarray(v, jnp.float32) for n, v in self.factors.items()}
            changed = WEIGHTS[self.kind](factors, jnp.asarray(weight), self.scale)
            return np.asarray(changed) - weight

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the factors are those of a weight of this shape."""
        whole = {n: jax.ShapeDtypeStruct(v.shape, np.float32) for n, v in self.factors.items()}
        weight = jax.ShapeDtypeStruct(shape, np.float32)
        form = WEIGHTS[self.kind]
        try:
            made = jax.eval_shape(lambda f, w: form(f, w, self.scale), whole, weight)
            return made.shape == shape
        except (TypeError, ValueError, IndexError):  # what JAX raises of shapes that do not fit
            return False


def rank(factors: Mapping[str, Any]) -> int | None:
    """What alpha is divided by, or None: of `oft`, and of `lokr` where both factors are whole."""
    return next((len(factors[name]) for name in RANKED if name in factors), None)


def scale(kind: str, factors: Mapping[str, Any], alpha: float) -> float:
    """What the product of the factors is multiplied by; of `oft` the limit of a turn is alpha."""
    if kind == "oft":
        return alpha
    ranks = rank(factors)
    return alpha / ranks if ranks else 1.0


def _low_rank(factors: Factors, weight: jax.Array, scale: float) -> jax.Array:
    down, up = adapters.low_rank(factors, weight.shape)
    return weight + scale * jnp.tensordot(up, down, 1).reshape(weight.shape)


def _decomposed(factors: Factors, weight: jax.Array, scale: float) -> jax.Array:
    changed, magnitude = _low_rank(factors, weight, scale), factors["dora_scale"]
    return changed * (magnitude / adapters.norms(changed, magnitude))


def _kronecker(factors: Factors, weight: jax.Array, scale: float) -> jax.Array:
    w1, w2 = adapters.kronecker(factors)
    product = jnp.kron(w1, w2.reshape(len(w2), -1))
    return weight + scale * product.reshape(weight.shape)


def _rotated(factors: Factors, weight: jax.Array, scale: float) -> jax.Array:
    turn = adapters.rotation(factors["oft_blocks"], scale * len(weight))
    parts = weight.reshape(*turn.shape[:2], -1)
    return jnp.einsum("knm,kni->kmi", turn, parts).reshape(weight.shape)


WEIGHTS: dict[str, Callable[[Factors, jax.Array, float], jax.Array]] = {
    "locon": _low_rank,
    "loha": _low_rank,
    "lokr": _kronecker,
    "dora": _decomposed,
    "oft": _rotated,
}
"""Kind -> the weight that a weight becomes."""
