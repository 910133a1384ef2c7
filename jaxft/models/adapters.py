"""Adapters: small factors that change what a frozen layer does, and are trained in its place.

| kind | the layer's weight W becomes | source |
|---|---|---|
| lora | W + s · up · down | Hu et al. 2021 (https://arxiv.org/abs/2106.09685) |
| locon | the same; down of a kernel is mid · down, Tucker's form | Yeh et al. 2023, 2309.14859 |
| loha | W + s · (w1_a · w1_b) ∘ (w2_a · w2_b) | Hyeon-Woo et al. 2021 (arXiv 2108.06098) |
| lokr | W + s · w1 ⊗ w2 | Yeh et al. 2023 |
| dora | (W + s · up · down) · dora_scale / norms of its columns | Liu et al. 2024, 2402.09353 |
| oft | R · W, R of orthogonal blocks | Qiu et al. 2023 (https://arxiv.org/abs/2306.07280) |

The names of factors are those of LyCORIS' files, but `down`, `mid` and `up` for `lora_….weight`. An
adapter works beside its layer, which maps an input by the factors as it does by its own weight: no
kind forms the gradient of W, nor, but for DoRA's norms, a matrix of its size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Factors = Mapping[str, Array]


class Work(NamedTuple):
    """A layer at work on an input."""

    x: Float[Array, "... i"]
    y: Float[Array, "... o"]
    """What it makes of x, without its bias."""
    weight: Array
    product: Callable[[Array, Array], Array]
    """What it would make of an input by another weight."""
    scale: float
    drop: Callable[[Array], Array]
    """For what lies between two factors."""


class Adapter(nnx.Module):
    """An adapter of one layer, by its kind.

    Args:
        kind: a name in `FORWARD`.
        shapes: of the factors.
        scale: s above; of `oft` the limit that `rotation` takes, for each output.
        dropout: share of the values between two factors that is dropped; `key` says which.
        rank_dropout: share of the ranks that is dropped, for each input by itself.
    """

    def __init__(
        self,
        kind: str,
        shapes: Mapping[str, tuple[int, ...]],
        scale: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
    ):
        self.kind, self.names, self.scale = kind, tuple(shapes), scale
        self.dropout, self.rank_dropout = dropout, rank_dropout
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))
        is_random = dropout or rank_dropout
        self.key = nnx.Param(jax.random.key(0)) if is_random else nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "... i"],
        y: Float[Array, "... o"],
        weight: Any,
        product: Callable[[Array, Any], Array],
    ) -> Float[Array, "... o"]:
        factors = {name: jnp.asarray(getattr(self, name)[...]) for name in self.names}
        work = Work(x, y, jnp.asarray(weight), product, self.scale, self._drop)
        return FORWARD[self.kind](factors, work).astype(y.dtype)

    def _drop(self, inner: Float[Array, "b ... r"]) -> Float[Array, "b ... r"]:
        if self.key is None:
            return inner
        value_key, rank_key = jax.random.split(self.key[...])
        ranks = (len(inner), *(1,) * (inner.ndim - 2), inner.shape[-1])
        for key, share, shape in (
            (value_key, self.dropout, inner.shape),
            (rank_key, self.rank_dropout, ranks),
        ):
            kept = jax.random.bernoulli(key, 1 - share, shape) if share else True
            inner = jnp.where(kept, inner / (1 - share), 0)
        return inner


def adapt(network: nnx.Module, module: str, adapters: Sequence[Adapter]) -> None:
    """Gives a network's layer its adapters; their factors are `<module>.lora.<number>.<factor>`,
    and there is a `.key` where something is dropped."""
    layer: Any = network
    for name in module.split("."):
        layer = layer[int(name)] if name.isdigit() else getattr(layer, name)
    layer.lora = nnx.List(list(adapters))


# ------------------------------------------------------------------------- factors of low rank


def low_rank(factors: Factors, shape: Sequence[int]) -> tuple[Array, Array]:
    """`down` [r, i, …] and `up` [o, r] of a layer whose weight has this shape.

    The Hadamard product of two products of rank r is one of rank r²: its factors are all products
    of a column (a row) of the one with a column (a row) of the other.
    """
    if "hada_w1_a" not in factors:
        down, up = factors["down"], factors["up"]
        if "mid" in factors:
            down = jnp.einsum("mn...,ni->mi...", factors["mid"], down.reshape(len(down), -1))
        return down, up.reshape(len(up), -1)
    (down1, up1), (down2, up2) = (_half(factors, number, shape) for number in (1, 2))
    down = (down1[:, None] * down2[None]).reshape(-1, *shape[1:])
    return down, (up1[:, :, None] * up2[:, None, :]).reshape(shape[0], -1)


def _half(factors: Factors, number: int, shape: Sequence[int]) -> tuple[Array, Array]:
    """`down` and `up` of one of the two products of `loha`."""
    a, b = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
    if f"hada_t{number}" in factors:
        return jnp.einsum("mn...,ni->mi...", factors[f"hada_t{number}"], b), a.T
    return b.reshape(len(b), *shape[1:]), a


def kronecker(factors: Factors) -> tuple[Array, Array]:
    """w1 [o1, i1] and w2 [o2, i2, …] of `lokr`."""
    w1, w2 = factors.get("lokr_w1"), factors.get("lokr_w2")
    if w1 is None:
        w1 = factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if w2 is not None:
        return w1, w2
    a, b = factors["lokr_w2_a"], factors["lokr_w2_b"]
    if "lokr_t2" in factors:
        return w1, jnp.einsum("mn...,mo,ni->oi...", factors["lokr_t2"], a, b)
    return w1, a @ b


def rotation(blocks: Float[Array, "n s s"], limit: float) -> Float[Array, "n s s"]:
    """Orthogonal blocks, by Cayley's transform of the skew-symmetric part of `blocks`; the norm of
    the latter is held at `limit`, if that is not 0."""
    q = blocks - blocks.transpose(0, 2, 1)
    square = jnp.sum(jnp.square(q))
    over = (square > limit**2) & (limit > 0)
    q = jnp.where(over, limit / jnp.sqrt(jnp.where(over, square, 1.0)), 1.0) * q
    identity = jnp.eye(q.shape[1])
    return jnp.linalg.solve(identity - q, identity + q)


def norms(weight: Array, scale: Array) -> Array:
    """Norms of a weight's columns, or of its rows, as the shape of `dora_scale` says; float32."""
    axes = [axis for axis, size in enumerate(scale.shape) if size == 1]
    squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axes, keepdims=True)
    return jnp.sqrt(squares) + jnp.finfo(jnp.float32).eps


