"""The vocabulary of arrays: what crosses a module's border has one of these types.

Axes: b batch, h and w height and width (of latents or pixels as named), c channels,
s positions of a sequence, t text positions, d features.
"""

from jaxtyping import Array, Float, Int, Num, UInt8

Params = dict[str, Array]
"""Weights of one network: PyTorch's names to arrays in PyTorch's layouts."""

Latents = Float[Array, "b h w c"]
Moments = Float[Array, "b h w m"]
"""Mean and log variance of latents, stacked on the last axis: m = 2c."""
Features = Float[Array, "b _ _ _"]
"""A feature map inside a network, NHWC, of any size and width."""
Images = Float[Array, "b h w 3"]
"""Pixels in [-1, 1]."""
Pixels = UInt8[Array, "b h w 3"]
Timesteps = Num[Array, " b"]
"""Whole in training; between whole ones in some samplers."""
TokenIds = Int[Array, "b t"]
TextStates = Float[Array, "b t d"]
"""What the UNet attends to, one state for each text position."""

TEXT_INPUTS = {"text_encoder": "input_ids", "text_encoder_2": "input_ids_2"}
"""Text encoder -> what its token ids are called in a batch."""

NEGATIVE = "negative_"
"""Beginning of the names of what is of negative prompts: their token ids, and networks with LoRAs
of their own for these."""

TEXT_STATES = ("encoder_hidden_states", "pooled_text_embeds")
"""What a batch holds instead where prompts were encoded before the first step: `TextStates`, and
for Stable Diffusion XL the pooled state [b, p]."""
