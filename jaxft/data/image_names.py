"""Names of images as tables write them, and how they are compared."""

import os
import re
import unicodedata
from pathlib import Path, PurePosixPath

from jaxft.data.images import SUFFIXES
from jaxft.errors import UserError

_IS_PLAIN = re.compile(r"[^\\/:\0.~][^\\/:\0]*(?:/[^\\/:\0.~][^\\/:\0]*)*").fullmatch
"""Of ASCII names: paths that can only be read in one way. A million of them take a second, others a
minute."""


def inside(name: str, root: Path | None) -> str:
    """A name as a path below the folder of the images.

    Raises:
        UserError: it leads elsewhere.
    """
    if name.isascii() and _IS_PLAIN(name):
        return name
    if "\0" in name:
        raise UserError("holds a NUL character")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() and root is not None:
        parents = (root.absolute(), root.resolve())
        path = next((path.relative_to(p) for p in parents if path.is_relative_to(p)), path)
    drive = re.match(r"[A-Za-z]:/", str(path)) is not None
    if path.is_absolute() or drive or path.parts[:1] == ("~",) or ".." in path.parts:
        raise UserError("leads out of the folder of the images: write it relative to that folder")
    return str(path)


def folded(name: str) -> str:
    """A name as it is compared: composed Unicode, an image's suffix in lower case."""
    if name.isascii() and _IS_PLAIN(name):
        suffix = os.path.splitext(name)[1]
    else:
        name = str(PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")))
        suffix = PurePosixPath(name).suffix
    if suffix.casefold() in SUFFIXES:
        return name.removesuffix(suffix) + suffix.casefold()
    return name


def stem(name: str) -> str:
    """A name as it is compared where it has no suffix."""
    if name.isascii() and _IS_PLAIN(name):
        head, dot, end = name.rpartition(".")
        return head if dot and end and "/" not in end else name
    path = PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/"))
    return str(path.with_suffix(""))
