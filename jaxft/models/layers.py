"""Leaf layers with PyTorch's names, layouts and defaults.

Weights are [out, in] and OIHW as in PyTorch, activations [..., features] and NHWC. Compute dtype
is that of the activations. Layers are only ever built under
`nnx.eval_shape`, so they hold zeros: weights come from files.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int


class Linear(nnx.Module):
    """`torch.nn.Linear`: x · Wᵀ + b on the last axis; with adapters (`models.adapters`), as they
    change it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else nnx.data(None)
        self.lora = nnx.List([])

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        weight = self.weight[...]
        y = self._product(x, weight)
        for adapter in self.lora:
            y = adapter(x, y, weight, self._product)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def _product(self, x: Array, weight: Any) -> Array:
        return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


FEW_PIXELS = 16
"""Below so many pixels of output a CPU is quicker with one product."""


class Conv2d(nnx.Module):
    """`torch.nn.Conv2d` on NHWC; `padding` on each side, or (before, after) on both axes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        self.weight = nnx.Param(jnp.zeros((out_channels, in_channels, kernel_size, kernel_size)))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.lora = nnx.List([])
        self.stride = stride
        self.padding = (padding, padding) if isinstance(padding, int) else padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        weight = self.weight[...]
        y = self._product(x, weight)
        for adapter in self.lora:
            y = adapter(x, y, weight, self._product)
        return y + self.bias[...].astype(x.dtype)

    def _product(self, x: Array, kernel: Any) -> Array:
        weight = kernel.astype(x.dtype)
        if weight.shape[2:] == (1, 1):
            return jnp.einsum("bhwi,oi->bhwo", x, weight[:, :, 0, 0])
        if self._few_pixels(x):
            return self._product_of_taps(x, weight)
        return jax.lax.conv_general_dilated(
            x,
            weight.transpose(2, 3, 1, 0),
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def _output_size(self, x: Array) -> tuple[int, int]:
        lost = self.weight.shape[2] - sum(self.padding)
        height, width = ((length - lost) // self.stride + 1 for length in x.shape[1:3])
        return height, width

    def _few_pixels(self, x: Array) -> bool:
        return jax.default_backend() == "cpu" and math.prod(self._output_size(x)) < FEW_PIXELS

    def _product_of_taps(self, x: Array, weight: Array) -> Array:
        """One product, of the values under all taps of the kernel side by side."""
        height, width = self._output_size(x)
        x = jnp.pad(x, ((0, 0), self.padding, self.padding, (0, 0)))

        def under(i: int, j: int) -> Array:
            rows = slice(i, i + (height - 1) * self.stride + 1, self.stride)
            columns = slice(j, j + (width - 1) * self.stride + 1, self.stride)
            return x[:, rows, columns]

        taps = [under(i, j) for i, j in np.ndindex(*weight.shape[2:])]
        kernel = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
        return jnp.concatenate(taps, axis=-1) @ kernel


class Embedding(nnx.Module):
    """`torch.nn.Embedding`: rows of a table; the output has the table's dtype."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        self.weight = nnx.Param(jnp.zeros((num_embeddings, embedding_dim)))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... d"]:
        return self.weight[...][ids]


class Identity(nnx.Module):
    """Holds the place of a layer without weights, so that later ones keep PyTorch's numbers."""

    def __call__(self, x: Array) -> Array:
        return x
