"""Image files to pixels: decoding by content, one table of modes, resize to cover and crop."""

import contextlib
import io
import re
import threading
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from jaxft.errors import UserError

FORMATS: dict[str, frozenset[str]] = {
    "PNG": frozenset({".png"}),
    "JPEG": frozenset({".jpg", ".jpeg"}),
    "WEBP": frozenset({".webp"}),
    "BMP": frozenset({".bmp"}),
    "GIF": frozenset({".gif"}),
    "TIFF": frozenset({".tif", ".tiff"}),
    "ICO": frozenset({".ico"}),
}
"""Decoders that may see a file, and how their files are called, casefolded; the content alone
decides. Pillow registers 42, each one more way in for a crafted file."""

SUFFIXES = frozenset().union(*FORMATS.values())
"""Names of image files."""

_MAGIC = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "GIF": rb"GIF8[79]a",
}
"""How files begin that are images under any name. Not TIFF: raw files of cameras are one, and what
would be decoded is their thumbnail."""

HEAD = 32
"""Bytes that `is_image` needs."""

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: 81 MP fit in a PNG of 230 KiB."""

MAX_BYTES = 2**29
"""Larger files are refused before they are read: 64 megapixels have no more, of 16-bit RGBA."""

_TOO_LARGE = "more than 64 megapixels: scale it down"

_LARGE = 16_000_000
"""Pixels from which images are decoded one at a time, so that threads need no more memory."""

_BAND = 2**22
"""Pixels that are composited at once."""

_DIRECT = frozenset({"RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX"})
_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF

_one_large = threading.Lock()


class Kind(NamedTuple):
    """What an image file is, besides its pixels."""

    format: str
    """A key of `FORMATS`."""
    frames: bool
    """Whether it has several frames, of which the first counts."""


def kind(data: bytes) -> Kind:
    """The kind of an image that can be decoded. A phone's JPEG with a second picture has one frame.

    Raises:
        UserError: the checksums of a PNG are wrong, of which its decoder says nothing.
    """
    with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
        found = "JPEG" if image.format == "MPO" else str(image.format)
        try:
            frames = image.format != "MPO" and getattr(image, "is_animated", False)
        except Exception:  # parsers raise anything; what is behind the first frame is damaged
            frames = True
        try:
            if found == "PNG":
                image.verify()
        except (SyntaxError, OSError):
            raise UserError("damaged image: a checksum is wrong") from None
    return Kind(found, frames)


def is_image(head: bytes) -> bool:
    """Whether a file that begins so, under a name that says nothing, is an image."""
    return any(re.match(magic, head, re.DOTALL) for magic in _MAGIC.values())


def decode(data: bytes, bg_color: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An image file in mode RGB, upright by its EXIF, transparent parts over `bg_color`; the first
    frame.

    16-bit grey is scaled to 8 bits.

    Raises:
        UserError: the reason why the image cannot be used, without its name.
    """
    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{width}x{height} is {_TOO_LARGE}")
            large = width * height > _LARGE
            with _one_large if large else contextlib.nullcontext():
                ImageOps.exif_transpose(image, in_place=True)
                return _as_rgb(image, bg_color)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"it is {_TOO_LARGE}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    except MemoryError:
        raise UserError("there is not enough memory to decode it: scale it down") from None
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        raise UserError(f"damaged image ({type(error).__name__}: {error})") from None


