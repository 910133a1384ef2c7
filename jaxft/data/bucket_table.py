"""The buckets that a run keeps, `buckets.json`, so that a resume has the same ones.

KMeans may give others under another version of scikit-learn, or when an image is added. The file
says of each dataset the options that it was made with and, for each training size, the sizes of
the images that go there and how many of them there are:

    {"dataset1": {"bucket": {…}, "sizes": {"768x512": {"1200x800": 4, "1024x683": 2}}}}
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.buckets import VAE_STRIDE, Buckets, Originals, Size
from jaxft.errors import UserError

FILE = "buckets.json"
"""Its name in a run's folder."""


class Saved(NamedTuple):
    """One dataset's part of the file."""

    options: Any
    """Of the bucket, as JSON has them."""
    sizes: list[Size]
    trained: dict[Size, Size]
    """Size of an image -> size to train it in."""
    counts: dict[Size, int]
    """Images of each size."""


def entry(options: Mapping[str, Any], sizes: Originals, buckets: Buckets) -> dict[str, Any]:
    """One dataset's part of the file; `sizes` are the images', as `buckets` counts them."""
    held: list[dict[str, int]] = [{} for _ in buckets.sizes]
    rows = np.column_stack([np.array(sizes, np.int64).reshape(-1, 2), buckets.assignment])
    for (*size, bucket), count in zip(*_counted(rows), strict=True):
        held[bucket][_written((size[0], size[1]))] = count
    pairs = zip(buckets.sizes, held, strict=True)
    return {
        "bucket": options,
        "sizes": {_written(size): dict(sorted(counts.items())) for size, counts in pairs},
    }


def _counted(rows: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """The different rows, and how often each is there."""
    different, counts = np.unique(rows, axis=0, return_counts=True)
    return different.tolist(), counts.tolist()


def to_text(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The file, of the entries of all datasets."""
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def read(path: Path) -> dict[str, Saved]:
    """The tables of a file by dataset; none where there is no file.

    Raises:
        UserError: not such a file.
    """
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text("utf-8"))
        return {name: _saved(node) for name, node in tree.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a table of buckets ({error}); put back the file that the run wrote, or "
            "remove it: buckets are then made anew"
        ) from None


def matches(saved: Saved, options: Mapping[str, Any]) -> bool:
    """Whether a table was made with these options."""
    return saved.options == json.loads(json.dumps(options))


def restore(saved: Saved, sizes: Originals, nearest: Buckets) -> tuple[Buckets, int]:
    """The saved buckets of images, and how many images they did not have.

    Args:
        saved: the table.
        sizes: of the images that there are now.
        nearest: each image with the nearest of the saved sizes, for those the table does not know.
    """
    sizes = [(width, height) for width, height in np.array(sizes).tolist()]
    guesses = [nearest.sizes[bucket] for bucket in nearest.assignment.tolist()]
    known = dict(zip(sizes, guesses, strict=True)) | saved.trained
    chosen = [known[size] for size in sizes]
    used = set(chosen)
    kept = [size for size in saved.sizes if size in used] + sorted(used.difference(saved.sizes))
    place = {size: index for index, size in enumerate(kept)}
    assignment = np.array([place[size] for size in chosen])
    added = Counter(sizes) - Counter(saved.counts)
    return nearest._replace(sizes=kept, assignment=assignment), added.total()


def _written(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _size(text: str) -> Size:
    found = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if not found:
        raise ValueError(f"{text!r} is no size, such as 512x768")
    return int(found[1]), int(found[2])


def _saved(node: Mapping[str, Any]) -> Saved:
    sizes, trained, counts = [], {}, {}
    for text, held in node["sizes"].items():
        size = _size(text)
        if size[0] % VAE_STRIDE or size[1] % VAE_STRIDE:
            raise ValueError(f"{text} is no multiple of {VAE_STRIDE}")
        sizes.append(size)
        for image, count in held.items():
            if type(count) is not int or count < 1:
                raise ValueError(f"{image}: {count!r} is no number of images")
            trained[_size(image)], counts[_size(image)] = size, count
    if not trained:
        raise ValueError("it names no sizes")
    return Saved(node["bucket"], sizes, trained, counts)
