"""diffusers' `UNet2DConditionModel`, the network that predicts the noise.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752). Attribute names are diffusers', so a
weight's path here is its key in diffusers' files.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.errors import UserError
from jaxft.models import options
from jaxft.models.attention import Attention
from jaxft.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from jaxft.models.layers import Conv2d, GroupNorm, Identity, LayerNorm, Linear
from jaxft.shapes import Features, Latents, TextStates, Timesteps

FREE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
FIXED: dict[str, tuple] = {
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0.0,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
IGNORED = ("sample_size", "upcast_attention", "addition_embed_type_num_heads")
"""Scores and softmax are float32 always, so `upcast_attention` changes nothing."""

REMAT = {
    "none": frozenset(),
    "attention": frozenset({"transformer"}),
    "blocks": frozenset({"transformer", "resnet"}),
    "full": frozenset({"transformer", "resnet", "level"}),
}
"""Policies of gradient checkpointing: what is computed again in the backward pass.

`attention` keeps only the inputs of transformer blocks, `blocks` those of residual blocks too,
`full` only the inputs of whole levels (and, while one is computed again, of its blocks).
"""


def timestep_embedding(
    timesteps: Timesteps, dim: int, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b d"]:
    """Sinusoids of the timesteps; float32; Vaswani et al. 2017, section 3.5."""
    half = dim // 2
    exponent = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)
    parts = (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_channels: int, time_embed_dim: int):
        self.linear_1 = Linear(in_channels, time_embed_dim)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b t"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


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


class Level(nnx.Module):
    """One entry of `down_blocks` or `up_blocks`, or `mid_block`; diffusers has a class for each.

    Residual blocks with a transformer after each (in the middle: between the two), then a
    down- or upsampler.
    """

    def __init__(self, resnets: list, attentions: list, sampler: nnx.Module | None, kind: str):
        self.resnets = nnx.List(resnets)
        if attentions:
            self.attentions = nnx.List(attentions)
        if sampler is not None and kind == "down":
            self.downsamplers = nnx.List([sampler])
        if sampler is not None and kind == "up":
            self.upsamplers = nnx.List([sampler])
        self.has_attention = bool(attentions)
        self.has_sampler = sampler is not None

    def blocks(self, call: Callable, time: Array, text: TextStates) -> list[Callable]:
        """The pairs (residual block, transformer) as functions of a feature map."""

        def pair(i: int) -> Callable:
            def run(x: Features) -> Features:
                x = call("resnet", lambda y: self.resnets[i](y, time), x)
                if not self.has_attention or i >= len(self.attentions):
                    return x
                return call("transformer", lambda y: self.attentions[i](y, text), x)

            return run

        return [pair(i) for i in range(len(self.resnets))]


class UNet2DConditionModel(nnx.Module):
    """Predicts noise (or velocity, or sample) from noisy latents, timesteps and text states.

    Args:
        config: diffusers' `unet/config.json`.
        remat: a key of `REMAT`.

    Raises:
        UserError: names each option of the configuration that is not supported.
    """

    def __init__(self, config: Mapping[str, Any], remat: str = "none"):
        o = options.read("unet", config, FREE, FIXED, IGNORED)
        _check_levels(o)
        self.time_channels = o.block_out_channels[0]
        self.flip_sin_to_cos, self.freq_shift = o.flip_sin_to_cos, o.freq_shift
        self.recomputed = REMAT[remat]
        self.conv_in = Conv2d(o.in_channels, self.time_channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(self.time_channels, 4 * self.time_channels)
        self.down_blocks, self.mid_block, self.up_blocks = _levels(o)
        self.conv_norm_out = GroupNorm(o.norm_num_groups, self.time_channels, o.norm_eps)
        self.conv_out = Conv2d(self.time_channels, o.out_channels, 3, padding=1)

    def __call__(
        self, sample: Latents, timesteps: Timesteps, encoder_hidden_states: TextStates
    ) -> Float[Array, "b h w out"]:
        """Latents [b, h, w, in] of any size, timesteps [b], text [b, s, d] -> [b, h, w, out]."""
        text = encoder_hidden_states.astype(sample.dtype)
        sinusoids = timestep_embedding(
            timesteps, self.time_channels, self.flip_sin_to_cos, self.freq_shift
        )
        time = self.time_embedding(sinusoids.astype(sample.dtype))

        x = self.conv_in(sample)
        skips = [x]
        for level in self.down_blocks:
            down = functools.partial(self._down, level, time=time, text=text)
            x, outputs = self._call("level", down, x)
            skips += outputs
        x = self._call("level", functools.partial(self._mid, time=time, text=text), x)
        for level in self.up_blocks:
            count = len(level.resnets)
            taken, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[1:3] if skips else x.shape[1:3]
            up = functools.partial(self._up, level, size=size, time=time, text=text)
            x = self._call("level", up, x, taken)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def _call(self, kind: str, function: Callable, *args: Any) -> Any:
        """Runs a block, under `jax.checkpoint` if the policy computes its kind again."""
        return (jax.checkpoint(function) if kind in self.recomputed else function)(*args)

    def _down(
        self, level: Level, x: Features, time: Array, text: TextStates
    ) -> tuple[Features, list[Features]]:
        outputs = []
        for block in level.blocks(self._call, time, text):
            x = block(x)
            outputs.append(x)
        if level.has_sampler:
            x = level.downsamplers[0](x)
            outputs.append(x)
        return x, outputs

    def _mid(self, x: Features, time: Array, text: TextStates) -> Features:
        for block in self.mid_block.blocks(self._call, time, text):
            x = block(x)
        return x

    def _up(
        self, level: Level, x: Features, skips: list, size: tuple, time: Array, text: TextStates
    ) -> Features:
        for block, skip in zip(level.blocks(self._call, time, text), reversed(skips), strict=True):
            x = block(jnp.concatenate([x, skip], axis=-1))
        return level.upsamplers[0](x, size) if level.has_sampler else x


def _levels(o: Any) -> tuple[nnx.List, Level, nnx.List]:
    """`down_blocks`, `mid_block` and `up_blocks`."""
    widths = list(o.block_out_channels)
    last = len(widths) - 1
    heads = options.per_level(o.num_attention_heads or o.attention_head_dim, len(widths))
    depth = options.per_level(o.transformer_layers_per_block, len(widths))
    layers = options.per_level(o.layers_per_block, len(widths))

    def resnet(i: int, out: int) -> ResnetBlock2D:
        return ResnetBlock2D(i, out, o.norm_num_groups, o.norm_eps, 4 * widths[0])

    def transformers(level: int, count: int) -> list[Transformer2DModel]:
        sizes = (widths[level], heads[level], depth[level], o.cross_attention_dim)
        kind = (o.norm_num_groups, o.use_linear_projection)
        return [Transformer2DModel(*sizes, *kind) for _ in range(count)]

    down = nnx.List([])
    skips = [widths[0]]
    for i, width in enumerate(widths):
        inputs = [widths[max(i - 1, 0)]] + [width] * (layers[i] - 1)
        cross = o.down_block_types[i] == "CrossAttnDownBlock2D"
        attentions = transformers(i, layers[i] if cross else 0)
        sampler = Downsample2D(width, 1) if i < last else None
        down.append(Level([resnet(c, width) for c in inputs], attentions, sampler, "down"))
        skips += [width] * (layers[i] + (i < last))

    middle = [resnet(widths[-1], widths[-1]) for _ in range(2)]
    mid = Level(middle, transformers(last, 1), None, "mid")

    up = nnx.List([])
    channels = widths[-1]
    for i, width in reversed(list(enumerate(widths))):
        inputs = [channels] + [width] * layers[i]
        cross = o.up_block_types[last - i] == "CrossAttnUpBlock2D"
        attentions = transformers(i, layers[i] + 1 if cross else 0)
        sampler = Upsample2D(width) if i > 0 else None
        resnets = [resnet(c + skips.pop(), width) for c in inputs]
        up.append(Level(resnets, attentions, sampler, "up"))
        channels = width
    return down, mid, up


def _check_levels(o: Any) -> None:
    """Lists of one entry per level have one entry per level, of a known kind."""
    known = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    for key, choices in known.items():
        kinds = getattr(o, key)
        if len(kinds) != len(o.block_out_channels):
            raise UserError(f"unet: {key} has not one entry per entry of block_out_channels")
        for kind in kinds:
            if kind not in choices:
                known_kinds = ", ".join(choices)
                raise UserError(f"unet: {key}: {kind!r} is not supported, only {known_kinds}")
