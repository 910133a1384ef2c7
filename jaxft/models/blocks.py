"""Blocks that the UNet and the VAE share: residual convolutions, up- and downsampling."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.models.layers import Conv2d, Linear
from jaxft.models.norms import GroupNorm


class ResnetBlock2D(nnx.Module):
    """Two convolutions with group norm and SiLU, and the time embedding between them."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, time_dim: int | None
    ):
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(time_dim, out_channels) if time_dim else nnx.data(None)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nnx.data(None) if same else Conv2d(in_channels, out_channels, 1)

    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w o"]:
        y = self.conv1(self.norm1(x, silu=True))
        if self.time_emb_proj is not None and time is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        y = self.conv2(self.norm2(y, silu=True))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """A convolution of stride 2; (0, 1) padding in the VAE, 1 in the UNet."""

    def __init__(self, channels: int, padding: int | tuple[int, int]):
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour upsampling to `size` (height, width), then a convolution."""

    def __init__(self, channels: int):
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int]) -> Array:
        for axis, wanted in ((1, size[0]), (2, size[1])):
            if wanted == 2 * x.shape[axis]:
                x = jnp.repeat(x, 2, axis=axis)
            elif wanted != x.shape[axis]:
                x = jnp.take(x, jnp.arange(wanted) * x.shape[axis] // wanted, axis=axis)
        return self.conv(x)
