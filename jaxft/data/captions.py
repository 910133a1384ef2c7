"""Captions of a folder of images: files beside them, or one table for all."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from jaxft.data import files, shards, text_files
from jaxft.data.caption_tables import READERS, Lines, Row, from_member, lines_of
from jaxft.data.files import Span
from jaxft.data.images import SUFFIXES
from jaxft.data.index import Index
from jaxft.errors import UserError

TEXT_SUFFIXES = (".txt", ".caption")
FILES = frozenset(TEXT_SUFFIXES).union(*(suffixes for suffixes, _ in READERS.values()))
"""Suffixes of all files that hold captions, casefolded."""

RECIPE = 1
"""To be raised when a text file is read in another way: what was read before is kept."""

_SUFFIXES = tuple(FILES)

METADATA = ("metadata.jsonl", "metadata.csv")
"""Tables of a Hugging Face imagefolder, of the images in their folder and below."""

MAX_CHARACTERS = 20_000
"""Of one caption: more is another kind of file, and costs seconds in every batch."""

_MAX_TABLE = 2**30
"""Larger tables are refused before they are read, in bytes."""

Several = Literal["first", "random", "join"]
Missing = Literal["error", "empty"]


class Captions(NamedTuple):
    """What was read for a list of images."""

    texts: list[Lines]
    """For each image its captions, of which one is drawn; '' where there is none."""
    problems: list[str]
    """What makes the captions unusable: each names a file, a key or an image."""
    notices: list[str]
    """What a user should know and need not mend."""


class Place(NamedTuple):
    """Where captions are, and in which form: a key of `caption_tables.READERS`, or `text`."""

    path: Path
    form: str | None = None
    """None: as the names of the files say."""


def load(
    caption_file: str | Path | Place | None,
    names: Sequence[str],
    *,
    root: Path | None = None,
    several: Several | None = None,
    missing: Missing = "error",
    members: Mapping[str, Span] | None = None,
    kept: Path | None = None,
) -> Captions:
    """The captions of the image files `names`, paths below the folder `root`.

    `caption_file` is None (no captions), a folder with a `.txt` or `.caption` for each image or one
    table for all of them, or that table: `.json`, `.yaml`, `.jsonl` or `.csv`, with names with or
    without suffix (see `caption_tables`). In the folders below there may be `METADATA` too, with
    names from there. A name that leads out of its folder is a problem.

    `several` says what becomes of an image with several lines: the `first` is its caption, a
    `random` one each time, or all of them, `join`ed by spaces. Without it they are a problem. So is
    an image without caption, unless `missing` is `empty`.

    Where the images are members of tars, `members` are the captions beside them, and the folder is
    that of the tars. `kept` is where indices are kept, see `index`.

    Raises:
        UserError: `caption_file` is none of these.
    """
    if caption_file is None:
        return Captions([("",)] * len(names), [], [])
    place = caption_file if isinstance(caption_file, Place) else Place(Path(caption_file))
    problems: list[str] = []
    if members is not None:
        found, spare = _from_texts(place.path, names, problems, kept, members)
        return _settled(found, names, several, missing, problems, spare)
    path, tables, texts = _found(place, names)
    if not tables:
        found, spare = _from_texts(path, names, problems, kept, dict.fromkeys(texts))
    else:
        rows = _rows(place, path, tables, problems)
        found, spare = _from_rows(rows, names, root, problems)
    return _settled(found, names, several, missing, problems, spare)


def column(
    caption_file: Place, names: Sequence[str], title: str, *, root: Path
) -> tuple[list[str | None], list[str]]:
    """The files that the column `title` of the tables of captions names beside the image files
    `names`, all paths below `root`; and problems, those of the tables that `load` tells too.

    Raises:
        UserError: there is no table, or it has no such column.
    """
    path, tables, _ = _found(caption_file, names)
    if not tables:
        raise UserError(f"cond_column: the captions of {path} are in no table with columns")
    problems: list[str] = []
    rows = [row for row in _rows(caption_file, path, tables, problems, title) if row.other]
    if not rows:
        raise UserError(f"cond_column: no row of {some(tables)} has a {title!r} that is text")
    files = []
    for row in rows:
        at, slash, _ = row.table.rpartition("/")
        try:
            file = at + slash + _inside(str(row.other), root / at)
            files.append(row._replace(lines=(file,)))
        except UserError as error:
            problems.append(f"{row.table}: {title} {row.other!r} {error}")
    found, _ = _from_rows(files, names, root, problems)
    return [lines[0] if lines else None for lines in found], problems


def _rows(
    place: Place, path: Path, tables: Sequence[str], problems: list[str], title: str | None = None
) -> list[Row]:
    """The rows of all tables in a folder, with one column besides the captions."""
    rows = []
    for table in tables:
        read = READERS[place.form or str(_form(table))][1]
        text = text_files.decode(path / table, _MAX_TABLE)
        rows += [row._replace(table=table) for row in read(text, path / table, problems, title)]
    return rows


def _found(place: Place, names: Sequence[str]) -> tuple[Path, list[str], list[str]]:
    """A folder, and the tables in it; without any, the text files in it, paths below it."""
    path, form = place
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"caption_file: {path} does not exist")
        if form == "text" or (form or _form(path.name)) in (None, "text"):
            raise UserError(
                f"caption_file: {path} is neither a folder nor a .json, .yaml, .jsonl or .csv file"
            )
        return path.parent, [path.name], []
    wanted = (form,) if form else READERS
    tables = [name for name in _caption_files(path) if _form(name) in wanted]
    below = [name for name in _metadata(path, names) if _form(name) in wanted]
    texts = _text_files(path, names)
    if form == "text" or (form is None and not tables + below):
        return path, [], texts
    if len(tables) > 1 or not tables + below or (texts and form is None):
        raise UserError(
            f"caption_file: the folder {path} holds {len(texts)} .txt or .caption files and "
            f"{some(tables + below) or 'no table'}; name the one file to read, or keep text files "
            "in a folder without .json, .yaml, .jsonl and .csv"
        )
    return path, tables + below, []


def _metadata(folder: Path, names: Sequence[str]) -> list[str]:
    """The tables of a Hugging Face imagefolder in the folders of the images and those between."""
    parents = {parent for name in {n.rpartition("/")[0] for n in names} for parent in _up(name)}
    places = (f"{at}/{name}" for at in sorted(parents) for name in METADATA)
    return [file for file in places if (folder / file).is_file()]


def _up(folder: str) -> list[str]:
    """A folder and those that it lies in; '', in which all are, is not one of them."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _form(name: str) -> str | None:
    suffix = os.path.splitext(name)[1].casefold()
    if suffix in TEXT_SUFFIXES:
        return "text"
    return next((form for form, (suffixes, _) in READERS.items() if suffix in suffixes), None)


