"""Which file says what: the layers of a configuration, and the line that a value comes from."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxft import schema as schemas
from jaxft import spellings
from jaxft.schema import Schema

_MISSING = object()
_NOTHING = (_MISSING, None, 0, [], {})

_TRANSFORMS = "data.*.source.*.text_transforms"

_SPELLINGS = [
    (_TRANSFORMS, "data.*.source.*.tag_transforms.transforms"),
    (_TRANSFORMS, f"{_TRANSFORMS}.transforms"),
    *((f"{older.rpartition('.')[0]}.{newer}", older) for older, newer in spellings.OLDER.items()),
    *(("model.ema", older) for older in spellings.AVERAGES),
    ("train.warm_start", ".".join(spellings.RESUME)),
    ("controlnet", ".".join(spellings.PLUGINS)),
]
"""Pattern of a key, and of one that may say the same in HCP-Diffusion's files."""


class Layer(NamedTuple):
    """What one file, or the command line, says by itself."""

    name: str
    tree: dict[str, Any]


def message(path: schemas.Path, text: str, layers: Sequence[Layer]) -> str:
    """A message about a key, headed by the layer to blame: the last one that has the key, or as
    much of the way to it as any has; the user's own file (the last but one) if none has a step."""
    blamed, _ = _nearest(path, layers)
    return f"{(blamed or layers[-2]).name}: {'.'.join(path)}: {text}"


class Origins:
    """Where the values of one configuration come from."""

    def __init__(
        self,
        layers: Sequence[Layer],
        merged: dict[str, Any],
        reference: Schema,
        reference_file: tuple[Path, str],
    ):
        """Args:
        layers: bases first, the command line last.
        merged: the layers put together, not interpolated.
        reference_file: where the reference is, and what to call it.
        """
        self._layers, self._merged, self._reference = layers, merged, reference
        self._file, self._name = reference_file
        self._lines: dict[str, dict[schemas.Path, int]] = {}

    def __call__(self, path: schemas.Path) -> str:
        """`file:line`, `command line`, or the line of the reference that has the default.

        A value that an interpolation brought in is where the interpolation is; one that is said in
        HCP-Diffusion's spelling, where that is.
        """
        path = self._spelt_out(self._as_written(path))
        value = _at(self._merged, path)
        if value is _MISSING and self._has_default(path):
            return f"default, {self._place(self._name, self._file, self._pattern(path))}"
        saying = [layer for layer in self._layers if _at(layer.tree, path) is not _MISSING]
        equal = [layer for layer in saying if _at(layer.tree, path) == value]
        layer, known = (equal[-1], path) if equal else _nearest(path, self._layers)
        if layer is None:
            return "command line"
        return self._place(layer.name, Path(layer.name), known)

    def _place(self, name: str, file: Path, path: schemas.Path) -> str:
        """A file and the line of a key, or of the nearest key around it that has a line."""
        if file.suffix not in (".yaml", ".yml"):
            return name
        if name not in self._lines:
            self._lines[name] = lines(file.read_text("utf-8"))
        found = self._lines[name]
        while path and path not in found:
            path = path[:-1]
        return f"{name}:{found[path]}" if path else name

    def _as_written(self, path: schemas.Path) -> schemas.Path:
        """The path, or as much of it as there is in another spelling."""
        if _at(self._merged, path) in _NOTHING:
            for head, rest in _spellings(path):
                if _at(self._merged, head) not in _NOTHING:
                    while _at(self._merged, (*head, *rest)) is _MISSING:
                        rest = rest[:-1]
                    return (*head, *rest)
        return path

    def _spelt_out(self, path: schemas.Path) -> schemas.Path:
        """The path, or that of the interpolation or the list which brings it in."""
        for depth in range(1, len(path)):
            around, below = (_at(self._merged, path[:end]) for end in (depth, depth + 1))
            if isinstance(around, str | list) and below is _MISSING:
                return path[:depth]
        return path

    def _has_default(self, path: schemas.Path) -> bool:
        default = _at(self._reference.tree, self._pattern(path))
        return default is not _MISSING and default != schemas.REQUIRED

    def _pattern(self, path: schemas.Path) -> schemas.Path:
        """The path in the reference, with "*" where a name is the user's own."""
        pattern: schemas.Path = ()
        for key in path:
            around = _at(self._reference.tree, pattern)
            has = isinstance(around, dict) and (key in around or "*" not in around)
            pattern = (*pattern, key if has else "*")
        return pattern


def lines(text: str) -> dict[schemas.Path, int]:
    """The line, from 1, of each key and each list item of a YAML text."""
    found: dict[schemas.Path, int] = {}

    def walk(node: yaml.Node | None, path: schemas.Path) -> None:
        for name, place, value in _items(node):
            found[(*path, name)] = place.start_mark.line + 1
            walk(value, (*path, name))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return found


def annotate(text: str, origin: Origins) -> str:
    """A YAML text in block style, with a comment behind each value that says where it is from."""
    ends: list[tuple[int, schemas.Path]] = []

    def walk(node: yaml.Node | None, path: schemas.Path) -> None:
        for name, place, value in _items(node):
            inner = (*path, name)
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, inner)
            else:
                is_block = isinstance(value, yaml.SequenceNode) and value.value
                mark = place.end_mark if is_block else value.end_mark
                ends.append((text.index("\n", mark.index), inner))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    pieces, start = [], 0
    for end, path in ends:
        width = end - (text.rfind("\n", 0, end) + 1)
        pieces += [text[start:end], " " * max(2, 56 - width), f"# {origin(path)}"]
        start = end
    return "".join([*pieces, text[start:]])


def _items(node: yaml.Node | None) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """Name, key and value of each item of a node; of lists the item is both key and value."""
    if isinstance(node, yaml.MappingNode):
        return [(key.value, key, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(str(place), item, item) for place, item in enumerate(node.value)]
    return []


def _spellings(path: schemas.Path) -> Iterator[tuple[schemas.Path, schemas.Path]]:
    """The keys that may say what lies at a path, each with what of the path lies below it."""
    for pattern, other in _SPELLINGS:
        steps = pattern.split(".")
        pairs = list(zip(steps, path, strict=False))
        if len(pairs) == len(steps) and all(step in ("*", key) for step, key in pairs):
            keys = [path[at] if key == "*" else key for at, key in enumerate(other.split("."))]
            yield tuple(keys), path[len(steps) :]


def _nearest(
    path: schemas.Path, layers: Sequence[Layer]
) -> tuple[Layer, schemas.Path] | tuple[None, schemas.Path]:
    """The last layer that has the path, or as much of it as any has, and that much."""
    for depth in range(len(path), 0, -1):
        having = [layer for layer in layers if _at(layer.tree, path[:depth]) is not _MISSING]
        if having:
            return having[-1], path[:depth]
    return None, ()


def _at(node: Any, path: schemas.Path) -> Any:
    """What a tree has at a path, in which list items are named by their places."""
    for key in path:
        if isinstance(node, list):
            node = {str(place): item for place, item in enumerate(node)}
        if not isinstance(node, dict) or key not in node:
            return _MISSING
        node = node[key]
    return node
