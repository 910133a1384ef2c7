"""The way down through a UNet, which a ControlNet copies: embeddings, down blocks, middle.

Attribute names are diffusers', so a weight's path here is its key in diffusers' files.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.errors import UserError
from jaxft.models import options
from jaxft.models.blocks import Downsample2D, ResnetBlock2D
from jaxft.models.layers import Conv2d, Linear
from jaxft.models.transformer import Transformer2DModel
from jaxft.shapes import Features, TextStates, Timesteps

FREE: dict[str, Any] = {
    "in_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
FIXED: dict[str, tuple] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
}
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
IGNORED = ("upcast_attention", "addition_embed_type_num_heads")
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


class Added(NamedTuple):
    """What Stable Diffusion XL is told besides the text's states (`text_time`)."""

    text_embeds: Float[Array, "b d"]
    """The projected pooled state of the last text encoder."""
    time_ids: Float[Array, "b n"]
    """Original height and width, top and left of the crop, target height and width, in pixels; the
    refiner's: original height and width, top and left, aesthetic score."""


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

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b e"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


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


class Encoder(nnx.Module):
    """The part of a UNet that a ControlNet shares; not a network of its own.

    Args:
        o: the options of a `config.json`, at least those of `FREE`.
        remat: a key of `REMAT`.
    """

    def __init__(self, o: Any, remat: str):
        self.time_channels = o.block_out_channels[0]
        self.flip_sin_to_cos, self.freq_shift = o.flip_sin_to_cos, o.freq_shift
        self.added_channels = o.addition_time_embed_dim
        self.recomputed = REMAT[remat]
        time_dim = 4 * self.time_channels
        self.conv_in = Conv2d(o.in_channels, self.time_channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(self.time_channels, time_dim)
        self.add_embedding = (
            TimestepEmbedding(o.projection_class_embeddings_input_dim, time_dim)
            if o.addition_embed_type
            else nnx.data(None)
        )
        self.down_blocks = nnx.List(_down_levels(o))
        self.mid_block = _middle(o)

    def embed(self, timesteps: Timesteps, added: Added | None, dtype: Any) -> Float[Array, "b e"]:
        """The embedding of the timesteps, and of what is added in Stable Diffusion XL."""

        def sinusoids(numbers: Array, dim: int) -> Array:
            return timestep_embedding(numbers, dim, self.flip_sin_to_cos, self.freq_shift)

        time = self.time_embedding(sinusoids(timesteps, self.time_channels).astype(dtype))
        if self.add_embedding is None or added is None:
            return time
        numbers = sinusoids(added.time_ids.reshape(-1), self.added_channels)
        numbers = numbers.reshape(len(added.time_ids), -1)
        both = jnp.concatenate([added.text_embeds.astype(dtype), numbers.astype(dtype)], axis=-1)
        return time + self.add_embedding(both)

    def encode(
        self, x: Features, time: Float[Array, "b e"], text: TextStates
    ) -> tuple[Features, list[Features]]:
        """The middle's output, and those of all blocks on the way, for the skip connections."""
        skips = [x]
        for level in self.down_blocks:
            down = functools.partial(self._down, level, time=time, text=text)
            x, outputs = self._call("level", down, x)
            skips += outputs
        return self._call("level", functools.partial(self._mid, time=time, text=text), x), skips

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


def resnet(o: Any, inputs: int, outputs: int) -> ResnetBlock2D:
    """A residual block with these numbers of channels."""
    return ResnetBlock2D(
        inputs, outputs, o.norm_num_groups, o.norm_eps, 4 * o.block_out_channels[0]
    )


def transformers(o: Any, level: int, count: int) -> list[Transformer2DModel]:
    """As many transformers as a level's resnets, of the level's width, heads and depth."""
    levels = len(o.block_out_channels)
    sizes = (
        o.block_out_channels[level],
        options.per_level(o.num_attention_heads or o.attention_head_dim, levels)[level],
        options.per_level(o.transformer_layers_per_block, levels)[level],
        o.cross_attention_dim,
    )
    return [
        Transformer2DModel(*sizes, o.norm_num_groups, o.use_linear_projection) for _ in range(count)
    ]


def skip_widths(o: Any) -> list[int]:
    """Channels of the feature maps that `Encoder.encode` keeps."""
    widths = o.block_out_channels
    layers = options.per_level(o.layers_per_block, len(widths))
    skips = [widths[0]]
    for i, width in enumerate(widths):
        skips += [width] * (layers[i] + (i < len(widths) - 1))
    return skips


def _down_levels(o: Any) -> list[Level]:
    widths = o.block_out_channels
    layers = options.per_level(o.layers_per_block, len(widths))
    levels = []
    for i, width in enumerate(widths):
        inputs = [widths[max(i - 1, 0)]] + [width] * (layers[i] - 1)
        cross = o.down_block_types[i] == "CrossAttnDownBlock2D"
        sampler = Downsample2D(width, 1) if i < len(widths) - 1 else None
        attentions = transformers(o, i, layers[i] if cross else 0)
        levels.append(Level([resnet(o, c, width) for c in inputs], attentions, sampler, "down"))
    return levels


def _middle(o: Any) -> Level:
    width = o.block_out_channels[-1]
    attentions = transformers(o, len(o.block_out_channels) - 1, 1)
    return Level([resnet(o, width, width) for _ in range(2)], attentions, None, "mid")


def check(name: str, o: Any, block_types: dict[str, tuple[str, ...]]) -> None:
    """Raises UserError unless lists fit the number of levels, and SDXL's options go together.

    Args:
        name: of the network, for messages.
        o: its options.
        block_types: option -> kinds of block that it may list.
    """
    for key, choices in block_types.items():
        kinds = getattr(o, key)
        if len(kinds) != len(o.block_out_channels):
            raise UserError(f"{name}: {key} has not one entry per entry of block_out_channels")
        for kind in kinds:
            if kind not in choices:
                known = ", ".join(choices)
                raise UserError(f"{name}: {key}: {kind!r} is not supported, only {known}")
    if o.addition_embed_type not in (None, "text_time"):
        raise UserError(
            f"{name}: addition_embed_type: {o.addition_embed_type!r} is not supported, only "
            "None or 'text_time'"
        )
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if o.addition_embed_type and not getattr(o, key):
            raise UserError(f"{name}: addition_embed_type is 'text_time', and {key} is missing")