def _caption_files(folder: Path) -> list[str]:
    """Names of the files in a folder that may hold captions, in order."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.casefold().endswith(_SUFFIXES)
            and not entry.name.startswith(".")
            and _is_file(entry)
        )


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False


def _text_files(folder: Path, names: Sequence[str]) -> list[str]:
    """The text files in the folders that the images are in, as paths below the folder."""
    inner = sorted({name.rpartition("/")[0] for name in names})
    return [
        f"{at}/{name}" if at else name
        for at in inner
        if (folder / at).is_dir()
        for name in _caption_files(folder / at)
        if _form(name) == "text"
    ]


def _from_texts(
    folder: Path,
    names: Sequence[str],
    problems: list[str],
    kept: Path | None,
    texts: Mapping[str, Span | None],
) -> tuple[list[Lines | None], list[str]]:
    """One of the text files for each image, of the same name up to the suffix, those of tars up to
    the first dot; and the spare ones."""
    members = any(texts.values())
    key = shards.key if members else _stem
    rows = dict.fromkeys(map(key, names), -1)  # -1: no file yet
    picked, spare = [], []
    for file in sorted(texts, key=_preference) if members else texts:
        stem = key(file)
        row = rows.get(stem)
        if row is None:
            spare.append(file)
        elif row < 0:
            rows[stem] = len(picked)
            picked.append(file)
        elif not members:
            problems.append(f"{picked[row]} and {file} are captions of one image; keep one")
    looked = Index(kept, folder, f"captions {RECIPE}").look(
        picked,
        lambda place: _stamp(folder, picked[place], texts[picked[place]]),
        lambda place: _text(folder, picked[place], texts[picked[place]]),
        title=f"reading captions of {folder}",
    )
    found: list[Lines] = []
    for fact in looked:
        if isinstance(fact, UserError):
            problems.append(str(fact))
        found.append(("",) if isinstance(fact, UserError) else tuple(fact))
    return [found[row] if (row := rows[key(name)]) >= 0 else None for name in names], spare


def _stamp(folder: Path, file: str, span: Span | None) -> files.Stamp | None:
    return files.stamp(span.file if span else f"{folder}/{file}")


def _preference(member: str) -> int:
    return shards.CAPTIONS.index(os.path.splitext(member)[1].casefold())


def _text(folder: Path, file: str, span: Span | None) -> Lines:
    """The captions in one text file, or in a member of a tar, which may be JSON."""
    if span is None:
        return lines_of(text_files.decode(folder / file))
    try:
        text = text_files.decoded(files.read(folder / file, text_files.MAX_BYTES, span), file)
    except UserError as error:
        raise UserError(str(error) if file in str(error) else f"{file}: {error}") from None
    return from_member(text, file) if file.casefold().endswith(".json") else lines_of(text)


def _from_rows(
    rows: Sequence[Row], names: Sequence[str], root: Path | None, problems: list[str]
) -> tuple[list[Lines | None], list[str]]:
    """The captions of tables, each with names below its folder; and names that are no image's."""
    captions: dict[str, Lines] = {}
    spelling: dict[str, str] = {}
    for row in rows:
        file, (at, slash, _) = row.table, row.table.rpartition("/")
        try:
            name = _folded(at + slash + _inside(row.name, root and root / at))
        except UserError as error:
            problems.append(f"{file}: {row.name!r} {error}")
            continue
        if fault := next(filter(None, map(text_files.fault_of, row.lines)), ""):
            problems.append(f"{file}: the caption of {row.name!r} holds {fault}")
        if name in captions:
            problems.append(f"{file}: {spelling[name]!r} and {row.name!r} are the same image")
        captions[name], spelling[name] = row.lines, row.name
    texts: list[Lines | None] = []
    used: set[str] = set()
    for name in names:
        hits = [key for key in (_folded(name), _stem(name)) if key in captions]
        if len({captions[key] for key in hits}) > 1:
            problems.append(f"{name} has a caption with and one without the suffix")
        texts.append(captions[hits[0]] if hits else None)
        used.update(hits)
    return texts, [spelling[key] for key in captions if key not in used]