def _as_rgb(image: Image.Image, bg_color: tuple[int, int, int]) -> Image.Image:
    """The image in mode RGB."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _from_16_bits(image, bg_color)
    if mode in _ALPHA or (mode in _DIRECT and "transparency" in image.info):
        return _over(image, bg_color)
    if mode in _DIRECT:
        image.load()
        # In mode RGB already: not copied. It holds no file once it is loaded.
        return image if mode == "RGB" else image.convert("RGB")
    raise UserError(f"pixels of mode {mode} have no defined range: save it as 8-bit RGB")


def _over(image: Image.Image, bg_color: tuple[int, int, int]) -> Image.Image:
    """An image with transparency over a colour, made in bands, for the memory's sake."""
    width, height = image.size
    whole = Image.new("RGB", image.size)
    rows = max(_BAND // width, 1)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        if band.mode == "La":  # premultiplied; Pillow knows only the way over LA
            band = band.convert("LA")
        ground = Image.new("RGBA", band.size, (*bg_color, 255))
        band = Image.alpha_composite(ground, band.convert("RGBA"))
        whole.paste(band.convert("RGB"), (0, top))
    return whole


def _from_16_bits(image: Image.Image, bg_color: tuple[int, int, int]) -> Image.Image:
    """16-bit grey; Pillow's own conversion clips at 255: nearly all white."""
    values = np.asarray(image)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    whole = Image.fromarray(grey).convert("RGB")
    hidden = image.info.get("transparency")
    if hidden is not None:
        whole.paste(bg_color, mask=Image.fromarray(values == hidden))
    return whole


# Parts of an image ------------------------------------------------------------------------------


class View(NamedTuple):
    """Which part of an image is shown, where not all of it is, and whether it is mirrored."""

    x: float = 0.5
    """The share of what is cut off that lies to the left, of the image as it is shown; 0 to 1."""
    y: float = 0.5
    """The share that lies above."""
    mirrored: bool = False
    """Left to right."""

    def mirror(self) -> "View":
        """The same part, mirrored."""
        return View(1 - self.x, self.y, not self.mirrored)


CENTRE = View()


def resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    view: View = CENTRE,
    original: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """A part of the image at `size` (width, height): scaled to cover it, the rest cut off.

    Lanczos when shrinking, bicubic when growing. The part that stays is cut out in the source's
    own coordinates, so a strip of 60000x1 takes no more memory than any other image. Of an image
    that lies over one of the size `original`, it is the part over what is shown of that.
    """
    original = original or image.size
    scale = max(size[0] / image.width, size[1] / image.height)
    if not image.size == original == tuple(size):
        filter_ = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
        image = image.resize(size, filter_, box=covered(original, size, view, image.size))
    return _mirrored(np.asarray(image), view)


def crop_and_pad(
    image: Image.Image, size: tuple[int, int], view: View = CENTRE
) -> UInt8[np.ndarray, "H W 3"]:
    """A part of the image at `size` (width, height), not scaled; black right and below where the
    image is smaller."""
    width, height = size
    left, top = corner(image.size, size, view, scaled=False)
    if view.mirrored:
        left = max(image.width - width, 0) - left
    kept = image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))
    pixels = _mirrored(np.asarray(kept), view)
    return np.pad(pixels, ((0, height - kept.height), (0, width - kept.width), (0, 0)))


def _mirrored(pixels: UInt8[np.ndarray, "h w 3"], view: View) -> UInt8[np.ndarray, "h w 3"]:
    return np.ascontiguousarray(pixels[:, ::-1]) if view.mirrored else pixels


def covered(
    original: tuple[int, int],
    size: tuple[int, int],
    view: View = CENTRE,
    over: tuple[int, int] | None = None,
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in the image as it is stored, of the part that is scaled to
    `size`; or, of an image of the size `over` that lies over it, of the same part. All are widths
    and heights."""
    width, height = original
    scale = max(size[0] / width, size[1] / height)
    kept_width, kept_height = min(size[0] / scale, width), min(size[1] / scale, height)
    x = 1 - view.x if view.mirrored else view.x
    left, top = (width - kept_width) * x, (height - kept_height) * view.y
    right, bottom = left + kept_width, top + kept_height
    if over in (None, original):
        return left, top, right, bottom
    x, y = over[0] / width, over[1] / height
    return left * x, top * y, min(right * x, over[0]), min(bottom * y, over[1])


def slack(original: tuple[int, int], size: tuple[int, int], *, scaled: bool) -> tuple[float, float]:
    """Columns and rows that are cut off, after scaling if the image is `scaled`."""
    ratios = [wanted / given for wanted, given in zip(size, original, strict=True)]
    scale = max(ratios) if scaled else 1
    columns, rows = (
        max(scale * given - wanted, 0) for wanted, given in zip(size, original, strict=True)
    )
    return columns, rows


Box = tuple[float, float, float, float]
"""A part of an image: left, top, right and bottom, as shares of its width and height."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def around(box: Box, original: tuple[int, int], size: tuple[int, int], *, scaled: bool) -> View:
    """The view at `size` that has a box as near to its middle as the image's edges let it: all of
    the box is shown if there is room."""
    shares = []
    for start, end, cut, wanted in zip(
        box[:2], box[2:], slack(original, size, scaled=scaled), size, strict=True
    ):
        before = (start + end) / 2 * (wanted + cut) - wanted / 2
        shares.append(min(max(before / cut, 0.0), 1.0) if cut else 0.5)
    return View(*shares)


def corner(
    original: tuple[int, int], size: tuple[int, int], view: View = CENTRE, *, scaled: bool
) -> tuple[int, int]:
    """Whole columns and rows that are cut off to the left and above, of the image as it is shown,
    after scaling if it is `scaled`."""
    whole = round if scaled else lambda offset: int(offset + 1e-6)  # 49 · (1 / 49) < 1
    columns, rows = slack(original, size, scaled=scaled)
    return whole(columns * view.x), whole(rows * view.y)
