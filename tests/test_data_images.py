import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jaxft.data import images
from jaxft.errors import UserError
from tests.data_fixtures import photograph


def encoded(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def pixels(data: bytes, bg_color: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    return np.asarray(images.decode(data, bg_color))


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 99])
@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, format_):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(1, (48, 32)), format_, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), np.asarray(upright.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_parts_show_the_background(mode):
    photo = np.asarray(photograph(0, (32, 32)).convert("L" if mode == "LA" else "RGB"))
    alpha = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    if mode in ("P", "PA"):
        alpha = np.where(alpha > 127, 255, 0).astype(np.uint8)
        palette = photograph(0, (32, 32)).quantize(15)
        shown = np.asarray(palette.convert("RGB"))
        indices = np.where(alpha, np.asarray(palette), 15).astype(np.uint8)
        image = Image.fromarray(indices)
        image.putpalette([*(palette.getpalette() or [])[:45], 9, 9, 9])
        data = encoded(image, transparency=15)
    else:
        image = Image.fromarray(np.dstack([photo, alpha]), mode)
        data, shown = encoded(image), photo if photo.ndim == 3 else photo[..., None]
    share = alpha[..., None] / 255
    over = shown * share + np.array([10, 200, 30]) * (1 - share)
    got = pixels(data, (10, 200, 30))
    # Integer rounding of the blend.
    np.testing.assert_allclose(got, np.broadcast_to(over, got.shape), atol=1)


def test_16_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for format_ in ("PNG", "TIFF"):
        got = pixels(encoded(Image.fromarray(ramp), format_))
        np.testing.assert_array_equal(got, np.rint(ramp / 257)[..., None].repeat(3, -1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_look_as_pillow_shows_them(mode):
    photo = photograph(2, (40, 24)).convert(mode)
    data = encoded(photo, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_counts(format_):
    frames = [photograph(i, (32, 32)) for i in range(3)]
    data = encoded(frames[0], format_, save_all=True, append_images=frames[1:])
    first = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(first))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(Image.new("F", (4, 4)), "TIFF"), "mode F"),
        (encoded(Image.new("I", (4, 4)), "TIFF"), "mode I"),
        (b"", "not an image"),
        (b"caption", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encoded(Image.new("1", (9000, 9000))), "64 megapixels"),
    ],
)
def test_what_cannot_be_used_says_why(data, reason):
    with pytest.raises(UserError, match=reason):
        pixels(data)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_file_cut_short_is_refused(format_):
    data = encoded(photograph(0, (64, 64)), format_)
    with pytest.raises(UserError):
        pixels(data[: len(data) * 6 // 10])


def test_a_header_that_lies_is_refused():
    head = b"\x89PNG\r\n\x1a\n"
    body = b"IHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    data = head + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(UserError):
        pixels(data)


@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(["PNG", "GIF", "TIFF", "ICO"]))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFF tags
def test_damaged_bytes_give_pixels_or_a_reason(noise, at, format_):
    data = bytearray(encoded(photograph(0, (16, 16)), format_))
    data[at : at + len(noise)] = noise
    outcome = ""
    try:
        outcome = str(pixels(bytes(data)).dtype)
    except UserError as error:
        outcome = str(error)
    assert outcome


@given(st.tuples(*[st.integers(1, 200)] * 2), st.tuples(*[st.integers(1, 12)] * 2))
@settings(max_examples=100, deadline=None)
def test_crop_is_the_centre_at_one_scale(shape, eighths):
    """A picture of its own coordinates shows which part is kept, and how much it is scaled."""
    (height, width), size = shape, (8 * eighths[0], 8 * eighths[1])
    x = np.tile(np.arange(width) + 20, (height, 1))
    y = np.tile(np.arange(height)[:, None] + 20, (1, width))
    got = images.resize_and_crop(Image.fromarray(np.dstack([x, y, x]).astype(np.uint8)), size)
    assert got.shape == (size[1], size[0], 3)
    scale = max(size[0] / width, size[1] / height)
    middle = got.astype(float).mean(axis=(0, 1))
    # Half a grey level of rounding, and bicubic's overshoot at the edges of small pictures.
    np.testing.assert_allclose(middle[0], 20 + (width - 1) / 2, atol=1)
    np.testing.assert_allclose(middle[1], 20 + (height - 1) / 2, atol=1)
    for axis, (pixels, source) in enumerate(zip(size, (width, height), strict=True)):
        line = got[size[1] // 2, :, 0] if axis == 0 else got[:, size[0] // 2, 1]
        if pixels / scale > 8 and source > 8:
            a, b = pixels // 4, 3 * pixels // 4
            assert (float(line[b]) - float(line[a])) == pytest.approx((b - a) / scale, abs=1.5)


def test_an_image_of_the_right_size_is_not_touched():
    photo = photograph(3, (64, 48))
    np.testing.assert_array_equal(images.resize_and_crop(photo, (64, 48)), np.asarray(photo))


def test_whole_scale_equals_pillow_resize_then_crop():
    photo = photograph(4, (120, 80))
    got = images.resize_and_crop(photo, (40, 40))
    expected = photo.resize((60, 40), Image.Resampling.LANCZOS).crop((10, 0, 50, 40))
    # Lanczos sees no pixels beyond the kept part, so only the cut edges differ.
    np.testing.assert_array_equal(got[:, 3:-3], np.asarray(expected)[:, 3:-3])


def test_a_strip_takes_no_memory():
    got = images.resize_and_crop(Image.new("RGB", (60000, 1)), (512, 512))
    assert got.shape == (512, 512, 3)
