"""Layer patterns: which weights of a network a list of module names and regexes selects.

A network is known by the names of its parameters (`conv_in.weight`); its modules are the dotted
prefixes of these names, `''` (the whole network) among them. Modules without parameters have no
name here.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from jaxft.errors import UserError


def modules(parameter_names: Iterable[str]) -> list[str]:
    """Names of all modules, `''` included, a module before the modules in it."""
    found = {"": None}
    for name in parameter_names:
        parts = name.split(".")[:-1]
        found |= {".".join(parts[: depth + 1]): None for depth in range(len(parts))}
    return list(found)


def match(patterns: Sequence[str], parameter_names: Iterable[str], where: str) -> list[str]:
    """Parameters in the modules that any pattern selects, each once, in the order given.

    A pattern is a module's exact name, or `re:` and a regex that matches a module's name from its
    start (`re.match`); everything inside a matched module is taken. `where` is the configuration
    key that holds the patterns: errors name it.

    Raises:
        UserError: a regex does not compile, or a pattern selects no module.
    """
    names = list(parameter_names)
    known = modules(names)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = _select(pattern, known, where)
        if not hits:
            raise UserError(f"{where}: {pattern!r} matches no layer{_hint(pattern, known)}")
        chosen.update(hits)
    return [name for name in names if not chosen.isdisjoint(modules([name]))]


def _select(pattern: str, known: list[str], where: str) -> list[str]:
    if not isinstance(pattern, str):
        raise UserError(f"{where}: {pattern!r} is not text; quote the layer's name")
    if not pattern.startswith("re:"):
        return [name for name in known if name == pattern]
    try:
        regex = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    return [name for name in known if regex.match(name)]


def _hint(pattern: str, known: list[str]) -> str:
    """Names near the pattern: whole ones first, else ones that end alike."""
    text = re.sub(r"[\\^$*+?()\[\]{}|]", "", pattern.removeprefix("re:")).strip(".")
    known = [name for name in known if name]
    near = get_close_matches(text, known, n=3)
    if not near:
        ends = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [ends[end] for end in get_close_matches(text.rpartition(".")[2], ends, n=3)]
    if not near:
        near = [name for name in known if "." not in name][:5]
    return "; near names: " + ", ".join(repr(name) for name in near)
