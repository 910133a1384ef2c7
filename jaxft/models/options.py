"""Reading of a `config.json`: which options a network takes, and which it refuses."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from jaxft.errors import UserError


def read(
    name: str,
    config: Mapping[str, Any],
    free: Mapping[str, Any],
    fixed: Mapping[str, tuple],
    ignored: tuple[str, ...] = (),
) -> SimpleNamespace:
    """The options of a network as attributes.

    Args:
        name: of the network, for messages.
        config: a `config.json` of diffusers or transformers.
        free: options with any value, and their defaults.
        fixed: options of which only these values are supported; the first is the default.
        ignored: keys that do not change what is computed.

    Raises:
        UserError: names each key that is unknown, and each value that is not supported.
    """
    problems = []
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in fixed and value not in fixed[key]:
            choices = " or ".join(map(repr, fixed[key]))
            problems.append(f"  {key}: {value!r} is not supported, only {choices}")
        elif key not in fixed and key not in free and key not in ignored and key[0] != "_":
            problems.append(f"  {key}: unknown option (value {value!r})")
    if problems:
        raise UserError("\n".join([f"{name}: config.json asks for what jaxft lacks", *problems]))
    return SimpleNamespace(**{key: config.get(key, default) for key, default in free.items()})


def per_level(value: Any, levels: int) -> list:
    """An option that is one value for all levels or a list with one for each."""
    return list(value) if isinstance(value, list | tuple) else [value] * levels
