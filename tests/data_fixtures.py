"""Real photographs, those that scikit-image and scikit-learn carry, and folders made of them."""

from functools import lru_cache
from pathlib import Path

import skimage
import sklearn.datasets
from PIL import Image

_SKIMAGE = Path(skimage.__file__).parent / "data"
_SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = (
    _SKIMAGE / "astronaut.png",
    _SKIMAGE / "chelsea.png",
    _SKIMAGE / "coffee.png",
    _SKIMAGE / "rocket.jpg",
    _SKLEARN / "china.jpg",
    _SKLEARN / "flower.jpg",
)


@lru_cache
def photograph(index: int, size: tuple[int, int]) -> Image.Image:
    """One of the photographs, made small."""
    with Image.open(PHOTOGRAPHS[index % len(PHOTOGRAPHS)]) as image:
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


SIZES = ((64, 64), (96, 64), (64, 96), (80, 64), (48, 96))


def photo_folder(folder: Path, count: int = 11, captions: bool = True) -> Path:
    """A folder `0.png`, `1.jpg`, … in several shapes, each with its `.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = photograph(index, SIZES[index % len(SIZES)])
        # A different row each, so that no two files are the same image.
        image = image.copy()
        image.putpixel((0, 0), (index, 0, 0))
        image.save(folder / f"{index}.{'jpg' if index % 2 else 'png'}", quality=95)
        if captions:
            (folder / f"{index}.txt").write_text(f"photo {index} of the cat\n")
    return folder
