"""Where the arrays of a cache lie, in 80 bytes for each, as a cache may hold millions."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from jaxft import tensor_file
from jaxft.data.columns import Made
from jaxft.errors import UserError

NAME = np.dtype("S32")
"""The 32 bytes of a SHA-256. NumPy hands single ones out without the zeros at their end."""

_ROW = np.dtype([("digest", NAME), ("start", "i8"), ("shard", "i4"), ("kind", "i4")])

Names = Shaped[np.ndarray, " n"]
"""Of the dtype `NAME`."""


class Place(NamedTuple):
    """Where an array lies."""

    shard: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """In bytes from the beginning of the file."""
    digest: bytes
    """The SHA-256 that the shard says of it."""

    def read(self) -> np.ndarray:
        """The array; a missing file or one that is cut off is an OSError."""
        array = np.empty(self.shape, self.dtype)
        with open(self.shard, "rb", buffering=0) as file:
            file.seek(self.start)
            data: Any = array.reshape(-1).view(np.uint8)
            if file.readinto(data) != array.nbytes:
                raise OSError(f"{self.shard} is cut off")
        return array


class Places:
    """The places of arrays, by their names, which are SHA-256s."""

    def __init__(self):
        self._shards: list[Path] = []
        self._kinds: list[tuple[np.dtype, tuple[int, ...]]] = []
        self._sorted = np.zeros(0, NAME), np.zeros(0, _ROW)
        self._added: list[tuple[np.ndarray, np.ndarray]] = []
        self._lock = Lock()

    def add(self, shard: Path, header: tensor_file.Header) -> None:
        """Adds the arrays of a shard, but for those that are here already.

        Raises:
            UserError: their names, or what is said of them, are no SHA-256s.
        """
        entries, kinds = header.tensors.values(), {kind: at for at, kind in enumerate(self._kinds)}
        rows = np.zeros(len(entries), _ROW)
        names = _from_hex(shard, header.tensors)
        rows["digest"] = _from_hex(shard, [header.metadata.get(n, "") for n in header.tensors])
        rows["start"] = [header.size + entry.start for entry in entries]
        rows["kind"] = [kinds.setdefault(entry[:2], len(kinds)) for entry in entries]
        rows["shard"] = len(self._shards)
        self._kinds = list(kinds)
        self._shards.append(shard)
        with self._lock:
            self._added.append((names, rows))

    def remove(self, shard: Path) -> None:
        """Removes the arrays of a shard, if there are any."""
        if shard not in self._shards:
            return
        names, rows = self._all()
        others = rows["shard"] != self._shards.index(shard)
        with self._lock:
            self._sorted = names[others], rows[others]

    def holds(self, names: Names) -> Bool[np.ndarray, " n"]:
        """Which names are here."""
        return _find(self._all()[0], names) >= 0

    def __getitem__(self, name: bytes) -> Place:
        """The place of one array; a KeyError where there is none."""
        names, rows = self._all()
        (row,) = _find(names, np.frombuffer(name, NAME))
        if row < 0:
            raise KeyError(name.hex())
        return self._place(rows, row)

    def by_shard(self, wanted: Names) -> list[tuple[Path, Sequence[Place]]]:
        """The shards that hold arrays of the names `wanted`, and the places of those in each, in
        the order of the file."""
        names, rows = self._all()
        found = _find(names, wanted)
        found = rows[found[found >= 0]]
        found = found[np.lexsort((found["start"], found["shard"]))]
        bounds = np.flatnonzero(np.diff(found["shard"])) + 1
        return [
            (self._shards[part["shard"][0]], Made(partial(self._place, part), range(len(part))))
            for part in np.split(found, bounds)
            if len(part)
        ]

    def _all(self) -> tuple[Names, np.ndarray]:
        """All names in order, and their rows; of several of one name the first that was added."""
        with self._lock:
            if self._added:
                parts = [self._sorted, *self._added]
                names, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
                order = np.argsort(names, kind="stable")
                names, rows = names[order], rows[order]
                is_first = np.ones(len(names), bool)
                is_first[1:] = names[1:] != names[:-1]
                self._sorted, self._added = (names[is_first], rows[is_first]), []
            return self._sorted

    def _place(self, rows: np.ndarray, at: int) -> Place:
        digest, start, shard, kind = rows[at].tolist()
        dtype, shape = self._kinds[kind]
        return Place(self._shards[shard], dtype, shape, start, digest.ljust(32, b"\0"))


def _find(names: Names, wanted: Names) -> Int[np.ndarray, " n"]:
    """The place of each wanted name among the sorted ones, -1 where there is none."""
    at = np.searchsorted(names, wanted)
    there = at < len(names)
    there[there] = names[at[there]] == wanted[there]
    return np.where(there, at, -1)


def _from_hex(shard: Path, texts: Iterable[str]) -> Names:
    texts = list(texts)
    try:
        if any(len(text) != 64 for text in texts):
            raise ValueError
        return np.frombuffer(bytes.fromhex("".join(texts)), NAME)
    except ValueError:
        raise UserError(f"{shard}: what should be a SHA-256 in it is none") from None
