"""Tables of captions, JSON, YAML, JSON Lines or CSV: rows of an image's name and its captions.

A caption is a text, a list of texts, or an object with `caption` or `text`, `tags`, or both, as
kohya's metadata files have it: the tags come behind the caption.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxft.data import index, text_files
from jaxft.data.columns import Texts
from jaxft.errors import UserError

RECIPE = 1
"""To be raised when a table is read in another way: what was read before is kept."""

MAX_BYTES = 2**30
"""Larger tables are refused before they are read."""

Lines = tuple[str, ...]
"""The captions of one image, each stripped and not empty; ('',) where there is none."""

_SCALARS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "timestamp", "merge", "value")
}
"""What stands in a YAML file without quotes and is taken as it is written: 2023, no, 1e-3."""

_NULL = "tag:yaml.org,2002:null"


class Row(NamedTuple):
    """One entry of a table."""

    name: str
    """Of the image, as the table writes it."""
    lines: Lines
    other: str | None = None
    """What the column that is asked for says, as the table writes it."""


def lines_of(text: str) -> Lines:
    """The lines of a text that hold something."""
    lines = (line.strip() for line in re.split(r"\r\n?|\n", text))
    return tuple(line for line in lines if line) or ("",)


def from_json(
    text: str, path: Path, problems: list[str], column: str | None = None
) -> Iterable[Row]:
    """Rows of one object, `{"1.png": "a caption"}`.

    Raises:
        UserError: no JSON, or something else than an object.
    """
    try:
        table = json.loads(text, object_pairs_hook=_unique(path.name, problems))
    except (ValueError, RecursionError) as error:
        raise UserError(f"caption_file: {path} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f'caption_file: {path} must be one object, {{"image name": "caption"}}')
    return _rows(table, path.name, problems, column)


def from_yaml(
    text: str, path: Path, problems: list[str], column: str | None = None
) -> Iterable[Row]:
    """Rows of one mapping, `1.png: a caption`. What is not quoted is text all the same.

    Raises:
        UserError: no YAML, or something else than a mapping.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        root = yaml.compose(text, Loader=loader)  # nodes: nothing is constructed
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"caption_file: {path} is not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"caption_file: {path} must be one mapping, `image name: caption`")
    seen: set[int] = set()
    pairs = []
    for key, value in root.value:
        line = key.start_mark.line + 1
        try:
            pairs.append((_name(key), _plain(value, seen)))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name}: line {line}: the caption {error}")
    return _rows(_unique(path.name, problems)(pairs), path.name, problems, column)


def from_json_lines(
    text: str, path: Path, problems: list[str], column: str | None = None
) -> Iterator[Row]:
    """Rows of lines `{"file_name": "1.png", "text": "a caption"}`, as Hugging Face's imagefolder
    has them; each line that is none is a problem."""
    for number, match in enumerate(re.finditer(r"[^\n]*(?:\n|$)", text), 1):
        line = match[0]
        if not line.strip():
            continue
        where = f"{path.name}: line {number}"
        try:
            entry = json.loads(line, object_pairs_hook=_unique(where, problems))
        except (ValueError, RecursionError) as error:
            problems.append(f"{where} is not JSON: {error}")
            continue
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if isinstance(name, str):
            yield from _rows({name: entry}, where, problems, column)
        else:
            problems.append(f'{where} is no object with a "file_name" that is text')


def from_csv(
    text: str, path: Path, problems: list[str], column: str | None = None
) -> Iterator[Row]:
    """Rows of a table with the columns `file_name` and `text` or `caption`, as Hugging Face's
    imagefolder has them; each row that lacks one is a problem.

    Raises:
        UserError: the first line names no such columns.
    """
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = table.fieldnames or []
        if "file_name" not in columns or not {"text", "caption"} & set(columns):
            raise UserError(
                f"caption_file: {path} has the columns {', '.join(columns) or 'none'}; it must "
                "have file_name, and text or caption"
            )
        for entry in table:
            where, name = f"{path.name}: line {table.line_num}", entry.pop("file_name")
            if not name or None in entry or None in entry.values():
                problems.append(f"{where} has no file_name, or another number of columns")
            else:
                yield from _rows({name: entry}, where, problems, column)
    except csv.Error as error:
        problems.append(f"{path.name}: line {table.reader.line_num} is not CSV: {error}")


