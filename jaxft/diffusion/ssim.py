"""Structural similarity of latents; Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.shapes import Latents

WINDOW, DEVIATION = 11, 1.5
"""Of the Gaussian window."""

C1, C2 = 0.01**2, 0.03**2
"""Of values that span 1."""


def dissimilarity(predicted: Latents, wanted: Latents) -> Float[Array, "b h2 w2 c"]:
    """1 - SSIM around each place at which the window fits; along a side shorter than the window
    there is none, as in `pytorch_msssim`. Latents are taken as values from -1 to 1, as they are in
    HCP-Diffusion."""
    x, y = ((latents.astype(jnp.float32) + 1) / 2 for latents in (predicted, wanted))
    mean_x, mean_y = _smooth(x), _smooth(y)
    spread = _smooth(x * x) - mean_x**2 + _smooth(y * y) - mean_y**2
    shared = _smooth(x * y) - mean_x * mean_y
    structure = (2 * shared + C2) / (spread + C2)
    return 1 - structure * (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)


def inner(mask: Float[Array, "b h w"]) -> Float[Array, "b h2 w2"]:
    """Of a mask, the places at which the window fits."""
    rows, columns = (_margin(size) for size in mask.shape[1:])
    return mask[:, rows : mask.shape[1] - rows, columns : mask.shape[2] - columns]


def _margin(size: int) -> int:
    return WINDOW // 2 if size >= WINDOW else 0


def _smooth(x: Latents) -> Latents:
    rows, columns = (_window(size) for size in x.shape[1:3])
    return jnp.einsum("hi,wj,bijc->bhwc", rows, columns, x)


def _window(size: int) -> Float[np.ndarray, "o i"]:
    """The means over a window, as a matrix."""
    if size < WINDOW:
        return np.eye(size, dtype=np.float32)
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * DEVIATION**2))
    matrix = np.zeros((size - WINDOW + 1, size), np.float32)
    for row in range(len(matrix)):
        matrix[row, row : row + WINDOW] = weights / weights.sum()
    return matrix