# ------------------------------------------------------------------------------------- at work


def _added(factors: Factors, work: Work) -> Array:
    down, up = low_rank(factors, work.weight.shape)
    inner = work.drop(work.product(work.x, down))
    return work.scale * jnp.einsum("...r,or->...o", inner, up.astype(inner.dtype))


def _low_rank(factors: Factors, work: Work) -> Array:
    return work.y + _added(factors, work)


def _kronecker(factors: Factors, work: Work) -> Array:
    """(w1 ⊗ w2) x: w2 maps each of the i1 parts of x, w1 mixes what comes out."""
    w1, w2 = kronecker(factors)
    parts, x = w1.shape[1], work.x
    x = x.reshape(*x.shape[:-1], parts, -1)  # [..., i1, i2]
    if work.weight.ndim == 2:
        inner = work.product(x, w2)
    else:
        w2 = w2.reshape(len(w2), -1, *work.weight.shape[2:])
        x = jnp.moveaxis(x, -2, 1)
        inner = work.product(x.reshape(-1, *x.shape[2:]), w2)
        inner = jnp.moveaxis(inner.reshape(len(x), parts, *inner.shape[1:]), 1, -2)
    added = jnp.einsum("...ik,oi->...ok", inner, w1.astype(inner.dtype))
    return work.y + work.scale * added.reshape(work.y.shape)


