"""Whole files, or members of a tar, as bytes; and how to tell that a file has changed."""

import os
from pathlib import Path
from typing import NamedTuple

from jaxft.errors import UserError

Stamp = tuple[int, int, int]
"""Size in bytes, and times in nanoseconds of the last changes of content and of inode."""


class Span(NamedTuple):
    """A part of a file: a member of a tar."""

    file: Path
    start: int
    """In bytes."""
    size: int


def stamp(path: str | Path) -> Stamp | None:
    """The stamp of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read(path: Path, max_bytes: int, span: Span | None = None) -> bytes:
    """A file, or a span of one.

    Raises:
        UserError: the reason why it cannot be read, without its name.
    """
    path, start, size = span or (path, 0, -1)
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise UserError("no such file" if not path.exists() else "not a file")
        if (path.stat().st_size if size < 0 else size) > max_bytes:
            raise UserError(f"more than {max_bytes >> 20} MiB: scale it down")
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    if span and len(data) != size:
        raise UserError("the tar is cut off")
    return data
