"""The images of a data set as records, kept in columns: a million of them take a few hundred MB."""

import copy
import itertools
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxft.data import beside, images, prompts
from jaxft.data.columns import Texts
from jaxft.data.files import Span
from jaxft.data.images import CENTRE, View
from jaxft.data.looks import Look

Crop = Literal["center", "random", "mask"]
"""Which part of an image is kept: `mask`, what its mask shows."""


class Record(NamedTuple):
    """One image of a data set, with all that is needed to make its pixels and its prompt."""

    root: Path
    """The folder of its source."""
    name: str
    """Of its file below that folder; of a member of a tar, below the tar."""
    size: tuple[int, int]
    """Width and height, upright."""
    digest: str
    """SHA-256 of the file."""
    captions: tuple[str, ...]
    """One, or several of which one is drawn each time."""
    recipe: prompts.Recipe
    """What its prompts are made by."""
    bg_color: tuple[int, int, int]
    scaled: bool = True
    """Whether it is scaled to cover the size of its bucket; else it is cropped and padded."""
    crop: Crop = "center"
    flip: bool = False
    """Whether it is mirrored half of the time."""
    view: View = CENTRE
    """What is shown of it; see `source.framed`."""
    mask: beside.File | None = None
    """How much its parts count in the loss; None: all alike."""
    cond: beside.File | None = None
    """What a ControlNet sees."""
    hole: beside.File | Literal["random"] | None = None
    """What an inpainting model paints anew: as a mask says, or another part each time."""
    span: Span | None = None
    """Where its file lies in a tar."""

    @property
    def path(self) -> Path:
        """Of its file."""
        return self.root / self.name  # a path is made in four microseconds, the rest in three


Seen = tuple[str, beside.Look] | None
"""The name of a file that lies beside an image, below its folder, and what it holds."""


class _Files:
    """A column of what lies beside images, in one folder."""

    def __init__(self, root: Path):
        self._root, self._names = root, Texts()
        self._digests, self._boxes = bytearray(), array("d")

    def append(self, seen: Seen) -> None:
        name, digest, box = (seen[0], *seen[1][2:]) if seen else ("", "00" * 32, images.WHOLE)
        self._names.append(name)
        self._digests += bytes.fromhex(digest)
        self._boxes.extend(box)

    def __getitem__(self, row: int) -> beside.File | None:
        if not (name := self._names[row]):
            return None
        left, top, right, bottom = self._boxes[4 * row : 4 * row + 4]
        digest = self._digests[32 * row : 32 * row + 32].hex()
        return beside.File(self._root / name, digest, (left, top, right, bottom))


