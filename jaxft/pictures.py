"""The pictures that sampling goes by: what a ControlNet sees, and what is painted anew."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxft import controls
from jaxft.config import Config
from jaxft.data import beside, images
from jaxft.diffusion import generate
from jaxft.diffusion.generate import Seen
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder
from jaxft.formats.diffusers_folder import Model
from jaxft.shapes import Latents

CONDITION, IMAGE, MASK = "ex_input.cond.image", "condition.image", "condition.mask"


def keys(config: Config) -> dict[str, Any]:
    """Key -> the files that it names: one, a list, or None."""
    condition = config.condition or {"image": None, "mask": None}
    return {
        CONDITION: config.ex_input.cond.image,
        IMAGE: condition["image"],
        MASK: condition["mask"],
    }


def check(config: Config, model: Model) -> None:
    """Raises UserError unless there are just the pictures that the model goes by."""
    given = {key for key, files in keys(config).items() if files}
    controlled, paints = controls.PART in model.parts, diffusers_folder.is_inpainting(model)
    if config.infer_args.controlnet_conditioning_scale != 1 and not controlled:
        raise UserError(
            "infer_args.controlnet_conditioning_scale: has no effect without a ControlNet; name "
            "one in controlnet, or leave it out"
        )
    for key, wanted, why in (
        (CONDITION, controlled, "a ControlNet (controlnet)"),
        (IMAGE, paints, "an inpainting model, whose UNet takes 9 channels"),
        (MASK, paints, "an inpainting model, whose UNet takes 9 channels"),
    ):
        if wanted and key not in given:
            raise UserError(f"{key}: is needed by {why}; name a file")
        if key in given and not wanted:
            raise UserError(f"{key}: has no effect without {why}; leave it out")
    if not paints:
        diffusers_folder.check_text_to_image(model)


def read(
    files: Sequence[Mapping[str, str | None]],
    size: tuple[int, int],
    seeds: Sequence[int],
    noise: Latents,
) -> Seen:
    """What images are made from besides text and noise.

    Args:
        files: of each image, as `keys`.
        size: width and height of all.
        seeds: of each image.
        noise: its initial noise.

    Raises:
        UserError: a file is no image that can be read.
    """

    def column(key: str) -> Any:  # uint8 [n, h, w, 3], of masks [n, h, w]
        paths = [path for own in files if (path := own.get(key))]
        if len(paths) < len(files):
            return None
        opened = {path: _open(key, path, size) for path in dict.fromkeys(paths)}
        return np.stack([opened[path] for path in paths])

    mask = column(MASK)
    if mask is None:
        return Seen(column(CONDITION))
    left = generate.initial_noise(seeds, *noise.shape[1:], stream=generate.LEFT)
    hole = (mask > 127).astype(np.uint8)
    return Seen(column(CONDITION), column(IMAGE), hole, left)


def _open(key: str, path: str, size: tuple[int, int]) -> UInt8[np.ndarray, "h w *c"]:
    """A picture at a size, as diffusers scales it: each side by itself."""
    try:
        data = Path(path).expanduser().read_bytes()
        image = beside.grey(data) if key == MASK else images.decode(data)
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{key}: {path}: {error}") from None
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))
