"""What of an image an inpainting model is to paint anew: 1 in a hole, 0 elsewhere."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from jaxft.data import beside
from jaxft.data.images import View

RANDOM = "random"
"""In place of a folder of masks."""

Hole = UInt8[np.ndarray, "h w"]


def drawn(size: tuple[int, int], pick: int) -> Hole:
    """The hole at `size` (width, height) that a number of 64 bits chooses: a rectangle or an
    ellipse of any width, height and place, as in diffusers' `train_dreambooth_inpaint.py`."""
    rng = np.random.default_rng(pick)
    width, height = (int(rng.integers(0, side, endpoint=True)) for side in size)
    x, y = (
        int(rng.integers(own // 2, side - own // 2, endpoint=True))
        for own, side in zip((width, height), size, strict=True)
    )
    whole = Image.new("L", size, 0)
    canvas = ImageDraw.Draw(whole)
    shape = canvas.ellipse if rng.integers(2) else canvas.rectangle
    shape((x - width // 2, y - height // 2, x + width // 2, y + height // 2), fill=1)
    return np.asarray(whole)


def of_mask(
    data: bytes, original: tuple[int, int], size: tuple[int, int], view: View, *, scaled: bool
) -> Hole:
    """The hole of a mask's file, where that is brighter than half; cut as its image, see
    `beside.pixels`. What is padded is no hole."""
    grey = beside.grey(data).convert("RGB")
    return (beside.pixels(grey, original, size, view, scaled=scaled)[..., 0] > 127).astype(np.uint8)
