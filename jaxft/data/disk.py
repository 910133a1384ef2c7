"""A cache on disk: arrays found by what they depend on, shared by any number of runs at once.

    CACHE/latents/0b5e….safetensors    a shard: arrays, and in its metadata the SHA-256 of each

An array's name in its shard is the SHA-256 of all that it depends on, so a thing that changes has
another name, and nothing is ever out of date. A shard appears whole, under a random name, and is
never written to again: builders need no lock, and a kill leaves no half of one. The index is the
headers of all shards; arrays are read when they are asked for, and none is kept.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import tensor_file
from jaxft.data.places import NAME, Place, Places
from jaxft.errors import UserError
from jaxft.hosts import progress

SHARD_BYTES, SHARD_ARRAYS, SHARD_SECONDS = 64 * 2**20, 10_000, 30
"""A shard is written when it has as much of one of these: what a kill can lose."""

OLD = 24 * 3600
"""Seconds after which a temporary file is one that a killed builder left behind."""

MARK = "jaxft.cache"
"""Metadata key that tells a shard from other safetensors files."""

_log = logging.getLogger(__name__)


class Memory(dict[Hashable, np.ndarray]):
    """The same as `Disk`, in memory."""

    def missing(self, keys: Iterable[Any]) -> list[int]:
        """The places of those of the keys that are not here, each once."""
        first: dict[Any, int] = {}
        for place, key in enumerate(keys):
            if key not in self:
                first.setdefault(key, place)
        return list(first.values())

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Disk:
    """Arrays by key in one folder; what is added is there for good after the `with` block.

    A key is made of what JSON can say. Any number of threads may read.
    """

    def __init__(
        self,
        folder: Path,
        depends: Mapping[str, Any],
        *,
        workers: int = 4,
        say: Callable[[str], None] = lambda text: None,
    ):
        """Reads the headers of all shards; the folder need not exist.

        Args:
            folder: its name says what it holds: `latents`.
            depends: what every array here depends on, besides its key: weights, a version.
            workers: threads that check.
            say: gets what a user should know.

        Raises:
            UserError: the folder cannot be read.
        """
        self._folder, self._workers, self._say = folder, workers, say
        self._common = hashlib.sha256(json.dumps(depends, sort_keys=True).encode())
        self._places = Places()
        self._new: dict[str, np.ndarray] = {}
        self._new_bytes = 0
        self._since = time.monotonic()
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        # The oldest copy of an array counts, also after another run has added a second one.
        for path in _by_age(folder):
            try:
                self._add(path)
            except UserError:
                if path.exists():  # else another run has put it aside
                    self._put_aside(path)

    def __getitem__(self, key: Hashable) -> np.ndarray:
        place = self._places[self._name(key)]
        try:
            try:
                return place.read()
            except FileNotFoundError:  # for other arrays in it; this one was checked
                return place._replace(shard=_aside(place.shard)).read()
        except OSError as error:
            raise UserError(
                f"{place.shard}: a part of the cache is gone ({error}); start again, and it is "
                "made anew"
            ) from None

    def missing(self, keys: Iterable[Any]) -> list[int]:
        """The places of those of the keys that are not here intact, each once; says how many are.

        Every array is read and compared with its SHA-256. A shard that is damaged in one of them
        is renamed, and none of its arrays is here any more.
        """
        names = np.frombuffer(b"".join(map(self._name, keys)), NAME)
        first = np.sort(np.unique(names, return_index=True)[1])
        wanted = names[first]
        by_shard = self._places.by_shard(wanted)
        total = sum(len(places) for _, places in by_shard)
        with (
            ThreadPoolExecutor(self._workers) as pool,
            progress(desc=f"checking {self._folder}", total=total, unit="array") as bar,
        ):
            intact = pool.map(_intact, [places for _, places in by_shard])
            for (shard, places), good in zip(by_shard, intact, strict=True):
                if not good:
                    self._put_aside(shard)
                bar.update(len(places))
        lacking = first[~self._places.holds(wanted)].tolist()
        found, what = len(first) - len(lacking), self._folder.name
        self._say(f"cache     {found:,} of {len(first):,} {what} found in {self._folder.parent}")
        return lacking

    def __setitem__(self, key: Hashable, array: np.ndarray) -> None:
        self._new[self._name(key).hex()] = array
        self._new_bytes += array.nbytes
        if (
            self._new_bytes >= SHARD_BYTES
            or len(self._new) >= SHARD_ARRAYS
            or time.monotonic() - self._since > SHARD_SECONDS
        ):
            self._start_to_write()

    def __enter__(self) -> "Disk":
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._since = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        """Writes the rest, also of what an error or Ctrl-C has cut short."""
        assert self._writer is not None
        with self._writer:
            self._start_to_write()
            self._wait()

    def _name(self, key: Hashable) -> bytes:
        name = self._common.copy()
        name.update(json.dumps(key).encode())
        return name.digest()

    def _start_to_write(self) -> None:
        """Hands the new arrays to the thread that writes, when it has written those before."""
        self._wait()
        assert self._writer is not None, "arrays are added within `with`"
        if self._new:
            self._writing = self._writer.submit(self._write, self._new)
        self._new, self._new_bytes, self._since = {}, 0, time.monotonic()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, arrays: Mapping[str, np.ndarray]) -> None:
        path = self._folder / f"{secrets.token_hex(8)}.safetensors"
        digests = {name: _digest(array).hex() for name, array in arrays.items()}
        try:
            tensor_file.write(path, arrays, digests | {MARK: "1"})
            _sweep(self._folder)
        except OSError as error:
            raise UserError(
                f"cache_dir: {self._folder} cannot be written to ({error.strerror or error}); "
                "make room there, choose another folder, or null: in memory"
            ) from None
        self._add(path)

    def _add(self, path: Path) -> None:
        """Adds the arrays of a shard, if it is one of ours."""
        header = tensor_file.read_header(path)
        if MARK in header.metadata:
            self._places.add(path, header)

    def _put_aside(self, shard: Path) -> None:
        with contextlib.suppress(OSError):  # another run was quicker, or may not write here
            shard.rename(_aside(shard))
        _log.warning(
            "%s is damaged: put aside as %s, and what is needed of it is made anew",
            *(shard, _aside(shard).name),
        )
        self._places.remove(shard)


def _by_age(folder: Path) -> list[Path]:
    """The shards of a folder, the oldest first."""
    if not folder.exists():
        return []
    try:
        ages = []
        for path in folder.iterdir():
            if path.suffix == ".safetensors" and not path.name.startswith("."):
                ages.append((path.stat().st_mtime_ns, path))
    except FileNotFoundError:  # put aside by another run, since the folder was listed
        return _by_age(folder)
    except OSError as error:
        raise UserError(f"cache_dir: {folder} cannot be read ({error.strerror})") from None
    return [path for _, path in sorted(ages)]


def _intact(places: Sequence[Place]) -> bool:
    """Whether these arrays of one shard are what was written."""
    try:
        return all(_digest(place.read()) == place.digest for place in places)
    except OSError:
        return False


def _digest(array: np.ndarray) -> bytes:
    """SHA-256 of an array's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape} ".encode())
    data: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest.update(data)
    return digest.digest()


def _aside(shard: Path) -> Path:
    """The name of a shard that is damaged."""
    return shard.with_suffix(".damaged")


def _sweep(folder: Path) -> None:
    """Removes what builders that were killed have left behind."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another run was quicker
            if time.time() - path.stat().st_mtime > OLD:
                path.unlink()
