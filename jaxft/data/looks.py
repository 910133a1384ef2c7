"""What the files of images, and of those beside them, hold, found by decoding each once; and what
is told of it."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from jaxft.data import beside, files, images
from jaxft.data.captions import shown, some
from jaxft.data.index import Index
from jaxft.data.listing import Listing
from jaxft.errors import UserError

RECIPE = f"1 {PIL.__version__}"
"""Its number is to be raised when a file is seen in another way: what was seen before is kept."""


class Look(NamedTuple):
    """An image file that can be used."""

    width: int
    """In pixels, upright."""
    height: int
    format: str
    """A key of `images.FORMATS`."""
    frames: bool
    """Whether it has several frames, of which the first counts."""
    digest: str
    """SHA-256 of the file."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


def at_images(found: Listing, kept: Path | None, notices: list[str]) -> Iterator[Look | UserError]:
    """What each image is, or why it cannot be used; says at the end how many were known."""
    root, names, spans = found.root, found.names, found.spans

    def stamp(place: int) -> files.Stamp | None:
        return files.stamp(spans[place].file if spans else f"{root}/{names[place]}")

    def read(place: int) -> Look:
        span = spans[place] if spans else None
        data = files.read(root / names[place], images.MAX_BYTES, span)
        size, kind = images.decode(data).size, images.kind(data)
        return Look(*size, *kind, hashlib.sha256(data).hexdigest())

    known = Index(kept, root, f"images {RECIPE}")
    for fact in known.look(names, stamp, read, title=f"reading {root}"):
        yield fact if isinstance(fact, UserError) else Look(*fact)
    if known.num_known:
        notices.append(f"{known.num_known:,} of {len(names):,} images are as they were read before")


def beside_images(
    side: beside.Found, kept: Path | None
) -> Iterator[beside.Look | UserError | None]:
    """What the file beside each image is, or why it cannot be used; None where there is none."""
    root, present = side.root, [name for name in side.names if name]
    looks: Iterator[Any] = Index(kept, root, f"masks {RECIPE}").look(
        present,
        lambda place: files.stamp(f"{root}/{present[place]}"),
        lambda place: beside.look(files.read(root / present[place], images.MAX_BYTES)),
        title=f"reading {root}",
    )
    for name in side.names:
        fact = next(looks) if name else None
        yield beside.Look(*fact) if isinstance(fact, list | tuple) else fact


class Surprises:
    """Images that are not what one would think, or are left out."""

    def __init__(self):
        self._misnamed: list[str] = []
        self._several: list[str] = []
        self._small: list[str] = []

    def note(self, name: str, look: Look) -> None:
        """Looks at one image that is used."""
        if os.path.splitext(name)[1].casefold() not in images.FORMATS[look.format]:
            self._misnamed.append(f"{shown(name)} ({look.format})")
        if look.frames:
            self._several.append(name)

    def leave_out(self, name: str) -> None:
        """Notes that an image is too small."""
        self._small.append(name)

    @property
    def notices(self) -> list[str]:
        """What a user should know."""
        notices = []
        if self._misnamed:
            notices.append(
                f"images whose name says otherwise, and are used: {some(self._misnamed)}"
            )
        if self._several:
            notices.append(f"of several frames the first is used: {some(self._several)}")
        if self._small:
            small = self._small
            notices.append(f"left out, smaller than min_size: {len(small)}: {some(small)}")
        return notices
