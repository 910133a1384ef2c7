"""A configuration beside its reference: names of list items, defaults, unknown keys, types.

The reference is a YAML file of ours, read into plain containers; `configs/base.yaml` says how it is
written. Configurations are plain containers too. A path is a tuple of keys; a pattern is the path
of the same key in the reference, where "*" stands for a name that the user chose.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Path = tuple[str, ...]
Problem = tuple[Path, str]

_REFERENCE = re.compile(r"\$\{(\.*)([\w.-]+)\}")
"""An interpolation of a key: dots that lead upwards, and the key."""

REQUIRED = "???"
"""The reference's default of a key that must be given."""


class Unknown(NamedTuple):
    """A key that the reference does not have."""

    path: Path
    value: Any
    known: list[str]
    """The keys in that place that it does have."""


class Schema(NamedTuple):
    """A reference, taken apart."""

    tree: dict[str, Any]
    """Every key with its default."""
    types: dict[Path, str]
    """Pattern -> declared type, for keys whose default does not show it."""


def from_reference(reference: dict[str, Any]) -> Schema:
    """The schema of a reference file's content."""
    tree = {key: value for key, value in reference.items() if key != "_types_"}
    types = reference.get("_types_", {})
    return Schema(tree, {tuple(key.split(".")): kind for key, kind in types.items()})


def name_items(node: Any, reference: Any) -> Any:
    """The node with its lists made mappings, {"0": …, "1": …}, where the reference has a "*"."""
    if not isinstance(reference, dict):
        return node
    if isinstance(node, list) and "*" in reference:
        node = {str(index): item for index, item in enumerate(node)}
    if not isinstance(node, dict):
        return node
    return {
        key: name_items(value, reference.get(key, reference.get("*")))
        for key, value in node.items()
    }


def same_target(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two nodes build the same thing: `RatioBucket` is `hcpdiff.data.bucket.RatioBucket`.

    A node without `_target_` adds options to the other one.
    """
    names = [f".{node['_target_']}" for node in (one, other) if node.get("_target_")]
    return len(names) < 2 or names[0].endswith(names[1]) or names[1].endswith(names[0])


def fill(
    schema: Schema,
    tree: dict[str, Any],
    keep: Callable[[Path], bool],
    unknown: list[Unknown],
) -> dict[str, Any]:
    """The tree with the reference's default at each key that it lacks.

    A key that the reference does not have stays if `keep(path)`; otherwise it goes to `unknown`.
    """

    def mapping(node: dict[str, Any], reference: dict[str, Any], path: Path, pattern: Path):
        filled = {}
        for key, default in reference.items():
            if key != "*":
                missing = {} if _is_mapping(schema, (*pattern, key), default) else default
                value = node.get(key, missing)
                filled[key] = item(value, default, (*path, key), (*pattern, key))
        for key in [key for key in node if key not in filled]:
            value, default = node[key], reference.get("*")
            named = "*" in reference and "." not in key
            if named and not (isinstance(default, dict) and _is_scalar(value)):
                filled[key] = item(value, default, (*path, key), (*pattern, "*"))
            elif keep((*path, key)):
                filled[key] = value
            elif named:
                filled[key] = value  # of the wrong type, as `check` will say
            else:
                known = [name for name in reference if name != "*"]
                unknown.append(Unknown((*path, key), value, known))
        return filled

    def item(value: Any, default: Any, path: Path, pattern: Path) -> Any:
        if _is_mapping(schema, pattern, default):
            value = {} if value is None and "*" in default else value
            return mapping(value, default, path, pattern) if isinstance(value, dict) else value
        if isinstance(value, dict) and isinstance(default, dict) and same_target(value, default):
            return default | value
        return value

    return mapping(tree, schema.tree, (), ())


def check(schema: Schema, tree: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The filled tree with every value of its type; each that is not is added to `problems`."""

    def item(value: Any, reference: Any, path: Path, pattern: Path) -> Any:
        kinds = kinds_of(schema, pattern, reference)
        if isinstance(value, dict) and "mapping" in kinds:
            return {
                key: item(
                    child,
                    reference[key] if key in reference else reference["*"],
                    (*path, key),
                    (*pattern, key if key in reference else "*"),
                )
                for key, child in value.items()
            }
        if value is False and "'no'" in kinds:
            value = "no"  # as YAML 1.1 reads it
        if value == REQUIRED:
            problems.append((path, f"must be given ({describe(kinds)})"))
        elif not any(accepts(value, kind) for kind in kinds):
            problems.append((path, f"must be {describe(kinds)}, not {_describe_value(value)}"))
        is_number = any(kind in NUMBERS and accepts(value, kind) for kind in kinds)
        return float(str(value)) if is_number else value

    return item(tree, schema.tree, (), ())


def kinds_of(schema: Schema, pattern: Path, reference: Any) -> list[str]:
    """The types that a key may have: names in `KINDS`, "[int]" for a list, "'a'" for the text a."""
    declared = schema.types.get(pattern)
    if declared:
        return [kind.strip() for kind in declared.split("|")]
    for kind in ("bool", "int", "float", "text"):
        if accepts(reference, kind) and reference != REQUIRED:
            return [kind]
    if isinstance(reference, list) and reference:
        return [f"[{kinds_of(schema, pattern, reference[0])[0]}]"]
    assert isinstance(reference, dict), f"the reference does not show the type of {pattern}"
    return ["mapping"]


def find(schema: Schema, path: Path) -> tuple[Path, Any] | None:
    """Pattern and reference of a path; None for a key that the reference does not have."""
    node: Any = schema.tree
    pattern: Path = ()
    for key in path:
        step = key if isinstance(node, dict) and key in node else "*"
        if not isinstance(node, dict) or step not in node or schema.types.get(pattern) in OPEN:
            return None
        node, pattern = node[step], (*pattern, step)
    return pattern, node


def nearest(schema: Schema, path: Path, known: list[str]) -> str | None:
    """What the user may have meant: a key known in that place, or one of that name elsewhere."""
    close = difflib.get_close_matches(path[-1], known, n=1)
    if close:
        return ".".join((*path[:-1], close[0]))
    elsewhere = {pattern[-1]: ".".join(pattern) for pattern in _patterns(schema.tree, ())}
    close = difflib.get_close_matches(path[-1], elsewhere, n=1, cutoff=0.85)
    return elsewhere[close[0]].replace("*", "<name>") if close else None


def variables(tree: dict[str, Any]) -> Callable[[Path], bool]:
    """Whether an unknown key is a variable: a name of the user's own that is interpolated.

    The key holds the value that some `${…}` names, or is a mapping around it or within it.
    """
    named: set[Path] = set()

    def collect(node: Any, path: Path) -> None:
        if isinstance(node, dict | list):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                collect(value, (*path, str(key)))
        elif isinstance(node, str):
            for dots, key in _REFERENCE.findall(node):
                base = path[: -len(dots)] if dots else ()
                named.add((*base, *key.split(".")))

    collect(tree, ())
    return lambda path: any(path[: len(one)] == one[: len(path)] for one in named)


def accepts(value: Any, kind: str) -> bool:
    """Whether a value is of one kind (see `kinds_of`)."""
    if kind.startswith("'"):
        return value == kind.strip("'")
    if kind.startswith("["):
        return isinstance(value, list) and all(accepts(item, kind[1:-1]) for item in value)
    return KINDS[kind](value)


def describe(kinds: list[str]) -> str:
    """The kinds in words: "int or null"."""
    words = [f"a list of {kind[1:-1]}" if kind[0] == "[" else kind.strip("'") for kind in kinds]
    return " or ".join(_WORDS.get(word, word) for word in words)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, or a text that spells one."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_options(value: Any) -> bool:
    """Whether a value is a mapping that can be frozen: lists hold no mappings."""
    return isinstance(value, dict) and all(
        _is_options(item)
        if isinstance(item, dict)
        else not isinstance(item, list) or not any(isinstance(entry, dict) for entry in item)
        for item in value.values()
    )


KINDS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: _is_whole(value),
    "natural": lambda value: _is_whole(value) and value >= 0,
    "count": lambda value: _is_whole(value) and value >= 1,
    "float": lambda value: _is_number(value),
    "amount": lambda value: _is_number(value) and float(value) >= 0,
    "text": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, dict),
    "options": _is_options,
    "target": lambda value: _is_options(value) and isinstance(value.get("_target_"), str),
}

