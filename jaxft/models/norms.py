"""Norms with PyTorch's names and defaults; statistics and gradients in float32.

Each has a gradient of its own: automatic differentiation keeps a normalized copy of the values and
passes over all of them once for every term, these once for the sums and once for the result.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class GroupNorm(nnx.Module):
    """`torch.nn.GroupNorm` over the last axis, with `silu` followed by that activation."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5):
        self.weight = nnx.Param(jnp.zeros(num_channels))
        self.bias = nnx.Param(jnp.zeros(num_channels))
        self.num_groups = num_groups
        self.eps = eps

    def __call__(self, x: Float[Array, "b ... c"], silu: bool = False) -> Float[Array, "b ... c"]:
        weight, bias = self.weight[...], self.bias[...]
        return _group_norm(x, weight, bias, self.num_groups, self.eps, silu)


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` over the last axis."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        self.weight = nnx.Param(jnp.zeros(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return _layer_norm(x, self.weight[...], self.bias[...], self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(
    x: Float[Array, "b ... c"], weight: Array, bias: Array, groups: int, eps: float, silu: bool
) -> Float[Array, "b ... c"]:
    """Sums of each channel, then one pass: (x - mean) · scale + bias, and SiLU of it."""
    return _group_norm_forward(x, weight, bias, groups, eps, silu)[0]


def _group_norm_forward(
    x: Array, weight: Array, bias: Array, groups: int, eps: float, silu: bool
) -> tuple[Array, tuple[Array, ...]]:
    f, size = x.astype(jnp.float32), _group_size(x, groups)
    mean = _of_groups(_of_pixels(f), groups) / size
    centred = f - _everywhere(mean, x)
    inverse = jax.lax.rsqrt(_of_groups(_of_pixels(jnp.square(centred)), groups) / size + eps)
    y = centred * (_everywhere(inverse, x) * weight) + bias
    return (jax.nn.silu(y) if silu else y).astype(x.dtype), (x, weight, bias, mean, inverse)


def _group_norm_backward(
    groups: int, eps: float, silu: bool, saved: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array]:
    x, weight, bias, mean, inverse = saved  # of the standard deviation
    scale, grad = _everywhere(inverse, x) * weight, grad.astype(jnp.float32)
    centred = _beside(grad, x) - _everywhere(mean, x)
    if silu:
        y = centred * scale + bias
        sigmoid = jax.nn.sigmoid(y)
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    of_grad, of_product = _of_pixels(grad), _of_pixels(grad * centred)
    dweight = (of_product * _of_channels(inverse, x)).sum(axis=0)

    # The mean and the variance depend on all values of a group.
    share = inverse / _group_size(x, groups)
    through_mean = _of_groups(of_grad * weight, groups) * share
    slope = _of_groups(of_product * weight, groups) * inverse**2 * share
    dx = grad * scale - centred * _everywhere(slope, x) - _everywhere(through_mean, x)
    dbias = of_grad.sum(axis=0)
    return dx.astype(x.dtype), dweight.astype(weight.dtype), dbias.astype(bias.dtype)


def _beside(grad: Float[Array, "b ... c"], x: Float[Array, "b ... c"]) -> Array:
    """x in float32, not before the gradient is there: what depends on x alone a CPU's compiler
    would keep from forward, or compute then, and hold all the while. It ignores barriers."""
    return x.astype(jnp.float32) + 0 * grad


def _group_size(x: Array, groups: int) -> int:
    return math.prod(x.shape[1:]) // groups


def _of_pixels(values: Float[Array, "b ... c"]) -> Float[Array, "b c"]:
    return values.sum(axis=range(1, values.ndim - 1))


def _of_groups(of_channels: Float[Array, "b c"], groups: int) -> Float[Array, "b g"]:
    """Sums of groups of neighbouring channels."""
    return of_channels.reshape(len(of_channels), groups, -1).sum(axis=-1)


def _of_channels(of_groups: Float[Array, "b g"], x: Float[Array, "b ... c"]) -> Array:
    """Each channel has its group's value, [b, c]."""
    return jnp.repeat(of_groups, x.shape[-1] // of_groups.shape[1], axis=1)


def _everywhere(of_groups: Float[Array, "b g"], x: Float[Array, "b ... c"]) -> Array:
    """Each number of x has its group's value; of one size along the pixels."""
    return jnp.expand_dims(_of_channels(of_groups, x), range(1, x.ndim - 1))


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Float[Array, "... d"], weight: Array, bias: Array, eps: float) -> Array:
    return _layer_norm_forward(x, weight, bias, eps)[0]


def _layer_norm_forward(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, tuple[Array, ...]]:
    f = x.astype(jnp.float32)
    mean = f.mean(axis=-1, keepdims=True)
    variance = jnp.square(f - mean).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + eps)
    y = (f - mean) * inverse * weight + bias
    return y.astype(x.dtype), (x, weight, bias, mean, inverse)


def _layer_norm_backward(
    eps: float, saved: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array]:
    x, weight, bias, mean, inverse = saved
    grad = grad.astype(jnp.float32)
    normal = (_beside(grad, x) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    dweight, dbias = (grad * normal).sum(axis=rows), grad.sum(axis=rows)
    grad = grad * weight
    along = (grad * normal).mean(axis=-1, keepdims=True)
    dx = (grad - grad.mean(axis=-1, keepdims=True) - normal * along) * inverse
    return dx.astype(x.dtype), dweight.astype(weight.dtype), dbias.astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
