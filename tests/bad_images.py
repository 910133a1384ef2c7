"""Image files as people have them: photographs in every form with what each shows, and damaged
ones.

What a good file shows is stated in NumPy from the photograph that it was made of.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from tests.data_fixtures import photograph

GROUND = (10, 200, 30)
"""The background of transparent files."""

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF"}

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
    99: lambda a: a,
}
"""EXIF 2.3, tag 0x0112: where the first row and column of what is stored are to be seen."""


class Good(NamedTuple):
    """A file that must be used, and what must be seen in it."""

    name: str
    data: bytes
    shown: np.ndarray
    atol: float = 0.0
    """Of the mean difference; above 0 for what loses."""


def encoded(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    if format_ in ("JPEG", "MPO"):
        options = {"quality": 95, "subsampling": 0} | options
    if format_ == "WEBP":
        options = {"lossless": True, "method": 0} | options
    image.save(stream, format_, **options)
    return stream.getvalue()


def good() -> Iterator[Good]:
    """Files that are unusual, and right."""
    yield from _under_other_names()
    yield from _turned()
    yield from _of_other_modes()
    yield from _transparent()
    yield from _of_several_frames()
    photo = photograph(3, (40, 24))
    yield Good("icc_bomb.png", _with_chunk(photo, b"iCCP"), np.asarray(photo))
    for size in ((3000, 1), (1, 3000), (1, 1), (2, 3)):
        photo = photograph(0, size)
        yield Good(f"strip{size[0]}x{size[1]}.png", encoded(photo), np.asarray(photo))


def _under_other_names() -> Iterator[Good]:
    photo = photograph(1, (40, 24)).quantize(64).convert("RGB")  # GIF holds it too
    for is_, format_ in FORMATS.items():
        for said in FORMATS:
            yield Good(
                f"{is_}_called.{said}", encoded(photo, format_), np.asarray(photo), _atol(format_)
            )
    yield Good("LARGE.PNG", encoded(photo), np.asarray(photo))
    yield Good("nameless", encoded(photo), np.asarray(photo))
    yield Good("photo.JPG_large", encoded(photo, "JPEG"), np.asarray(photo), 4)


def _turned() -> Iterator[Good]:
    photo = photograph(2, (40, 24))
    for suffix in ("png", "jpg", "webp", "tif"):
        for orientation, upright in UPRIGHT.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            yield Good(
                f"turned{orientation}.{suffix}",
                encoded(photo, FORMATS[suffix], exif=exif),
                upright(np.asarray(photo)),
                _atol(FORMATS[suffix]),
            )


def _of_other_modes() -> Iterator[Good]:
    photo = photograph(4, (40, 24))
    grey = np.asarray(photo.convert("L"))
    yield Good("grey.png", encoded(photo.convert("L")), _three(grey))
    yield Good("grey.jpg", encoded(photo.convert("L"), "JPEG"), _three(grey), 4)
    yield Good("grey.bmp", encoded(photo.convert("L"), "BMP"), _three(grey))
    black = grey > 99
    yield Good("bilevel.png", encoded(Image.fromarray(black)), _three(black * np.uint8(255)))
    wide = (grey.astype(np.uint16) * 256 + grey[::-1]).astype(np.uint16)
    as_8_bits = _three(np.rint(wide / 257).astype(np.uint8))
    yield Good("grey16.png", encoded(Image.fromarray(wide)), as_8_bits)
    yield Good("grey16.tif", encoded(Image.fromarray(wide), "TIFF"), as_8_bits)
    big = Image.frombytes("I;16B", (40, 24), wide.astype(">u2").tobytes())
    yield Good("grey16b.tif", encoded(big, "TIFF"), as_8_bits)
    negative = encoded(Image.fromarray(wide), "TIFF", tiffinfo={262: 0})
    yield Good("negative16.tif", negative, 255 - as_8_bits)
    palette = photo.quantize(32)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    for suffix in ("png", "gif", "bmp", "tif"):
        yield Good(f"palette.{suffix}", encoded(palette, FORMATS[suffix]), colours)
    inks = np.dstack([255 - np.asarray(photo), grey // 3]).astype(np.uint8)
    # Ink takes away its share of the light, black that of all three.
    light = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    cmyk = Image.fromarray(inks, "CMYK")
    yield Good("cmyk.tif", encoded(cmyk, "TIFF"), light, 1)
    yield Good("cmyk.jpg", encoded(cmyk, "JPEG"), light, 5)
    yield Good("ycbcr.tif", encoded(photo.convert("YCbCr"), "TIFF"), np.asarray(photo), 2)


def _transparent() -> Iterator[Good]:
    photo = photograph(5, (40, 24))
    grey, colour = np.asarray(photo.convert("L")), np.asarray(photo)
    alpha = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1))
    rgba = Image.fromarray(np.dstack([colour, alpha]), "RGBA")
    for suffix in ("png", "webp", "tif"):
        data = encoded(rgba, FORMATS[suffix], **({"exact": True} if suffix == "webp" else {}))
        yield Good(f"alpha.{suffix}", data, over(colour, alpha), 1)
    la = Image.fromarray(np.dstack([grey, alpha]), "LA")
    yield Good("grey_alpha.png", encoded(la), over(_three(grey), alpha), 1)
    hidden = (grey == grey[0, 0]) * np.uint8(255)
    keyed = encoded(photo.convert("L"), transparency=int(grey[0, 0]))
    yield Good("keyed.png", keyed, over(_three(grey), 255 - hidden))
    wide = grey.astype(np.uint16) * 257
    keyed = encoded(Image.fromarray(wide), transparency=int(wide[0, 0]))
    yield Good("keyed16.png", keyed, over(_three(grey), 255 - hidden))
    palette = photo.quantize(31)
    indices = np.asarray(palette)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[indices]
    clear = (indices == indices[0, 0]) * np.uint8(255)
    for suffix in ("png", "gif"):
        data = encoded(palette, FORMATS[suffix], transparency=int(indices[0, 0]))
        yield Good(f"clear.{suffix}", data, over(colours, 255 - clear))


def _of_several_frames() -> Iterator[Good]:
    frames = [photograph(i, (40, 24)).quantize(32).convert("RGB") for i in range(3)]
    for suffix, format_ in {**FORMATS, "mpo.jpg": "MPO"}.items():
        if format_ not in ("JPEG", "BMP"):
            data = encoded(frames[0], format_, save_all=True, append_images=frames[1:])
            yield Good(f"frames.{suffix}", data, np.asarray(frames[0]), _atol(format_))


def bad() -> Iterator[tuple[str, bytes]]:
    """Files that cannot be used, under the names of images."""
    photo = photograph(3, (64, 48))
    for suffix, format_ in FORMATS.items():
        whole = encoded(photo, format_)
        for percent in (2, 30, 60, 85):
            yield f"cut{percent}.{suffix}", whole[: len(whole) * percent // 100]
        yield f"empty.{suffix}", b""
        yield f"no_magic.{suffix}", bytes(16) + whole[16:]
        yield f"zeros.{suffix}", bytes(len(whole))
    yield from {
        "text.png": b"a caption",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "print.tif": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "paper.png": b"%PDF-1.7\n",
        "packed.jpg": b"PK\x03\x04" + bytes(40),
        "phone.jpg": b"\x00\x00\x00\x18ftypheic" + bytes(40),
        "layers.png": b"8BPS\x00\x01" + bytes(40),
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }.items()
    yield "real.tif", encoded(Image.new("F", (8, 8)), "TIFF")
    yield "whole.tif", encoded(Image.new("I", (8, 8)), "TIFF")
    yield "megapixels81.png", encoded(Image.new("1", (9000, 9000)))
    yield "lying.png", _png(2**31 - 1, 2**31 - 1, b"")
    yield "bomb.png", _png(20000, 20000, zlib.compress(bytes(2000)))
    yield "few_rows.png", _png(64, 64, zlib.compress(bytes(1000)))
    yield "text_bomb.png", _with_chunk(photo, b"zTXt")
    whole = bytearray(encoded(photo))
    for at in (30, 60, len(whole) // 3, len(whole) // 2, len(whole) - 40):
        spoilt = whole.copy()
        spoilt[at : at + 8] = b"\xa5" * 8
        yield f"spoilt{at}.png", bytes(spoilt)


def large(count: int) -> Iterator[tuple[str, bytes]]:
    """The largest images that are used, each in the form that takes most memory for its bytes."""
    for mode in ("1", "RGBA", "I;16"):
        data = encoded(Image.new(mode, (8000, 8000)), compress_level=1)
        yield from ((f"{mode[0]}{number}.png", data) for number in range(count))


def over(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours in front of the background."""
    share = alpha[..., None] / 255
    return colours * share + np.array(GROUND) * (1 - share)


def _with_chunk(photo: Image.Image, name: bytes) -> bytes:
    """A PNG with 70 MiB in a few bytes beside its pixels."""
    info = PngImagePlugin.PngInfo()
    info.add(name, b"name\0\0" + zlib.compress(bytes(70 * 2**20), 1))
    return encoded(photo, pnginfo=info)


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _three(grey: np.ndarray) -> np.ndarray:
    return grey[..., None].repeat(3, -1)


def _atol(format_: str) -> float:
    return 4.0 if format_ in ("JPEG", "MPO") else 0.0
