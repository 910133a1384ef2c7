"""Paints the demo's class set: pictures by the base model, of what it should still know afterwards.

    python scripts/make_demo_class_set.py jaxft/builtin/demo/class

A quarter of the captions name the class alone, in the form of the subject's captions; the others
are captions of scenes that the base model was trained on, most of them of two figures, which are
forgotten first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import demo_subject as subject
import demo_world as world
import numpy as np
from PIL import Image

from jaxft import cli, compile_cache, sample
from jaxft import config as configuration

CONFIG = "configs/infer/demo.yaml"
NUM_PICTURES = 240
BATCH = 20
"""Divides the number of pictures of each size."""


class Wanted(NamedTuple):
    """A picture to paint."""

    size: tuple[int, int]
    caption: str


def main(argv: Sequence[str]) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write(args.folder, args.seed)
    print(f"wrote {NUM_PICTURES} pictures to {args.folder}")
    return 0


def wanted(seed: int) -> list[Wanted]:
    """Half of the pictures square, a quarter wide, a quarter upright, as the subject's."""
    rng = np.random.default_rng((seed, NUM_PICTURES))
    square, wide, upright = world.SIZES
    pictures = []
    for number in range(NUM_PICTURES):
        size = (square, wide, square, upright)[number % 4]
        scene = world.random_scene(rng, size, 1 + number // 4 % 2)
        names_class = number // 4 % 4 == 0
        caption = (
            subject.caption(scene.background, world.CLASS)
            if names_class
            else world.caption(scene, rng)
        )
        pictures.append(Wanted(size, caption))
    return pictures


def write(folder: Path, seed: int) -> None:
    """Writes the set: picture i is painted from seed + i."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = wanted(seed)
    for width, height in world.SIZES:
        overrides = [f"bs={BATCH}", f"infer_args.width={width}", f"infer_args.height={height}"]
        config, _ = configuration.load(CONFIG, overrides, "infer")
        compile_cache.enable(config.compile_cache)
        numbers = [i for i, picture in enumerate(pictures) if picture.size == (width, height)]
        requests = [sample.Request(pictures[i].caption, "", seed + i) for i in numbers]
        images = sample.paint(requests, sample.load_model(config), config)
        for number, (pixels, _) in zip(numbers, images, strict=True):
            picture = Image.fromarray(pixels)
            picture.save(folder / f"{number:03}.jpg", quality=90, subsampling=0, optimize=True)
            (folder / f"{number:03}.txt").write_text(f"{pictures[number].caption}\n")


if __name__ == "__main__":
    cli.run(main)
