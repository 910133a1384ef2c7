"""Attention masks: grey images that say how much each part of an image counts in the loss.

They lie beside the images, see `beside`. A dimmed part counts less and a bright one more, by
HCP-Diffusion's curve.
"""

import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxft.data import beside, images
from jaxft.data.buckets import VAE_STRIDE
from jaxft.data.images import View


def weights(
    data: bytes, original: tuple[int, int], size: tuple[int, int], view: View, *, scaled: bool
) -> Float[np.ndarray, "h w"]:
    """How much each latent counts, [size[1] / 8, size[0] / 8]: the mean over its pixels.

    Args:
        data: the mask's file.
        original: width and height of the image.
        size: width and height that the image is scaled to, or cropped to unless it is `scaled`.
        view: what is shown of the image.
        scaled: see size. What is padded does not count.
    """
    mask = beside.grey(data)
    if not scaled:
        kept = images.crop_and_pad(mask.resize(original).convert("RGB"), size, view)
        shown = _curve(kept[..., 0])
        rows, columns = (side // VAE_STRIDE for side in shown.shape)
        return shown.reshape(rows, VAE_STRIDE, columns, VAE_STRIDE).mean(axis=(1, 3))
    box = images.covered(original, size, view, mask.size)
    latents = (size[0] // VAE_STRIDE, size[1] // VAE_STRIDE)
    fitted = Image.fromarray(_curve(np.asarray(mask))).resize(latents, Image.Resampling.BOX, box)
    pixels = np.asarray(fitted)
    return np.ascontiguousarray(pixels[:, ::-1]) if view.mirrored else pixels


def _curve(grey: np.ndarray) -> Float[np.ndarray, "h w"]:
    """HCP-Diffusion's weight of a grey value: 0 is 0, 127 is 1, 255 is 5, straight between."""
    return np.interp(grey, [0, 127, 255], [0, 1, 5]).astype(np.float32)
