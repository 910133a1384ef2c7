"""Long lists that take little memory: of short texts, which as Python's strings would each take 50
bytes more, and of what is made when it is asked for."""

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int, UInt8


class Texts:
    """A list of texts, each made when it is asked for. Half surrogate pairs, as in names
    of files that are no UTF-8, are kept."""

    def __init__(self, texts: Iterable[str] = ()):
        self._data: bytearray | memoryview = bytearray()
        self._ends: array[int] | memoryview = array("q")
        for text in texts:
            self.append(text)

    @classmethod
    def of(cls, data: UInt8[np.ndarray, " bytes"], ends: Int[np.ndarray, " n"]) -> "Texts":
        """Texts as `arrays` gives them; they cannot be added to."""
        texts = cls()
        texts._data, texts._ends = data.data, ends.data
        return texts

    def arrays(self) -> tuple[UInt8[np.ndarray, " bytes"], Int[np.ndarray, " n"]]:
        """All bytes, and where each text ends."""
        return np.asarray(self._data), np.asarray(self._ends)

    def append(self, text: str) -> None:
        """Adds one text at the end."""
        assert isinstance(self._data, bytearray)
        assert isinstance(self._ends, array)
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> str:
        start = self._ends[place - 1] if place else 0
        return str(self._data[start : self._ends[place]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


T = TypeVar("T")


class Made(Sequence[T], Generic[T]):
    """Items that are made when they are asked for, from their places."""

    def __init__(self, make: Callable[[int], T], places: range):
        self._make, self._places = make, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        """An item, or for a slice some of them."""
        places = self._places[place]
        return Made(self._make, places) if isinstance(places, range) else self._make(places)


def joined(parts: Sequence[Sequence[T]]) -> Made[T]:
    """The items of one sequence after those of another."""
    ends = [0, *itertools.accumulate(map(len, parts))]

    def make(place: int) -> T:
        at = bisect_right(ends, place) - 1
        return parts[at][place - ends[at]]

    return Made(make, range(ends[-1]))