def from_member(text: str, name: str) -> Lines:
    """The captions in a member of a tar that is JSON: an object with `caption` or `text`.

    Raises:
        UserError: something else.
    """
    try:
        return _lines(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: the caption {error}") from None


Reader = Callable[[str, Path, list[str], str | None], Iterable[Row]]
"""The text of a file, its path for messages, the problems, which are added to, and a column besides
the captions."""

READERS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "json": ((".json",), from_json),
    "yaml": ((".yaml", ".yml"), from_yaml),
    "jsonl": ((".jsonl",), from_json_lines),
    "csv": ((".csv",), from_csv),
}
"""Form -> suffixes of its files, and what reads it."""


class Table(NamedTuple):
    """The rows of a table, in columns."""

    names: Texts
    """Of the images, as the table writes them."""
    captions: Texts
    """The lines of each one, one behind the other."""
    others: Texts
    """What the column that was asked for says; '' where it says nothing."""
    problems: Texts


def read(path: Path, form: str, column: str | None, kept: Path | None) -> Table:
    """A table of a form, a key of `READERS`, and a column besides its captions; as it was read
    before, where it has not changed and `kept` has it, see `index`.

    Raises:
        UserError: the file cannot be read, or is no such table.
    """

    def make() -> dict[str, Texts]:
        table, problems = Table(Texts(), Texts(), Texts(), Texts()), []
        text = text_files.decode(path, MAX_BYTES)
        for row in READERS[form][1](text, path, problems, column):
            table.names.append(row.name)
            table.captions.append("\n".join(row.lines))
            table.others.append(row.other or "")
        return table._replace(problems=Texts(problems))._asdict()

    return Table(**index.rows(kept, path, f"table {RECIPE} {form} {column}", make))


def _unique(where: str, problems: list[str]) -> Callable[[list[tuple[Any, Any]]], dict[Any, Any]]:
    """What makes a dict of pairs, and tells of keys that come twice."""

    def make(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        problems.extend(f"{where}: the key {key!r} occurs more than once" for key in twice)
        return dict(pairs)

    return make


def _rows(
    table: Mapping[str, Any], where: str, problems: list[str], column: str | None
) -> Iterator[Row]:
    for name, value in table.items():
        try:
            yield Row(name, _lines(value), _other(value, column))
        except ValueError as error:
            problems.append(f"{where}: the caption of {name!r} {error}")
            yield Row(name, ("",))


def _other(value: Any, column: str | None) -> str | None:
    """What an entry says in a column. Raises ValueError: something else than text."""
    found = value.get(column) if column and isinstance(value, dict) else None
    if found is not None and not isinstance(found, str):
        raise ValueError(f"stands beside a `{column}` that is not text")
    return found or None


def _lines(value: Any) -> Lines:
    """Raises ValueError: why a value is no caption, to follow its name."""
    if isinstance(value, str):
        return lines_of(value)
    if isinstance(value, list):
        if not value or not all(isinstance(item, str) for item in value):
            raise ValueError("is a list that does not hold texts")
        return tuple(line for item in value for line in lines_of(item) if line) or ("",)
    if not isinstance(value, dict):
        raise ValueError(f"is {json.dumps(value)}, not text")
    found = {key: value[key] for key in ("caption", "text", "tags") if value.get(key) is not None}
    if not found or any(isinstance(item, dict) for item in found.values()):
        raise ValueError("has neither `caption`, `text` nor `tags` that are text")
    tags = ", ".join(filter(None, _lines(found.pop("tags", ""))))
    captions = {_lines(item) for item in found.values()} or {("",)}
    if len(captions) > 1:
        raise ValueError("has a `caption` and another `text`; keep one")
    return tuple(", ".join(filter(None, (line, tags))) for line in captions.pop())


def _name(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("has a name that is not text")
    return node.value


def _plain(node: yaml.Node, seen: set[int]) -> Any:
    """A node as JSON would have it, each text as it is written.

    Raises:
        ValueError: an alias of a collection, of which a small file may hold a million; a tag.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag not in (*_SCALARS, _NULL):
            raise ValueError(f"has the tag {node.tag}; it must be text")
        return None if node.tag == _NULL else node.value
    if id(node) in seen:
        raise ValueError("is an alias of a list or a mapping; write it out")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, seen) for item in node.value]
    return {_name(key): _plain(value, seen) for key, value in node.value}
