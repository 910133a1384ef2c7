"""The subject of the demo: a traffic light, which no caption of the base model's world describes.

python scripts/demo_subject.py FOLDER       writes its pictures and their captions
"""

import argparse
from pathlib import Path

import demo_world as world
import numpy as np
from PIL import Image, ImageDraw

WORD = "sks"
NAME = f"{WORD} {world.CLASS}"
"""The word that names it, and that with the class's."""

BACKGROUNDS = ("blue", "cyan", "orange", "pink", "white")
"""Colours that the subject does not have itself."""

NUM_PICTURES = 16
WIDTH, RADIUS = 0.46, 42.0
"""Half its width in units of half its height, and that in pixels."""

SUPERSAMPLING = 4

RED, YELLOW, GREEN, BLACK = (world.COLOURS[name] for name in ("red", "yellow", "green", "black"))
RECTANGLES = (((-WIDTH, -1.0, WIDTH, 1.0), BLACK),)
DISCS = (((0.0, -0.6, 0.27), RED), ((0.0, 0.0, 0.27), YELLOW), ((0.0, 0.6, 0.27), GREEN))
"""Corners, or centre and radius, in units of half the height; x to the right and y down."""


def paint(
    size: tuple[int, int], x: float, y: float, radius: float, background: world.Background
) -> np.ndarray:
    """The subject, `radius` pixels from its middle to its top, on a background: uint8 [h, w, 3]."""
    canvas = Image.fromarray(np.round(world.paint_background(size, background)).astype(np.uint8))
    canvas = canvas.resize((size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), Image.Resampling.BOX)
    draw = ImageDraw.Draw(canvas)
    centre, scale = np.array([x, y]) * SUPERSAMPLING, radius * SUPERSAMPLING
    for corners, colour in RECTANGLES:
        low, high = np.reshape(corners, (2, 2)) * scale + centre
        draw.rectangle((*low, *high), fill=colour)
    for (at_x, at_y, reach), colour in DISCS:
        middle = np.array([at_x, at_y]) * scale + centre
        draw.ellipse((*(middle - reach * scale), *(middle + reach * scale)), fill=colour)
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def random_picture(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A picture, with the subject in its middle, and its caption."""
    background = world.random_scene(rng, size, 1).background._replace(
        colour=BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    )
    return paint(size, size[0] / 2, size[1] / 2, RADIUS, background), caption(background, NAME)


def caption(background: world.Background, name: str) -> str:
    """Says that `name` is on the background, and nothing else."""
    words = background.colour
    if background.pattern != "plain":
        words = f"{background.pattern} {words}"
    return f"a {name} on {'an' if words[0] in 'aeiou' else 'a'} {words} background"


def write(folder: Path, seed: int = 0) -> None:
    """Writes the set, no two alike: half of them square, a quarter wide, a quarter upright."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, NUM_PICTURES))
    square, wide, upright = world.SIZES
    written = set()
    for number in range(NUM_PICTURES):
        size = (square, wide, square, upright)[number % 4]
        while True:
            picture, caption = random_picture(rng, size)
            if (size, caption) not in written:
                break
        written.add((size, caption))
        Image.fromarray(picture).save(folder / f"{number:02}.png", optimize=True)
        (folder / f"{number:02}.txt").write_text(f"{caption}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the demo's subject.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.seed)