NUMBERS = ("float", "amount")
"""Kinds that become a float, whatever spells it."""

OPEN = ("target", "target | null", "options")
"""Declared types of nodes whose keys the reference does not name."""

_WORDS = {
    "float": "a number",
    "amount": "a number from 0",
    "int": "a whole number",
    "natural": "a whole number from 0",
    "count": "a whole number from 1",
    "bool": "true or false",
    "mapping": "a mapping",
    "options": "a mapping whose lists hold no mappings",
    "target": "a mapping with `_target_`",
}


def _describe_value(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"the list {value}"
    if isinstance(value, str):
        return f"the text {value!r}"
    return "null" if value is None else str(value).lower()


def _is_mapping(schema: Schema, pattern: Path, reference: Any) -> bool:
    """Whether the reference names the keys of the mapping in this place."""
    return isinstance(reference, dict) and schema.types.get(pattern) not in OPEN


def _is_scalar(value: Any) -> bool:
    """Whether a value cannot stand for a mapping, as null and an interpolation can."""
    return not isinstance(value, dict | list) and value is not None and "${" not in str(value)


def _patterns(node: Any, pattern: Path) -> Iterator[Path]:
    if pattern:
        yield pattern
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _patterns(value, (*pattern, key))


def pop(node: Any, pattern: Path, path: Path) -> list[tuple[Path, Any, dict[str, Any]]]:
    """Takes what matches a pattern out of a tree: path, value and siblings of each. Emptied ones go
    as well."""
    if not isinstance(node, dict):
        return []
    found = []
    for key in [key for key in node if pattern[0] in ("*", key)]:
        if len(pattern) == 1:
            found.append(((*path, key), node.pop(key), node))
            continue
        found += pop(node[key], pattern[1:], (*path, key))
        if node[key] == {}:
            del node[key]
    return found
