"""Curves, and several images, as one picture."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

SIZE, MARGIN = (640, 360), 48
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")


def draw(
    title: str, xs: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> UInt8[np.ndarray, "h w 3"]:
    """Curves over the same places, values above 0 on a logarithmic axis; others are left out."""
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    seen = [y for curve in curves.values() for y in curve if 0 < y < math.inf] or [1.0]
    low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
    high += high == low
    (width, height), left, right = SIZE, min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (math.log10(y) - low) / (high - low)
        return MARGIN + across * (width - 2 * MARGIN), height - MARGIN - up * (height - 2 * MARGIN)

    for power in range(low, high + 1):
        start, end = place(left, 10.0**power), place(right, 10.0**power)
        pen.line([start, end], "#dddddd")
        pen.text((4, start[1] - 6), f"1e{power}", "black")
    for x in (left, right):
        pen.text((place(x, 10.0**low)[0] - 8, height - MARGIN + 6), f"{x:g}", "black")
    pen.text((MARGIN, 8), title, "black")
    for number, (name, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        points = [place(x, y) for x, y in zip(xs, curve, strict=True) if 0 < y < math.inf]
        pen.line(points, color, 2)
        pen.text((MARGIN + 120 * number, height - 20), name, color)
    return np.asarray(image)


def tile(images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Images of one size side by side, row by row, in a square or near it."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, _ = images[0].shape
    whole = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        whole[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return whole
