"""The transformer of a UNet's levels: attention over pixels, over the text, and a feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.models.attention import Attention
from jaxft.models.layers import Conv2d, Identity, Linear
from jaxft.models.norms import GroupNorm, LayerNorm
from jaxft.shapes import Features, TextStates


class GEGLU(nnx.Module):
    """x · gelu(gate), with the exact gelu; Shazeer 2020 (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, inner: int):
        self.proj = Linear(dim, 2 * inner)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s i"]:
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU of four times the width, then back."""

    def __init__(self, dim: int):
        self.net = nnx.List([GEGLU(dim, 4 * dim), Identity(), Linear(4 * dim, dim)])

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention over the text, feed-forward; each with pre-norm."""

    def __init__(self, dim: int, heads: int, cross_attention_dim: int):
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim, heads)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def __call__(self, x: Float[Array, "b s c"], text: TextStates) -> Float[Array, "b s c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(
        self, channels: int, heads: int, depth: int, text_dim: int, groups: int, linear: bool
    ):
        projection = Linear if linear else lambda i, o: Conv2d(i, o, 1)
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, heads, text_dim) for _ in range(depth)]
        )
        self.proj_out = projection(channels, channels)

    def __call__(self, x: Features, text: TextStates) -> Features:
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            y = block(y, text)
        return x + self.proj_out(y.reshape(b, h, w, c))
