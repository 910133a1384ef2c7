"""diffusers' `ControlNetModel`: a copy of a UNet's way down that reads an image.

Zhang et al. 2023 (https://arxiv.org/abs/2302.05543).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxft.errors import UserError
from jaxft.models import encoder, options
from jaxft.models.encoder import Added, Encoder
from jaxft.models.layers import Conv2d
from jaxft.models.unet import Residuals
from jaxft.shapes import Features, Latents, TextStates, Timesteps

FREE: dict[str, Any] = encoder.FREE | {
    "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb",
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}
FIXED: dict[str, tuple] = encoder.FIXED | {"global_pool_conditions": (False,)}
ORDERS = ("rgb", "bgr")


class ControlNetConditioningEmbedding(nnx.Module):
    """Convolutions that bring an image to the latents' size, an eighth."""

    def __init__(self, inputs: int, widths: Sequence[int], outputs: int):
        self.conv_in = Conv2d(inputs, widths[0], 3, padding=1)
        blocks = []
        for narrow, wide in itertools.pairwise(widths):
            blocks += [
                Conv2d(narrow, narrow, 3, padding=1),
                Conv2d(narrow, wide, 3, stride=2, padding=1),
            ]
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv2d(widths[-1], outputs, 3, padding=1)

    def __call__(self, image: Features) -> Features:
        x = jax.nn.silu(self.conv_in(image))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(Encoder):
    """What to add to a UNet's skip connections and middle, so that it follows an image.

    Args:
        config: diffusers' `config.json` of a ControlNet.
        remat: a key of `encoder.REMAT`.

    Raises:
        UserError: names each option of the configuration that is not supported.
    """

    def __init__(self, config: Mapping[str, Any], remat: str = "none"):
        o = options.read("controlnet", config, FREE, FIXED, encoder.IGNORED)
        encoder.check("controlnet", o, {"down_block_types": encoder.DOWN_BLOCKS})
        if o.controlnet_conditioning_channel_order not in ORDERS:
            raise UserError(
                "controlnet: controlnet_conditioning_channel_order: "
                f"{o.controlnet_conditioning_channel_order!r} is not one of {', '.join(ORDERS)}"
            )
        super().__init__(o, remat)
        self.reversed = o.controlnet_conditioning_channel_order == "bgr"
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            o.conditioning_channels, o.conditioning_embedding_out_channels, self.time_channels
        )
        self.controlnet_down_blocks = nnx.List([Conv2d(c, c, 1) for c in encoder.skip_widths(o)])
        self.controlnet_mid_block = Conv2d(o.block_out_channels[-1], o.block_out_channels[-1], 1)

    def __call__(
        self,
        sample: Latents,
        timesteps: Timesteps,
        encoder_hidden_states: TextStates,
        image: Features,
        added: Added | None = None,
    ) -> Residuals:
        """What to add to the UNet, at full strength.

        Args:
            sample: latents [b, h, w, in] of any size.
            timesteps: [b].
            encoder_hidden_states: the text, [b, s, d].
            image: [b, 8h, 8w, channels], in [0, 1].
            added: what Stable Diffusion XL needs besides.
        """
        text = encoder_hidden_states.astype(sample.dtype)
        time = self.embed(timesteps, added, sample.dtype)
        image = image[..., ::-1] if self.reversed else image
        hint = self.controlnet_cond_embedding(image.astype(sample.dtype))
        x, skips = self.encode(self.conv_in(sample) + hint, time, text)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return Residuals(down, self.controlnet_mid_block(x))
