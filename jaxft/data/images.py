"""Image files to pixels: decoding by content, one table of modes, resize to cover and crop."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from jaxft.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "ICO")
"""Decoders that may see a file; Pillow registers 42, each one more way in for a crafted file."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ico"})
"""Names of image files, casefolded; the content alone decides how a file is decoded."""

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: 81 MP fit in a PNG of 230 KiB."""

_DIRECT = frozenset({"RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX"})
_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})


def read(
    data: bytes | Path, bg_color: tuple[int, int, int] = (255, 255, 255)
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of an image file, upright by its EXIF, transparent parts over `bg_color`; first frame.

    16-bit grey is scaled to 8 bits.

    Raises:
        UserError: the reason why the image cannot be used, without its name.
    """
    try:
        stream = io.BytesIO(data) if isinstance(data, bytes) else data
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{width}x{height} is more than 64 megapixels: scale it down")
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_as_rgb(image, bg_color))
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        raise UserError(f"damaged image ({type(error).__name__}: {error})") from None


def _as_rgb(image: Image.Image, bg_color: tuple[int, int, int]) -> Image.Image:
    """The image in mode RGB."""
    mode = image.mode
    if mode in _ALPHA or (mode in _DIRECT and "transparency" in image.info):
        if mode == "La":  # premultiplied; Pillow knows only the way over LA
            image = image.convert("LA")
        ground = Image.new("RGBA", image.size, (*bg_color, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    if mode in _DIRECT:
        return image.convert("RGB")
    if mode.startswith("I;16") and "transparency" not in image.info:
        # Pillow's own conversion clips at 255: nearly all white.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    raise UserError(f"pixels of mode {mode} have no defined range: save it as 8-bit RGB")


def resize_and_crop(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """The centre of the image at `size` (width, height): scaled to cover it, the rest cut off.

    Lanczos when shrinking, bicubic when growing. The part that stays is cut out in the source's
    own coordinates, so a strip of 60000x1 takes no more memory than any other image.
    """
    height, width = image.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    if scale == 1 and (width, height) == tuple(size):
        return image
    kept_width, kept_height = min(size[0] / scale, width), min(size[1] / scale, height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    filter_ = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(Image.fromarray(image).resize(size, filter_, box=box))


def crop_and_pad(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """The centre of the image at `size` (width, height), not scaled; black right and below where
    the image is smaller."""
    width, height = size
    top, left = max(image.shape[0] - height, 0) // 2, max(image.shape[1] - width, 0) // 2
    kept = image[top : top + height, left : left + width]
    return np.pad(kept, ((0, height - kept.shape[0]), (0, width - kept.shape[1]), (0, 0)))
