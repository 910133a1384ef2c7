"""Guidance while training: DreamArtist, Dong et al. 2022 (https://arxiv.org/abs/2211.11337),
with the scales of HCP-Diffusion's `cfg_scale`."""

import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxft.errors import UserError

OFF = ("1.0", "1")
"""Of these a prediction is that of the positive prompt."""

COURSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ln": lambda x: x,
    "cos": lambda x: np.cos((x - 1) * np.pi / 2),
    "cos2": lambda x: 1 - np.cos(x * np.pi / 2),
}
"""How the scale goes from the first number, at x = t / (T - 1) = 0, to the second, at x = 1."""

_NUMBER = r"(\d+\.?\d*|\.\d+)"
_FORM = re.compile(rf"{_NUMBER}(?:\s*-\s*{_NUMBER})?\s*(?::\s*(\w+))?")


def scales(cfg_scale: str, num_timesteps: int) -> Float[np.ndarray, " T"] | None:
    """The scale s of every timestep, in negative + s (positive - negative); None where it is 1.

    Args:
        cfg_scale: `3.0`, `1.0-3.0` or `1.0-3.0:cos`; the last is the name of a course.
        num_timesteps: T.

    Raises:
        UserError: it has another form, or the course another name.
    """
    found = _FORM.fullmatch(cfg_scale.strip())
    if not found or (found[3] or "ln") not in COURSES:
        raise UserError(
            f"train.cfg_scale: {cfg_scale!r} must be a number or two, as '3.0', '1.0-3.0' or "
            f"'1.0-3.0:cos'; behind the colon stands one of {', '.join(COURSES)}"
        )
    low = float(found[1])
    high = float(found[2] or low)
    if low == high == 1:
        return None
    x = np.linspace(0, 1, num_timesteps)
    return (low + (high - low) * COURSES[found[3] or "ln"](x)).astype(np.float32)
