"""Many short texts in one block of bytes: as Python's strings each would take 50 bytes more."""

from array import array
from collections.abc import Iterable, Iterator

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
