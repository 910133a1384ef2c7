"""What is known of files that were read before, kept on disk: an unchanged file is not opened.

    INDEX/0b5e….safetensors    of one folder and one kind: names, stamps, and what was found

A file is unchanged if its size, the time of its last change and that of its inode's are. What was
found in it, a fact, is what JSON can say. Of a file with a row for each image, the rows are kept. A
damaged index is no index.
"""

import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import tensor_file
from jaxft.data import files
from jaxft.data.columns import Texts
from jaxft.data.files import Stamp
from jaxft.errors import UserError
from jaxft.hosts import progress

LEAST = 256
"""Files from which on they are worth an index."""

SETTLED = 2 * 10**9
"""Nanoseconds after which another change of a file has another time for sure."""

_BLOCK = 1024
"""Files that are looked at together."""

_HASH = "modelspec.hash_sha256"
"""Metadata key under which the writer puts the SHA-256 of the content."""

_STAMP = "stamp"
"""Metadata key of the stamp of the file that rows were read from."""

_log = logging.getLogger(__name__)


class _Table:
    """Names, stamps and facts of files, in an order."""

    def __init__(self, names: Texts | None = None, stamps: Any = None, facts: Texts | None = None):
        self.names, self.facts = names or Texts(), facts or Texts()
        self.stamps: Any = array("q") if stamps is None else stamps
        self.next = 0
        """The row behind the last that was found."""
        self._rows: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, at: Stamp, fact: str) -> None:
        self.names.append(name)
        self.stamps.extend(at)
        self.facts.append(fact)

    def row(self, row: int) -> tuple[str, Stamp, str]:
        return self.names[row], tuple(self.stamps[3 * row : 3 * row + 3]), self.facts[row]

    def find(self, name: str, at: Stamp | None) -> int | None:
        """The row of a file that is as it was; quick where files come in the table's order."""
        row: int | None = self.next
        if row >= len(self) or self.names[row] != name:
            if self._rows is None:
                self._rows = {known: place for place, known in enumerate(self.names)}
            row = self._rows.get(name)
        if row is None:
            return None
        self.next = row + 1
        return row if tuple(self.stamps[3 * row : 3 * row + 3]) == at else None


class Index:
    """What is known of the files below one folder."""

    def __init__(self, folder: Path | None, root: Path, kind: str, *, least: int | None = None):
        """An index in `folder` (None: none is kept) of the files below `root`; `kind` says what is
        looked for in them, and which version of what looks. Of fewer files than `least` (`LEAST`)
        none is kept."""
        self._path = _path(folder, root, kind)
        self._least = LEAST if least is None else least
        self.num_known = 0
        """Files that need not be opened."""

    def look(
        self,
        names: Sequence[str],
        stamp: Callable[[int], Stamp | None],
        read: Callable[[int], Any],
        *,
        title: str,
    ) -> Generator[Any, None, None]:
        """The fact of each file in order, or the `UserError` that says why there is none.

        Args:
            names: of files below the folder.
            stamp: of a file, by its place among the names.
            read: a fact, by its file's place; may raise UserError. It is called in threads.
            title: of the progress bar.
        """
        path = self._path if len(names) >= self._least else None
        old, new, rows = _load(path), _Table(), array("q")
        pool, done = ThreadPoolExecutor(os.cpu_count()), False
        try:
            with progress(desc=title, total=len(names), unit="file") as bar:
                for start in range(0, len(names), _BLOCK):
                    block, now = names[start : start + _BLOCK], time.time_ns()
                    stamps = [stamp(start + i) for i in range(len(block))]
                    known = [old.find(*pair) for pair in zip(block, stamps, strict=True)]
                    unknown = [start + i for i, row in enumerate(known) if row is None]
                    found = pool.map(lambda place: _fact(read, place), unknown)
                    for name, at, row in zip(block, stamps, known, strict=True):
                        if row is not None:
                            rows.append(row)
                            yield json.loads(old.facts[row])
                            continue
                        fact = next(found)
                        if at and max(at[1:]) < now - SETTLED and not isinstance(fact, UserError):
                            new.add(name, at, json.dumps(fact))
                        yield fact
                    self.num_known += len(block) - len(unknown)
                    bar.update(len(block))
            done = True
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
            if not done:  # what lies behind may still be there
                rows.extend(range(rows[-1] + 1 if rows else 0, len(old)))
            if path and (new or len(rows) < len(old)):
                _save(path, old, rows, new)


def _fact(read: Callable[[int], Any], place: int) -> Any:
    try:
        return read(place)
    except UserError as error:
        return error


def rows(
    folder: Path | None, file: Path, kind: str, read: Callable[[], dict[str, Texts]]
) -> dict[str, Texts]:
    """What `read` gives, columns by name, or gave when the file was as it is now.

    The folder and the kind are as of `Index`; of fewer rows than `LEAST` none is kept.
    """
    path, at, now = _path(folder, file, kind), files.stamp(file), time.time_ns()
    metadata, tensors = _read(path)
    if at and metadata.get(_STAMP) == str(at):
        names = [name for name in tensors if f"{name}.ends" in tensors]
        return {name: Texts.of(tensors[name], tensors[f"{name}.ends"]) for name in names}
    columns = read()
    settled = at and at == files.stamp(file) and max(at[1:]) < now - SETTLED
    if path and settled and max(map(len, columns.values())) >= LEAST:
        _write(path, columns, {}, {_STAMP: str(at)})
    return columns


def _path(folder: Path | None, of: Path, kind: str) -> Path | None:
    key = hashlib.sha256(os.fsencode(f"{kind}\n{of.resolve()}")).hexdigest()
    return folder.expanduser() / f"{key[:40]}.safetensors" if folder else None


def _read(path: Path | None) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of an index; nothing where there is none, or it is damaged."""
    if path is None or not path.exists():
        return {}, {}
    try:
        header, tensors = tensor_file.read_header(path), tensor_file.read(path)
        if header.metadata[_HASH] != "0x" + tensor_file.digest(path, header.size):
            raise UserError("its content is not what was written")
        return header.metadata, tensors
    except (UserError, KeyError, OSError) as error:
        _log.warning("%s is damaged (%s): files are read anew", path, error)
        return {}, {}


def _load(path: Path | None) -> _Table:
    _, tensors = _read(path)
    if not tensors:
        return _Table()
    names, facts = (Texts.of(tensors[n], tensors[f"{n}.ends"]) for n in ("names", "facts"))
    return _Table(names, tensors["stamps"].data, facts)


def _save(path: Path, old: _Table, rows: Sequence[int], new: _Table) -> None:
    """Writes an index of rows of the old one and all of the new one, by name."""
    pairs = [(old.names[row], row) for row in rows] + [(n, -1 - i) for i, n in enumerate(new.names)]
    whole = _Table()
    for _, row in sorted(pairs):
        whole.add(*(old.row(row) if row >= 0 else new.row(-1 - row)))
    columns = {"names": whole.names, "facts": whole.facts}
    _write(path, columns, {"stamps": np.asarray(whole.stamps)}, {})


def _write(
    path: Path, columns: dict[str, Texts], arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    tensors = dict(arrays)
    for name, texts in columns.items():
        tensors[name], tensors[f"{name}.ends"] = texts.arrays()
    try:
        tensor_file.write(path, tensors, metadata | {_HASH: ""})
    except OSError as error:
        _log.warning("%s cannot be written (%s): files are read anew next time", path, error)
