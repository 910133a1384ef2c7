"""diffusers' `UNet2DConditionModel`, the network that predicts the noise.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752); with the added conditions of Stable
Diffusion XL, Podell et al. 2023 (https://arxiv.org/abs/2307.01952).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.models import encoder, options
from jaxft.models.blocks import Upsample2D
from jaxft.models.encoder import Added, Encoder, Level
from jaxft.models.layers import Conv2d
from jaxft.models.norms import GroupNorm
from jaxft.shapes import Features, Latents, TextStates, Timesteps

FREE: dict[str, Any] = encoder.FREE | {
    "out_channels": 4,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
FIXED: dict[str, tuple] = encoder.FIXED | {
    "center_input_sample": (False,),
    "dropout": (0.0,),
    "reverse_transformer_layers_per_block": (None,),
    "dual_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
IGNORED = (*encoder.IGNORED, "sample_size")
BLOCK_TYPES = {
    "down_block_types": encoder.DOWN_BLOCKS,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


class Residuals(NamedTuple):
    """What a ControlNet adds to a UNet's skip connections and to its middle."""

    down: list[Features]
    mid: Features


class UNet2DConditionModel(Encoder):
    """Predicts noise (or velocity, or sample) from noisy latents, timesteps and text states.

    Args:
        config: diffusers' `unet/config.json`.
        remat: a key of `encoder.REMAT`.

    Raises:
        UserError: names each option of the configuration that is not supported.
    """

    def __init__(self, config: Mapping[str, Any], remat: str = "none"):
        o = options.read("unet", config, FREE, FIXED, IGNORED)
        encoder.check("unet", o, BLOCK_TYPES)
        super().__init__(o, remat)
        self.up_blocks = nnx.List(_up_levels(o))
        self.conv_norm_out = GroupNorm(o.norm_num_groups, self.time_channels, o.norm_eps)
        self.conv_out = Conv2d(self.time_channels, o.out_channels, 3, padding=1)

    def __call__(
        self,
        sample: Latents,
        timesteps: Timesteps,
        encoder_hidden_states: TextStates,
        added: Added | None = None,
        residuals: Residuals | None = None,
    ) -> Float[Array, "b h w out"]:
        """The prediction, [b, h, w, out].

        Args:
            sample: latents [b, h, w, in] of any size.
            timesteps: [b].
            encoder_hidden_states: the text, [b, s, d].
            added: what Stable Diffusion XL needs besides.
            residuals: of a ControlNet.
        """
        text = encoder_hidden_states.astype(sample.dtype)
        time = self.embed(timesteps, added, sample.dtype)
        x, skips = self.encode(self.conv_in(sample), time, text)
        if residuals is not None:
            skips = [skip + more for skip, more in zip(skips, residuals.down, strict=True)]
            x = x + residuals.mid
        for level in self.up_blocks:
            count = len(level.resnets)
            taken, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[1:3] if skips else x.shape[1:3]
            up = functools.partial(self._up, level, size=size, time=time, text=text)
            x = self._call("level", up, x, taken)
        return self.conv_out(self.conv_norm_out(x, silu=True))

    def _up(
        self, level: Level, x: Features, skips: list, size: tuple, time: Array, text: TextStates
    ) -> Features:
        for block, skip in zip(level.blocks(self._call, time, text), reversed(skips), strict=True):
            x = block(jnp.concatenate([x, skip], axis=-1))
        return level.upsamplers[0](x, size) if level.has_sampler else x


def _up_levels(o: Any) -> list[Level]:
    widths, skips = o.block_out_channels, encoder.skip_widths(o)
    layers = options.per_level(o.layers_per_block, len(widths))
    levels, channels = [], widths[-1]
    for i, width in reversed(list(enumerate(widths))):
        inputs = [channels] + [width] * layers[i]
        cross = o.up_block_types[len(levels)] == "CrossAttnUpBlock2D"
        attentions = encoder.transformers(o, i, layers[i] + 1 if cross else 0)
        sampler = Upsample2D(width) if i > 0 else None
        resnets = [encoder.resnet(o, c + skips.pop(), width) for c in inputs]
        levels.append(Level(resnets, attentions, sampler, "up"))
        channels = width
    return levels