def _decomposed(factors: Factors, work: Work) -> Array:
    """The paper's section 4.3: the norms count as constants in the gradient."""
    down, up = low_rank(factors, work.weight.shape)
    changed = work.weight.astype(jnp.float32) + work.scale * jnp.tensordot(up, down, 1)
    scale = factors["dora_scale"]
    share = scale / jax.lax.stop_gradient(norms(changed, scale))
    # A column is what one channel of the input meets. Not in bfloat16, where 1.001 is 1.
    x = (work.x.astype(jnp.float32) * share.reshape(-1)).astype(work.x.dtype)
    y = work.product(x, work.weight)
    return _low_rank(factors, work._replace(x=x, y=y))


def _rotated(factors: Factors, work: Work) -> Array:
    """R (W x): what the layer makes, rotated block by block."""
    y, blocks = work.y, factors["oft_blocks"]
    turn = rotation(blocks, work.scale * y.shape[-1]) - jnp.eye(blocks.shape[1])
    parts = y.reshape(*y.shape[:-1], *blocks.shape[:2])
    return y + jnp.einsum("...kn,knm->...km", parts, turn.astype(y.dtype)).reshape(y.shape)


FORWARD: dict[str, Callable[[Factors, Work], Array]] = {
    "lora": _low_rank,
    "locon": _low_rank,
    "loha": _low_rank,
    "lokr": _kronecker,
    "dora": _decomposed,
    "oft": _rotated,
}
"""Kind -> what a layer makes of an input with an adapter of that kind, without its bias."""


# ------------------------------------------------------------------------------- shapes to train


def _pair(width: int, factor: int) -> tuple[int, int]:
    """Two factors of a width: the first is `factor` if that divides it, else the greatest divisor
    below; -1: up to the root. The second is no less than the first."""
    most = math.isqrt(width) if factor < 0 else min(factor, math.isqrt(width))
    small = next(n for n in range(most, 0, -1) if width % n == 0)
    return small, width // small


def _lora_shapes(shape: tuple[int, ...], rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    return {"down": (rank, *shape[1:]), "up": (shape[0], rank, *(1,) * (len(shape) - 2))}


def _locon_shapes(shape: tuple[int, ...], rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    if not has_kernel(shape):
        return _lora_shapes(shape, rank, factor)
    ends = (1,) * (len(shape) - 2)
    return {
        "down": (rank, shape[1], *ends),
        "mid": (rank, rank, *shape[2:]),
        "up": (shape[0], rank, *ends),
    }


def _loha_shapes(shape: tuple[int, ...], rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    sides = {"a": (shape[0], rank), "b": (rank, math.prod(shape[1:]))}
    return {f"hada_w{n}_{side}": size for n in (1, 2) for side, size in sides.items()}


def _lokr_shapes(shape: tuple[int, ...], rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    (o1, o2), (i1, i2) = _pair(shape[0], factor), _pair(shape[1], factor)
    if rank >= max(o2, i2) / 2:
        return {"lokr_w1": (o1, i1), "lokr_w2": (o2, i2, *shape[2:])}
    columns = i2 * math.prod(shape[2:])
    return {"lokr_w1": (o1, i1), "lokr_w2_a": (o2, rank), "lokr_w2_b": (rank, columns)}


def _dora_shapes(shape: tuple[int, ...], rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    columns = (1, shape[1], *(1,) * (len(shape) - 2))
    return _lora_shapes(shape, rank, factor) | {"dora_scale": columns}


def _oft_shapes(shape: tuple[int, ...], rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    size, count = _pair(shape[0], rank)
    return {"oft_blocks": (count, size, size)}


SHAPES: dict[str, Callable[[tuple[int, ...], int, int], dict[str, tuple[int, ...]]]] = {
    "lora": _lora_shapes,
    "locon": _locon_shapes,
    "loha": _loha_shapes,
    "lokr": _lokr_shapes,
    "dora": _dora_shapes,
    "oft": _oft_shapes,
}
"""Kind -> shapes of the factors for the shape of a weight, a rank (of `oft` the side of a block, at
most), and what `lokr` divides widths by."""


def has_kernel(shape: Sequence[int]) -> bool:
    """Whether a weight is that of a convolution over more than one pixel."""
    return math.prod(shape[2:]) > 1
