"""Paints the demo's class set: pictures by the base model, of what it should still know afterwards.

    python scripts/make_demo_class_set.py jaxft/builtin/demo/class

Of eight captions one names the class alone, in the form of the subject's captions; the others are
captions of scenes that the base model was trained on, two of one figure, and five of two figures,
which are forgotten first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import demo_subject as subject
import demo_world as world
import numpy as np
from PIL import Image

from jaxft import cli, compile_cache, sample
from jaxft import config as configuration

CONFIG = "configs/infer/demo.yaml"
NUM_PICTURES = 240
BATCH = 20
"""Divides the number of pictures."""

SIZE = world.SIZES[0]
"""One size: a shape of batch more would have to be compiled."""


def main(argv: Sequence[str]) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write(args.folder, args.seed)
    print(f"wrote {NUM_PICTURES} pictures to {args.folder}")
    return 0


def captions(seed: int) -> list[str]:
    """What to paint, in the order of the pictures' numbers."""
    rng = np.random.default_rng((seed, NUM_PICTURES))
    texts = []
    for number in range(NUM_PICTURES):
        scene = world.random_scene(rng, SIZE, 1 if number % 8 in (2, 5) else 2)
        names_class = number % 8 == 0
        texts.append(
            subject.caption(scene.background, world.CLASS)
            if names_class
            else world.caption(scene, rng)
        )
    return texts


def write(folder: Path, seed: int) -> None:
    """Writes the set: picture i is painted from seed + i."""
    folder.mkdir(parents=True, exist_ok=True)
    config, _ = configuration.load(CONFIG, [f"bs={BATCH}"], "infer")
    compile_cache.enable(config.compile_cache)
    texts = captions(seed)
    requests = [sample.Request(text, "", seed + i) for i, text in enumerate(texts)]
    images = sample.paint(requests, sample.load_model(config), config)
    for number, (text, (pixels, _)) in enumerate(zip(texts, images, strict=True)):
        picture = Image.fromarray(pixels)
        picture.save(folder / f"{number:03}.jpg", quality=90, subsampling=0, optimize=True)
        (folder / f"{number:03}.txt").write_text(f"{text}\n")


if __name__ == "__main__":
    cli.run(main)
