"""diffusers' `AutoencoderKL`: images to latents of an eighth of their size, and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from jaxft.models import options
from jaxft.models.attention import attend
from jaxft.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from jaxft.models.layers import Conv2d, Identity, Linear
from jaxft.models.norms import GroupNorm
from jaxft.shapes import Features, Images, Latents, Moments, Pixels

EPS = 1e-6

FREE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
FIXED: dict[str, tuple] = {
    "act_fn": ("silu",),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}
IGNORED = ("sample_size", "scaling_factor", "force_upcast", "down_block_types", "up_block_types")


class MidAttention(nnx.Module):
    """Self-attention with one head over the pixels of a feature map, added to it."""

    def __init__(self, channels: int, groups: int):
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nnx.List([Linear(channels, channels), Identity()])

    def __call__(self, x: Features) -> Features:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        q, k, v = (project(y)[:, :, None, :] for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attend(q, k, v)).reshape(x.shape)


class MidBlock(nnx.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int, groups: int):
        self.resnets = nnx.List([_resnet(channels, channels, groups) for _ in range(2)])
        self.attentions = nnx.List([MidAttention(channels, groups)])

    def __call__(self, x: Features) -> Features:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownLevel(nnx.Module):
    """Residual blocks of one width, then half the size (but for the last level)."""

    def __init__(self, channels: tuple[int, int], depth: int, groups: int, last: bool):
        self.resnets = _resnets(*channels, depth, groups)
        samplers = [] if last else [Downsample2D(channels[1], (0, 1))]
        self.downsamplers = nnx.List(samplers)

    def __call__(self, x: Features) -> Features:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpLevel(nnx.Module):
    """Residual blocks of one width, then twice the size (but for the last level)."""

    def __init__(self, channels: tuple[int, int], depth: int, groups: int, last: bool):
        self.resnets = _resnets(*channels, depth, groups)
        self.upsamplers = nnx.List([] if last else [Upsample2D(channels[1])])

    def __call__(self, x: Features) -> Features:
        for resnet in self.resnets:
            x = resnet(x)
        for sampler in self.upsamplers:
            x = sampler(x, (2 * x.shape[1], 2 * x.shape[2]))
        return x


class Encoder(nnx.Module):
    """Features to moments; every level but the last halves the size."""

    def __init__(self, o: Any):
        widths, groups = o.block_out_channels, o.norm_num_groups
        self.conv_in = Conv2d(o.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nnx.List(_levels(DownLevel, widths, o.layers_per_block, groups))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], 2 * o.latent_channels, 3, padding=1)

    def __call__(self, x: Features) -> Features:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True))


class Decoder(nnx.Module):
    """Features to images; every level but the last doubles the size."""

    def __init__(self, o: Any):
        widths, groups = o.block_out_channels[::-1], o.norm_num_groups
        self.conv_in = Conv2d(o.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nnx.List(_levels(UpLevel, widths, o.layers_per_block + 1, groups))
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], o.out_channels, 3, padding=1)

    def __call__(self, x: Features) -> Features:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


def _resnet(in_channels: int, out_channels: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels, out_channels, groups, EPS, time_dim=None)


def _resnets(in_channels: int, channels: int, depth: int, groups: int) -> nnx.List:
    inputs = [in_channels] + [channels] * (depth - 1)
    return nnx.List([_resnet(i, channels, groups) for i in inputs])


def _levels(kind: Callable[..., Any], widths: Sequence[int], depth: int, groups: int) -> list:
    pairs = zip([widths[0], *widths], widths, strict=False)
    last = len(widths) - 1
    return [kind(pair, depth, groups, last=i == last) for i, pair in enumerate(pairs)]


class AutoencoderKL(nnx.Module):
    """Variational autoencoder of latent diffusion; Rombach et al. 2022, section 3.1.

    Args:
        config: diffusers' `vae/config.json`.

    Raises:
        UserError: names each option of the configuration that is not supported.
    """

    def __init__(self, config: Mapping[str, Any]):
        o = options.read("vae", config, FREE, FIXED, IGNORED)
        self.scale = downsampling(config)
        self.encoder = Encoder(o)
        self.decoder = Decoder(o)
        self.quant_conv = Conv2d(2 * o.latent_channels, 2 * o.latent_channels, 1)
        self.post_quant_conv = Conv2d(o.latent_channels, o.latent_channels, 1)

    def encode(self, images: Images) -> Float[Array, "b h8 w8 m"]:
        """Images [b, h, w, 3] in [-1, 1] -> mean and log variance [b, h/8, w/8, 8], unscaled."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, -30.0, 20.0)], axis=-1)

    def decode(self, latents: Latents) -> Float[Array, "b h8 w8 3"]:
        """Latents [b, h, w, 4] divided by the scaling factor -> images [b, 8h, 8w, 3]."""
        return self.decoder(self.post_quant_conv(latents))


def downsampling(config: Mapping[str, Any]) -> int:
    """Pixels along the side of one latent."""
    return 2 ** (len(config.get("block_out_channels", FREE["block_out_channels"])) - 1)


def as_images(pixels: Pixels, holes: UInt8[Array, "b h w"] | None = None) -> Images:
    """Pixels as the encoder sees them; grey where `holes` is not 0."""
    shown = pixels.astype(jnp.float32) / 127.5 - 1.0
    return shown if holes is None else shown * (holes == 0)[..., None]


def beside(holes: UInt8[Array, "b height width"], left: Latents) -> Float[Array, "b h w 5"]:
    """What an inpainting UNet sees behind the noisy latents: the holes, each latent's that of its
    first pixel, and the scaled latents of what is left."""
    return jnp.concatenate([holes[:, ::8, ::8, None].astype(left.dtype), left], axis=-1)


def sample_latents(moments: Moments, noise: Latents) -> Latents:
    """mean + std · noise: a draw from the encoder's distribution, unscaled."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * log_variance) * noise
