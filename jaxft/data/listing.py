"""The image files of a folder, recognised by what they hold."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from jaxft.data import captions, images
from jaxft.data.captions import shown, some
from jaxft.errors import UserError


class Listing(NamedTuple):
    """What was found in a folder."""

    names: list[str]
    """Paths of the images below the folder, in order."""
    problems: list[str]
    """What cannot be read."""
    notices: list[str]
    """What a user should know and need not mend."""


def find(
    folder: Path,
    *,
    recursive: bool = False,
    without: Sequence[Path] = (),
    key: str = "img_root",
) -> Listing:
    """The images of a folder, and with `recursive` of the folders below it.

    A file is an image if its name says so, or its content. Links are followed, but none to a
    folder that was searched already, so that loops end. What is hidden is left alone.

    Args:
        folder: to search.
        recursive: whether folders in it are searched as well.
        without: folders that are left alone.
        key: what names the folder, for messages.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: the folder {folder} does not exist")
    found = _search(folder, {path.resolve() for path in without}, recursive)
    if not found.names and not found.problems:
        nested = f" ({_NOT_SEARCHED})" if found.folders and not recursive else ""
        raise UserError(
            f"{key}: {folder} holds no images{nested}; their names end in "
            + ", ".join(sorted(images.SUFFIXES))
        )
    return Listing(sorted(found.names), found.problems, _notices(folder, found, recursive))


_NOT_SEARCHED = "subfolders are not searched without recursive: true"


class _Found(NamedTuple):
    names: list[str]
    """Of images."""
    others: list[Path]
    """Other files."""
    folders: list[Path]
    twice: list[str]
    """Links to folders that were found before."""
    problems: list[str]


def _search(root: Path, without: Set[Path], recursive: bool) -> _Found:
    """What lies in a folder and, if asked, below it."""
    found, waiting, seen = _Found([], [], [], [], []), [root], {root.resolve()}
    while waiting:
        folder = waiting.pop()
        for path in _entries(folder, root, found.problems):
            name = path.relative_to(root).as_posix()
            named = path.suffix.casefold() in images.SUFFIXES
            if path.is_dir() and (recursive or not named):
                real = path.resolve()
                if real in seen:
                    found.twice.append(name)
                elif real not in without:
                    found.folders.append(path)
                    seen.add(real)
                    waiting += [path] if recursive else []
            elif named or _is_image(path):
                found.names.append(name)
            else:
                found.others.append(path)
    return found


def _entries(folder: Path, root: Path, problems: list[str]) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        problems.append(f"{shown(folder.relative_to(root).as_posix())}: {error.strerror}")
        return
    yield from (folder / name for name in names if not name.startswith("."))


def _is_image(path: Path) -> bool:
    """Whether a file without an image's name is an image."""
    try:
        if path.suffix.casefold() in captions.FILES or not path.is_file():
            return False
        with path.open("rb") as file:
            return images.is_image(file.read(images.HEAD))
    except OSError:
        return False


def _notices(folder: Path, found: _Found, recursive: bool) -> list[str]:
    notices = []
    others = Counter(
        path.suffix.casefold() or "without suffix"
        for path in found.others
        if path.suffix.casefold() not in captions.FILES
    )
    if others:
        ignored = (f"{count} {shown(suffix)}" for suffix, count in sorted(others.items()))
        notices.append(f"ignored files: {', '.join(ignored)}")
    if found.twice and recursive:
        notices.append(f"links to folders that are searched already: {some(found.twice)}")
    outside = [name for name in found.names if not _is_below(folder / name, folder)]
    if outside:
        notices.append(f"links that lead out of the folder, and are used: {some(outside)}")
    nested = [path.name for path in found.folders if _holds_images(path)]
    if nested and not recursive:
        notices.append(f"{_NOT_SEARCHED}: {some(nested)}")
    return notices


def _is_below(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop: no file, as reading it will say
        return True


def _holds_images(folder: Path) -> bool:
    """Whether a folder seems to hold images."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(Path(name).suffix.casefold() in images.SUFFIXES for name in names)
