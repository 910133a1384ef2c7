"""The image files of a folder, recognised by what they hold, or those of the tars in it."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from jaxft.data import captions, files, images, shards
from jaxft.data.captions import shown, some
from jaxft.data.files import Span
from jaxft.data.index import Index
from jaxft.errors import UserError


class Listing(NamedTuple):
    """What was found in a folder."""

    root: Path
    """The folder."""
    names: list[str]
    """Paths of the images below the folder, in order."""
    problems: list[str]
    """What cannot be read."""
    notices: list[str]
    """What a user should know and need not mend."""
    spans: Sequence[Span] | None = None
    """Where each image lies, if they are members of tars; their paths are then below these."""
    texts: Mapping[str, Span] | None = None
    """The files of captions in these tars."""


def find(
    folder: Path,
    *,
    recursive: bool = False,
    without: Sequence[Path] = (),
    key: str = "img_root",
    kept: Path | None = None,
) -> Listing:
    """The images of a folder, and with `recursive` of the folders below it; of a tar; or of all
    tars in a folder without images, see `shards`.

    A file is an image if its name says so, or its content. Links are followed, but none to a
    folder that was searched already, so that loops end. What is hidden is left alone.

    Args:
        folder: to search, or a tar.
        recursive: whether folders in it are searched as well.
        without: folders that are left alone.
        key: what names the folder, for messages.
        kept: where indices are kept, see `index`.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if folder.is_file() and folder.name.endswith(shards.SUFFIXES):
        return _in_tars(folder.parent, [folder.name], kept)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{key}: {folder} {what}")
    found = _search(folder, {path.resolve() for path in without}, recursive)
    if found.tars and not found.names and not found.problems:
        return _in_tars(folder, sorted(found.tars), kept)
    if not found.names and not found.problems:
        nested = f" ({_NOT_SEARCHED})" if found.folders and not recursive else ""
        raise UserError(
            f"{key}: {folder} holds no images{nested}; their names end in "
            + ", ".join(sorted(images.SUFFIXES))
        )
    return Listing(folder, sorted(found.names), found.problems, _notices(folder, found, recursive))


_NOT_SEARCHED = "subfolders are not searched without recursive: true"


class _Found(NamedTuple):
    names: list[str]
    """Of images."""
    outside: list[str]
    """Those of them that lie elsewhere."""
    tars: list[str]
    others: Counter[str]
    """Suffixes of other files."""
    folders: list[Path]
    twice: list[str]
    """Links to folders that were found before."""
    problems: list[str]


def _search(root: Path, without: Set[Path], recursive: bool) -> _Found:
    """What lies in a folder and, if asked, below it."""
    found = _Found([], [], [], Counter(), [], [], [])
    waiting, seen, top = [("", False)], {root.resolve()}, root.resolve()
    while waiting:
        folder, linked = waiting.pop()
        for entry in _entries(root / folder, root, found.problems):
            name = folder + entry.name
            suffix = os.path.splitext(entry.name)[1].casefold()
            named = suffix in images.SUFFIXES
            if _is_folder(entry) and (recursive or not named):
                real = Path(entry.path).resolve()
                if real in seen:
                    found.twice.append(name)
                elif real not in without:
                    found.folders.append(Path(entry.path))
                    seen.add(real)
                    waiting += [(f"{name}/", linked or entry.is_symlink())] if recursive else []
            elif named or _is_image(entry, suffix):
                found.names.append(name)
                if (linked or entry.is_symlink()) and not _is_below(Path(entry.path), top):
                    found.outside.append(name)
            elif entry.name.casefold().endswith(shards.SUFFIXES) and entry.is_file():
                found.tars.append(name)
            elif suffix not in captions.FILES:
                found.others[suffix or "without suffix"] += 1
    return found


def _entries(folder: Path, root: Path, problems: list[str]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{shown(folder.relative_to(root).as_posix())}: {error.strerror}")
        return
    yield from (entry for entry in listed if not entry.name.startswith("."))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: no file, as reading it will say
        return False


def _is_image(entry: os.DirEntry[str], suffix: str) -> bool:
    """Whether a file without an image's name is an image."""
    try:
        if suffix in captions.FILES or not entry.is_file():
            return False
        with open(entry.path, "rb") as file:
            return images.is_image(file.read(images.HEAD))
    except OSError:
        return False


def _in_tars(root: Path, names: list[str], kept: Path | None) -> Listing:
    """The images in the tars of a folder; their index is kept."""
    problems: list[str] = []
    others: Counter[str] = Counter()
    members: list[tuple[str, Span]] = []
    looked = Index(kept, root, f"tars {shards.RECIPE}", least=shards.LEAST).look(
        names,
        lambda place: files.stamp(root / names[place]),
        lambda place: shards.contents(root / names[place]),
        title=f"listing {root}",
    )
    for name, fact in zip(names, looked, strict=True):
        if isinstance(fact, UserError):
            problems.append(f"{shown(name)} {fact}")
            continue
        found, wrong, ignored = fact
        problems += [f"{shown(name)}: {problem}" for problem in wrong]
        others.update(ignored)
        file = root / name
        members += [(f"{name}/{member}", Span(file, *place)) for member, *place in found]
    members.sort(key=lambda pair: pair[0])
    pictures = [pair for pair in members if shards.is_image(pair[0])]
    if not pictures and not problems:
        raise UserError(f"img_root: {root}: no image in {some(names)}")
    texts = {name: span for name, span in members if not shards.is_image(name)}
    return Listing(
        root,
        [name for name, _ in pictures],
        problems,
        [f"{len(pictures)} images in {len(names)} tars", *_ignored(others)],
        [span for _, span in pictures],
        texts,
    )


def _notices(folder: Path, found: _Found, recursive: bool) -> list[str]:
    tars = Counter({shards.SUFFIXES[0]: len(found.tars)} if found.tars else {})
    notices = _ignored(found.others + tars)
    if found.twice and recursive:
        notices.append(f"links to folders that are searched already: {some(found.twice)}")
    if found.outside:
        told = some(sorted(found.outside))
        notices.append(f"links that lead out of the folder, and are used: {told}")
    nested = [path.name for path in found.folders if _holds_images(path)]
    if nested and not recursive:
        notices.append(f"{_NOT_SEARCHED}: {some(nested)}")
    return notices


def _ignored(others: Counter[str]) -> list[str]:
    told = (f"{count} {shown(suffix)}" for suffix, count in sorted(others.items()))
    return [f"ignored files: {', '.join(told)}"] if others else []


def _is_below(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # a loop: no file, as reading it will say
        return True


def _holds_images(folder: Path) -> bool:
    """Whether a folder seems to hold images."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(Path(name).suffix.casefold() in images.SUFFIXES for name in names)
