"""Real photographs, those that scikit-image and scikit-learn carry, and folders made of them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import random_model
import skimage
import sklearn.datasets
from PIL import Image

from jaxft import assembly
from jaxft.data import batches, buckets, latents, loader
from jaxft.data.records import Record
from jaxft.data.tokens import Tokenizer

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


def one_shape(folder: Path, **source: str) -> dict[str, Any]:
    """`data` of a configuration: the images of a folder as squares of 64 pixels, one in a batch."""
    return {
        "dataset1": {
            "batch_size": 1,
            "source": {"data_source1": {"img_root": str(folder), **source}},
            "bucket": {"target_area": 64 * 64, "step_size": 32, "num_bucket": 1},
        }
    }


def assert_same_batch(a: loader.Batch, b: loader.Batch) -> None:
    """The same names, each with the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


def with_and_without_cache(
    records: Sequence[Record], folder: Path
) -> tuple[loader.Dataset, loader.Dataset]:
    """A data set of squares in batches of two, and the same with its latents kept, all of them 0;
    `folder` gets a tokenizer. Batches of both have the shapes that programs are compiled for."""
    random_model.write_tokenizer(folder)
    shaped = buckets.fixed_bucket([record.size for record in records], target_size=64)
    plan = batches.BatchPlan(shaped, 2, seed=0, name="a")
    data = loader.Dataset("a", records, shaped, plan, [Tokenizer(folder)])
    store = latents.cache(
        data.wanted, lambda pixels: np.zeros((2, 8, 8, 8), np.float32), batch_size=2
    )
    cached = replace(data, moments=store)
    for one in (data, cached):
        (expected,) = assembly.one_of_each_shape(one)
        got = {name: (value.shape, value.dtype) for name, value in one.batch(0).items()}
        assert got == {name: (value.shape, value.dtype) for name, value in expected.items()}
    return data, cached