class Columns:
    """The records of one folder, a column for each of their fields that is not the same for all."""

    def __init__(
        self, shared: Record, folders: Mapping[str, Path] = MappingProxyType({}), repeat: int = 1
    ):
        """No records yet. Files are below `shared.root`, those beside them below `folders`, by
        key of `beside.KINDS`; all comes `repeat` times over, with the fields of
        `shared` where it has none of its own."""
        self._shared, self.repeat = shared, repeat
        self._names, self._captions, self._tars = Texts(), Texts(), Texts()
        self._sizes, self._spans, self._digests = array("i"), array("q"), bytearray()
        self._beside = {key: _Files(root) for key, root in folders.items()}

    def append(
        self,
        name: str,
        look: Look,
        captions: Sequence[str],
        others: Mapping[str, Seen],
        span: Span | None,
    ) -> None:
        """Adds a record: of the image `name` below the folder, with what lies beside it."""
        self._names.append(name)
        self._sizes.extend(look.size)
        self._digests += bytes.fromhex(look.digest)
        self._captions.append("\n".join(captions))
        for key, column in self._beside.items():
            column.append(others[key])
        if span:
            self._tars.append(str(span.file))
            self._spans.extend(span[1:])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: int) -> Record:
        shared = self._shared
        return Record(
            shared.root,
            self._names[row],
            (self._sizes[2 * row], self._sizes[2 * row + 1]),
            self._digests[32 * row : 32 * row + 32].hex(),
            tuple(self._captions[row].split("\n")),
            shared.recipe,
            shared.bg_color,
            shared.scaled,
            shared.crop,
            shared.flip,
            CENTRE,
            self._file("att_mask", row),
            self._file("cond_dir", row),
            self._file("inpaint_mask", row) or shared.hole,
            self._span(row),
        )

    def _file(self, key: str, row: int) -> beside.File | None:
        return self._beside[key][row] if key in self._beside else None

    def _span(self, row: int) -> Span | None:
        if not self._spans:
            return None
        return Span(Path(self._tars[row]), self._spans[2 * row], self._spans[2 * row + 1])

    @property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """Width and height of each image."""
        return np.array(self._sizes, np.int64).reshape(-1, 2)

    @property
    def places(self) -> Float[np.ndarray, " n"]:
        """A number from 0 to 1 for each image, that its content alone decides."""
        return np.frombuffer(self._digests, ">u8")[::4] * 2.0**-64

    def changed(self, **fields: Any) -> "Columns":
        """The same records with other fields that all of them share."""
        other = copy.copy(self)
        other._shared = self._shared._replace(**fields)
        return other

    def plain(self) -> "Columns":
        """The same records, as they are: never mirrored, nor cropped by chance."""
        crop = "center" if self._shared.crop == "random" else self._shared.crop
        return self.changed(crop=crop, flip=False)


class Records(Sequence[Record]):
    """The records of several folders, one after the other, each made when it is asked for."""

    def __init__(self, parts: Iterable[Columns] = (), chosen: Int[np.ndarray, " n"] | None = None):
        """`chosen`: the places of those that there are (None: all), in order, among all of the
        folders with each as often as it is repeated."""
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(len(part) * part.repeat for part in self.parts))
        self._chosen = np.arange(self._ends[-1] if self._ends else 0) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [*map(self._at, self._chosen[place])]
        return self._at(self._chosen[place])

    def __iter__(self) -> Iterator[Record]:
        return map(self._at, self._chosen)

    def _at(self, chosen: np.integer) -> Record:
        place = int(chosen)
        at = bisect_right(self._ends, place)
        part = self.parts[at]
        return part[(place - (self._ends[at - 1] if at else 0)) % len(part)]

    def once(self) -> "Records":
        """Each image once, whatever its folder's `repeat`."""
        first = [np.arange(len(part) * part.repeat) < len(part) for part in self.parts]
        return self.where(np.concatenate(first)[self._chosen]) if first else self

    def where(self, wanted: Bool[np.ndarray, " n"]) -> "Records":
        """Some of them."""
        return Records(self.parts, self._chosen[wanted])

    def scaled(self, scaled: bool) -> "Records":
        """The same, with what their buckets say of scaling."""
        return Records([part.changed(scaled=scaled) for part in self.parts], self._chosen)

    def judged(self) -> "Records":
        """Each content once, as it is: never mirrored, nor cropped by chance."""
        once = self.once()
        last = {once[place].digest: place for place in range(len(once))}
        chosen = once._chosen[[*last.values()]]
        return Records([part.plain() for part in self.parts], chosen)

    @property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """Width and height of each image."""
        return self._column(lambda part: part.sizes, np.zeros((0, 2), np.int64))

    @property
    def places(self) -> Float[np.ndarray, " n"]:
        """A number from 0 to 1 for each image, that its content alone decides."""
        return self._column(lambda part: part.places, np.zeros(0))

    def _column(self, of: Callable[[Columns], np.ndarray], nothing: np.ndarray) -> np.ndarray:
        whole = [column for part in self.parts for column in [of(part)] * part.repeat]
        return np.concatenate([nothing, *whole])[self._chosen]


def once(records: Sequence[Record]) -> Iterable[Record]:
    """Each image once."""
    if isinstance(records, Records):
        return records.once()
    return {record.path: record for record in records}.values()
