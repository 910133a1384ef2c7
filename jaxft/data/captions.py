"""Captions of a folder of images: files beside them, or one table for all."""

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jaxft.data import caption_tables, files, shards, text_files
from jaxft.data.caption_tables import READERS, Lines, Table, from_member, lines_of
from jaxft.data.columns import Made, Texts
from jaxft.data.files import Span
from jaxft.data.image_names import folded, inside, stem
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

Several = Literal["first", "random", "join"]
Missing = Literal["error", "empty"]


class Captions(NamedTuple):
    """What was read for a list of images."""

    texts: Sequence[Lines]
    """For each image its captions, of which one is drawn; '' where there is none."""
    problems: list[str]
    """What makes the captions unusable: each names a file, a key or an image."""
    notices: list[str]
    """What a user should know and need not mend."""


class _Found(NamedTuple):
    """The texts of captions, lines one behind the other; for each image its row among them, -1 for
    none; and the captions of no image."""

    texts: Texts
    rows: Sequence[int]
    spare: list[str]


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
        found = _from_texts(place.path, names, problems, kept, members)
        return _settled(found, names, several, missing, problems)
    path, tables, texts = _found(place, names)
    if not tables:
        found = _from_texts(path, names, problems, kept, dict.fromkeys(texts))
    else:
        rows = _tables(place, path, tables, problems, kept)
        pairs = {table: zip(own.names, own.captions, strict=True) for table, own in rows.items()}
        found = _from_rows(pairs, names, root, problems)
    return _settled(found, names, several, missing, problems)


def column(
    caption_file: Place, names: Sequence[str], title: str, *, root: Path, kept: Path | None = None
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
    rows = _tables(caption_file, path, tables, problems, kept, title)
    if not any(any(own.others) for own in rows.values()):
        raise UserError(f"cond_column: no row of {some(tables)} has a {title!r} that is text")

    def pairs(table: str, own: Table) -> Iterator[tuple[str, str]]:
        at, slash, _ = table.rpartition("/")
        for name, other in zip(own.names, own.others, strict=True):
            try:
                if other:
                    yield name, at + slash + inside(other, root / at)
            except UserError as error:
                problems.append(f"{table}: {title} {other!r} {error}")

    named = {table: pairs(table, own) for table, own in rows.items()}
    found = _from_rows(named, names, root, problems)
    return [found.texts[row] if row >= 0 else None for row in found.rows], problems


def _tables(
    place: Place,
    path: Path,
    tables: Sequence[str],
    problems: list[str],
    kept: Path | None,
    title: str | None = None,
) -> dict[str, Table]:
    """All tables in a folder, with one column besides the captions."""
    found = {}
    for table in tables:
        form = place.form or str(_form(table))
        found[table] = caption_tables.read(path / table, form, title, kept)
        problems += found[table].problems
    return found


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
) -> _Found:
    """One of the text files for each image, of the same name up to the suffix, those of tars up to
    the first dot."""
    members = any(texts.values())
    key = shards.key if members else stem
    rows = dict.fromkeys(map(key, names), -1)  # -1: no file yet
    picked, spare = [], []
    for file in sorted(texts, key=_preference) if members else texts:
        place = key(file)
        row = rows.get(place)
        if row is None:
            spare.append(file)
        elif row < 0:
            rows[place] = len(picked)
            picked.append(file)
        elif not members:
            problems.append(f"{picked[row]} and {file} are captions of one image; keep one")
    looked = Index(kept, folder, f"captions {RECIPE}").look(
        picked,
        lambda place: _stamp(folder, picked[place], texts[picked[place]]),
        lambda place: _text(folder, picked[place], texts[picked[place]]),
        title=f"reading captions of {folder}",
    )
    found = Texts()
    for fact in looked:
        if isinstance(fact, UserError):
            problems.append(str(fact))
        found.append("" if isinstance(fact, UserError) else "\n".join(fact))
    return _Found(found, array("q", (rows[key(name)] for name in names)), spare)


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
    tables: Mapping[str, Iterable[tuple[str, str]]],
    names: Sequence[str],
    root: Path | None,
    problems: list[str],
) -> _Found:
    """The texts of tables, each with names below its folder."""
    rows: dict[str, int] = {}
    texts, spelling = Texts(), Texts()
    for file, pairs in tables.items():
        at, slash, _ = file.rpartition("/")
        below = root and root / at
        for written, text in pairs:
            try:
                name = folded(at + slash + inside(written, below))
            except UserError as error:
                problems.append(f"{file}: {written!r} {error}")
                continue
            if fault := next(filter(None, map(text_files.fault_of, text.split("\n"))), ""):
                problems.append(f"{file}: the caption of {written!r} holds {fault}")
            if name in rows:
                other = spelling[rows[name]]
                problems.append(f"{file}: {other!r} and {written!r} are the same image")
            rows[name] = len(texts)
            texts.append(text)
            spelling.append(written)
    chosen, used = array("q"), bytearray(len(texts))
    for name in names:
        hits = [rows[key] for key in (folded(name), stem(name)) if key in rows]
        if len({texts[row] for row in hits}) > 1:
            problems.append(f"{name} has a caption with and one without the suffix")
        chosen.append(hits[0] if hits else -1)
        for row in hits:
            used[row] = True
    return _Found(texts, chosen, [spelling[row] for row in rows.values() if not used[row]])


def _settled(
    found: _Found,
    names: Sequence[str],
    several: Several | None,
    missing: Missing,
    problems: list[str],
) -> Captions:
    """One caption for each image, or lines to draw from, and all that there is to say of them."""
    texts, without, more, empty, long = Texts(), [], [], [], []
    choice = {"first": lambda lines: lines[:1], "join": lambda lines: [" ".join(lines)]}
    for name, row in zip(names, found.rows, strict=True):
        text = found.texts[row] if row >= 0 else ""
        if "\n" in text:
            more.append(name)
            text = "\n".join(choice.get(several or "", list)(text.split("\n")))
        elif not text:
            (empty if row >= 0 else without).append(name)
        if (
            len(text) > MAX_CHARACTERS
            and (most := max(map(len, text.split("\n")))) > MAX_CHARACTERS
        ):
            long.append(
                f"{shown(name)}: its caption has {most} characters, more than {MAX_CHARACTERS}"
            )
        texts.append(text)
    if missing == "error":
        problems = problems + [f"{shown(name)}: no caption" for name in without]
    if more and several is None:
        problems.append(
            f"captions of several lines: {some(more)}; set caption_lines to first, random "
            "(another each time) or join"
        )
    problems += long
    notices = [f"captions that name no image: {some(found.spare)}"] if found.spare else []
    if without and missing == "empty":
        notices.append(f"images without caption, which is then empty: {some(without)}")
    if empty and not problems:
        notices.append(f"images whose caption is empty: {some(empty)}")
    made = Made(lambda place: tuple(texts[place].split("\n")), range(len(texts)))
    return Captions(made, problems, notices)


def shown(name: str) -> str:
    """A name that fits on a line of a message."""
    return name if name.isprintable() else ascii(name)


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more