def _inside(name: str, root: Path | None) -> str:
    """A name as a path below the folder of the images.

    Raises:
        UserError: it leads elsewhere.
    """
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


def _settled(
    found: Sequence[Lines | None],
    names: Sequence[str],
    several: Several | None,
    missing: Missing,
    problems: list[str],
    spare: Sequence[str],
) -> Captions:
    """One caption for each image, or lines to draw from, and all that there is to say of them."""
    pairs = list(zip(names, found, strict=True))
    without = [shown(name) for name, lines in pairs if lines is None]
    if missing == "error":
        problems = problems + [f"{name}: no caption" for name in without]
    more = [name for name, lines in pairs if lines and len(lines) > 1]
    if more and several is None:
        problems.append(
            f"captions of several lines: {some(more)}; set caption_lines to first, random "
            "(another each time) or join"
        )
    choice = {"first": lambda lines: lines[:1], "join": lambda lines: (" ".join(lines),)}
    texts = [choice.get(several or "", tuple)(lines or ("",)) for lines in found]
    problems += [
        f"{shown(name)}: its caption has {max(map(len, lines))} characters, more than "
        f"{MAX_CHARACTERS}"
        for name, lines in zip(names, texts, strict=True)
        if max(map(len, lines)) > MAX_CHARACTERS
    ]
    empty = [name for name, lines in pairs if lines == ("",)]
    notices = [f"captions that name no image: {some(spare)}"] if spare else []
    if without and missing == "empty":
        notices.append(f"images without caption, which is then empty: {some(without)}")
    if empty and not problems:
        notices.append(f"images whose caption is empty: {some(empty)}")
    return Captions(texts, problems, notices)


def _folded(name: str) -> str:
    """A name as it is compared: composed Unicode, an image's suffix in lower case."""
    name = str(PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")))
    suffix = PurePosixPath(name).suffix
    if suffix.casefold() in SUFFIXES:
        return name.removesuffix(suffix) + suffix.casefold()
    return name


def _stem(name: str) -> str:
    if name.isascii() and not re.search(r"[\\]|//|(^|/)\.", name):  # a million take two seconds
        head, dot, end = name.rpartition(".")
        return head if dot and end and head and "/" not in end else name
    path = PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/"))
    return str(path.with_suffix(""))


def shown(name: str) -> str:
    """A name that fits on a line of a message."""
    return name if name.isprintable() else ascii(name)


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more
