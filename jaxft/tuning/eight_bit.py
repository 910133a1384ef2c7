"""AdamW whose moments take a byte each; Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861).

A tensor is cut into blocks of `BLOCK` scalars. A block is its largest size, float32, and for each
scalar the number of the nearest of 256 values, by which that size is multiplied: 2.03 bytes for the
two moments. Norms and biases keep theirs in float32.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from jaxft.tuning.optimizers import PACKED, SMALL, adamw, is_vector, split
from jaxft.tuning.schedules import Rate

BLOCK = 256
"""As in bitsandbytes; the paper has 2048."""

DECADES = 7
"""Of the values' sizes."""


def values(signed: bool) -> Float[np.ndarray, "256"]:
    """The paper's dynamic map: 0, 1, and in each of seven decades below 1 (of each sign) evenly
    spaced values, twice as many as in the decade below; rising."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        ends = np.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        sizes = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - DECADES + 1)
        found += [*sizes, *(-sizes if signed else ())]
    return np.sort(np.asarray(found, np.float32))


class Blocks(NamedTuple):
    """A quantised tensor of n blocks."""

    codes: UInt8[Array, "n block"]
    size: Float[Array, " n"]


def quantise(tensor: Float[Array, "n block"], *, signed: bool) -> Blocks:
    """The nearest values; where not signed, only 0 is 0: a second moment that were would make an
    update boundless."""
    table = values(signed)
    size = jnp.max(jnp.abs(tensor), axis=1)
    shares = tensor / jnp.where(size > 0, size, 1)[:, None]
    between = jnp.asarray((table[1:] + table[:-1]) / 2)
    codes = jnp.searchsorted(between, shares, method="scan_unrolled").astype(jnp.uint8)
    return Blocks(codes if signed else jnp.maximum(codes, (tensor > 0).astype(jnp.uint8)), size)


def dequantise(blocks: Blocks, *, signed: bool) -> Float[Array, "n block"]:
    """What the numbers stand for, float32."""
    return jnp.asarray(values(signed))[blocks.codes] * blocks.size[:, None]


class EightBitState(NamedTuple):
    """Moments of all matrices, in blocks."""

    step: Array
    """Updates made."""
    first: dict[str, Blocks]
    second: dict[str, Blocks]


def adamw_8bit(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> optax.GradientTransformation:
    """`bitsandbytes.optim.AdamW8bit`, on any device: plain XLA."""
    variants = {
        "matrix": _in_blocks(learning_rate, betas, eps, weight_decay),
        "vector": adamw(learning_rate, betas=betas, eps=eps, weight_decay=weight_decay),
    }
    return split(variants, lambda name, w: "vector" if is_vector(name, w.ndim) else "matrix")


def _in_blocks(
    learning_rate: float | Rate, betas: tuple[float, float], eps: float, weight_decay: float
) -> optax.GradientTransformation:
    def init(params: Any) -> EightBitState:
        zeros = jax.tree.map(jnp.zeros_like, _cut(params))
        first, second = (
            {name: quantise(zero, signed=signed) for name, zero in zeros.items()}
            for signed in (True, False)
        )
        return EightBitState(jnp.zeros((), jnp.int32), first, second)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count = state.step + 1
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        grads, weights = _cut(updates), _cut(params)
        changes, first, second = {}, {}, {}
        for name, grad in grads.items():
            m, v = (
                beta * dequantise(old[name], signed=signed) + (1 - beta) * power
                for beta, old, signed, power in (
                    (betas[0], state.first, True, grad),
                    (betas[1], state.second, False, jnp.square(grad)),
                )
            )
            first[name], second[name] = quantise(m, signed=True), quantise(v, signed=False)
            m, v = m / (1 - betas[0] ** count), v / (1 - betas[1] ** count)
            changes[name] = -rate * (m / (jnp.sqrt(v) + eps) + weight_decay * weights[name])
        return _joined(changes, params), EightBitState(count, first, second)

    return optax.GradientTransformation(init, update)


def _cut(tree: Any) -> dict[str, Float[Array, "n block"]]:
    """A tree's tensors in whole blocks, filled up with zeros; the small ones as one."""
    cut, small = {}, []
    for path, leaf in jax.tree.leaves_with_path(tree):
        blocks = jnp.pad(leaf.ravel(), (0, -leaf.size % BLOCK)).reshape(-1, BLOCK)
        if leaf.size > SMALL:
            cut[jax.tree_util.keystr(path)] = blocks
        else:
            small.append(blocks)
    return cut | ({PACKED: jnp.concatenate(small)} if small else {})


def _joined(cut: dict[str, Array], like: Any) -> Any:
    """The tree whose tensors were cut."""
    start = 0

    def take(path: Any, leaf: Any) -> Array:
        nonlocal start
        blocks = cut.get(jax.tree_util.keystr(path))
        if blocks is None:
            count = math.ceil(leaf.size / BLOCK)
            blocks = cut[PACKED][start : start + count]
            start += count
        return blocks.ravel()[: leaf.size].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(take, like)
