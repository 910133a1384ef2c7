"""YAML files and overrides -> one frozen configuration.

files    each with the files named in its `_base_` below it; later base wins, file beats bases
overrides of the command line beat all files; `---` takes a key back
defaults of `configs/base.yaml`, which also tells unknown keys and wrong types
interpolation, once everything is in its place
"""

import re
import runpy
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from ml_collections import FrozenConfigDict
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxft import arithmetic, cli, foreign, spellings
from jaxft import schema as schemas
from jaxft.errors import UserError
from jaxft.origins import Layer, message
from jaxft.schema import Schema

REFERENCES = {"train": "base.yaml", "infer": "infer/base.yaml"}
"""What a program configures -> its reference among the shipped configurations."""

Config: TypeAlias = Any
"""A FrozenConfigDict. To the type checker anything: it cannot know the keys."""

DELETED = "---"
_DTYPES = ("fp32", "amp", "fp16", "bf16")


class Loaded(NamedTuple):
    """A configuration, and how it came about."""

    config: Config
    notices: list[str]
    """What to tell the user about it, a line each."""
    layers: list[Layer]
    """The files, bases first, and the command line."""
    merged: dict[str, Any]
    """The layers put together, without defaults, not interpolated."""


def load(
    path: str, overrides: Sequence[str] = (), schema: str = "train"
) -> tuple[Config, list[str]]:
    """The configuration of a run, and what to tell the user about it, a line each; see `read`."""
    loaded = read(path, overrides, schema)
    return loaded.config, loaded.notices


def read(path: str, overrides: Sequence[str] = (), schema: str = "train") -> Loaded:
    """The configuration of a run.

    Args:
        path: a YAML file, or a Python file with `get_config()`, which is run; relative to the
            working directory or to the shipped configurations.
        overrides: `dotted.key=value`, the value as in YAML.
        schema: what it configures, one of `REFERENCES`.

    Mappings keep the order of the files; lists have become tuples.

    Raises:
        UserError: names every missing, unknown or mistyped key and every unsupported feature,
            with the file it comes from.
    """
    reference = read_reference(schema)
    _register_resolvers(datetime.now())
    layers: list[Layer] = []
    tree = _read_with_bases(_find(path, None, "configuration"), (), layers)
    tree = schemas.name_items(tree, reference.tree)
    layers.append(Layer("command line", _from_command_line(overrides, reference)))
    tree = schemas.name_items(_merge(tree, layers[-1].tree, "command line"), reference.tree)
    merged = _without_deleted(tree)
    tree, notices, problems = _settle(merged, reference, layers)
    if problems:
        raise UserError("\n".join(dict.fromkeys(message(*problem, layers) for problem in problems)))
    return Loaded(_freeze(tree), [message(*notice, layers) for notice in notices], layers, merged)


def read_reference(schema: str) -> Schema:
    """The reference of a kind of configuration, one of `REFERENCES`."""
    name = REFERENCES[schema]
    return schemas.from_reference(_read_yaml(shipped_folder() / name, name))


def top_keys(path: str) -> set[str]:
    """The keys at the top of a file and its bases.

    Raises:
        UserError: one of them is not there, or no configuration.
    """
    return set(_read_with_bases(_find(path, None, "configuration"), (), []))


def to_yaml(config: Config | dict[str, Any]) -> str:
    """A configuration, or its `to_dict()`, as YAML text; loaded again, it gives an equal one."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value.replace("${", "\\${") if isinstance(value, str) else value

    tree = config.to_dict() if isinstance(config, FrozenConfigDict) else config
    return OmegaConf.to_yaml(OmegaConf.create(plain(tree)))


def find_shipped(name: str) -> Path:
    """A file or folder, looked up from the working directory, then among the shipped ones.

    Raises:
        UserError: it is in neither place.
    """
    return _find(name, None, "file")


def shipped_folder() -> Path:
    """The folder of the shipped configurations: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _find(name: str, beside: Path | None, what: str) -> Path:
    """An existing path: beside a file, from the working directory, among the shipped ones."""
    head, _, tail = name.partition("/")
    within = tail if head in ("cfgs", "configs") else name
    places = [Path(name), shipped_folder() / within]
    if beside:
        places.insert(0, beside.parent / name)
    for place in places:
        if place.exists():
            return place
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    asked = f"{beside}: " if beside else ""
    raise UserError(f"{asked}no such {what}: {name} (looked for {looked})")


# ------------------------------------------------------------------------------------- reading


def _read_with_bases(path: Path, chain: tuple[Path, ...], layers: list[Layer]) -> dict[str, Any]:
    """A file merged over its bases; each file read is appended to `layers`, bases first."""
    if path.resolve() in chain:
        circle = " -> ".join(str(step) for step in (*chain, path.resolve()))
        raise UserError(f"{path}: `_base_` leads back to this file: {circle}")
    chain = (*chain, path.resolve())
    if path.suffix != ".py":
        own = _read_yaml(path, str(path))
    elif len(chain) == 1:
        own = _run_python(path)
    else:
        raise UserError(f"{path}: a `_base_` must be YAML; Python runs only where it is asked for")
    bases = own.pop("_base_", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: `_base_` must be a file or a list of files")
    tree: dict[str, Any] = {}
    for base in bases:
        below = _read_with_bases(_find(base, path, "`_base_`"), chain, layers)
        tree = _merge(tree, below, str(path))
    layers.append(Layer(str(path), own))
    return _merge(tree, own, str(path))


def _read_yaml(path: Path, name: str) -> dict[str, Any]:
    """The content of a YAML file as plain containers, uninterpolated."""
    try:
        content = OmegaConf.load(path)
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {error.full_key}: {_first_line(error)}") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as YAML: {error}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{name}: must hold keys and values")
    return _plain(OmegaConf.to_container(content))


def _run_python(path: Path) -> dict[str, Any]:
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise UserError(f"{path}: has no function get_config()")
    config = get_config()
    return _plain(config.to_dict() if hasattr(config, "to_dict") else config)


def _plain(node: Any) -> Any:
    """Text keys, lists, the home folder for `~/`; `_partial_`, which changes nothing, is gone."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items() if key != "_partial_"}
    if isinstance(node, str) and node.startswith("~/"):
        return str(Path(node).expanduser())
    return [_plain(item) for item in node] if isinstance(node, list | tuple) else node


def _from_command_line(overrides: Sequence[str], reference: Schema) -> dict[str, Any]:
    """The tree that `dotted.key=value` arguments say; a later one wins."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"command line: {override!r} is no key=value")
        *parents, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = _read_value(text, (*parents, last), reference)
    return tree


def _read_value(text: str, path: schemas.Path, reference: Schema) -> Any:
    """A value of the command line: YAML, but text as it stands where text is wanted."""
    if text == DELETED:
        return text
    try:
        value = _plain(OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        value = text
    found = schemas.find(reference, path)
    if found is None:
        return value
    kinds = schemas.kinds_of(reference, *found)
    if not any(schemas.accepts(text, kind) for kind in kinds if kind[0] == "'" or kind == "text"):
        return value
    if isinstance(value, str):
        return value if text[0] in ("'", '"') else text
    return value if any(schemas.accepts(value, kind) for kind in kinds) else text


# ------------------------------------------------------------------------------------- merging


def _merge(below: dict[str, Any], above: dict[str, Any], name: str) -> dict[str, Any]:
    """`above` over `below`: mappings key by key, lists and values replaced.

    A node with another `_target_`, on which something depends, starts anew. A mapping over a list,
    all of whose keys are places in that list, changes these items. A mapping over an interpolation
    is merged with what that stands for.
    """

    def item(old: Any, new: Any, path: schemas.Path) -> Any:
        if not isinstance(new, dict):
            return new
        if isinstance(old, str) and "${" in old:
            old = _select(below, path, name)
        if isinstance(old, list) and set(new) <= {str(place) for place in range(len(old))}:
            places = enumerate(old)
            return [item(one, new.get(str(at), one), (*path, str(at))) for at, one in places]
        free = foreign.known((*path, "_target_"))
        if not isinstance(old, dict) or not (free or schemas.same_target(old, new)):
            return new
        changed = {key: item(old.get(key), value, (*path, key)) for key, value in new.items()}
        return old | changed

    return item(below, above, ())


def _select(tree: dict[str, Any], path: schemas.Path, name: str) -> Any:
    """What an interpolation in a tree stands for, itself uninterpolated."""
    try:
        value = OmegaConf.select(OmegaConf.create(tree), ".".join(path))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {'.'.join(path)}: {_first_line(error)}") from None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _without_deleted(node: Any) -> Any:
    """The tree without the keys and list items whose value is `---`."""
    if isinstance(node, dict):
        return {key: _without_deleted(value) for key, value in node.items() if value != DELETED}
    if isinstance(node, list):
        return [_without_deleted(item) for item in node if item != DELETED]
    return node


def _settle(
    tree: dict[str, Any], reference: Schema, layers: list[Layer]
) -> tuple[dict[str, Any], list[schemas.Problem], list[schemas.Problem]]:
    """The merged tree as the programs get it, notices, problems.

    Defaults come twice: before interpolation, which may name them, and after it, which may have
    brought in mappings.
    """
    notices: list[schemas.Problem] = []
    problems: list[schemas.Problem] = []
    unknown: list[schemas.Unknown] = []
    variables: list[schemas.Path] = []
    is_variable = schemas.variables(tree)
    was_variable = [schemas.variables(layer.tree) for layer in layers]

    def keep(path: schemas.Path) -> bool:
        if is_variable(path):
            variables.append(path)
        elif not foreign.known(path) and any(was(path) for was in was_variable):
            variables.append(path)
            notices.append((path, "has no effect: what it stood for is set otherwise"))
        return path in variables or foreign.known(path)

    tree = _resolve(schemas.fill(reference, tree, keep, unknown), layers)
    for *parents, last in variables:
        node = tree
        for key in parents:
            node = node[key]
        del node[last]
    foreign.take_out(tree, notices, problems)
    spellings.unwrap(tree)
    tree = schemas.name_items(tree, reference.tree)
    tree = schemas.fill(reference, tree, lambda _: False, unknown)
    problems += [foreign.unknown(key, reference) for key in unknown]
    return schemas.check(reference, tree, problems), notices, problems


# ------------------------------------------------------------------------------- interpolation


def _register_resolvers(now: datetime) -> None:
    """What `${name:…}` means, with `now` as the time of the run."""

    def evaluate(text: Any) -> int | float:
        return arithmetic.evaluate(str(text))

    def time(form: str = "%Y-%m-%d-%H-%M-%S") -> str:
        return now.strftime(form or "%Y-%m-%d-%H-%M-%S")

    def dtype(name: str) -> str:
        if name not in _DTYPES:
            raise ValueError(f"no precision {name}: choose one of {', '.join(_DTYPES)}")
        return name

    def times(one: Any, other: Any) -> int | float:
        return arithmetic.evaluate(f"({one}) * ({other})")

    resolvers = {"eval": evaluate, "hcp.eval": evaluate, "hcp.time": time}
    resolvers |= {"hcp.dtype": dtype, "times": times}
    for name, resolver in resolvers.items():
        OmegaConf.register_resolver(name, resolver, replace=True)


def _resolve(tree: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
    """The tree with every interpolation replaced by its value."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        _, missing, key = _first_line(error).partition("Missing mandatory value: ")
        if missing:
            raise UserError(message(tuple(key.split(".")), "must be given", layers)) from None
        path = re.sub(r"\[(\d+)\]", r".\1", error.full_key or "").split(".")
        raise UserError(message(tuple(path), _first_line(error), layers)) from None
    return _plain(resolved)


def _first_line(error: Exception) -> str:
    """OmegaConf's message without its report on types."""
    return str(error).split("\n", 1)[0]


def _check_keys(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    """Raises UserError for a name that no override could reach: of options, as others are checked
    by the reference."""
    for key, value in tree.items():
        if not isinstance(key, str) or "." in key:
            raise UserError(
                f"{'.'.join((*path, str(key)))}: {key!r} cannot be a name, as it is no text "
                "without dots; in {name: value} a blank stands behind the colon"
            )
        if isinstance(value, dict):
            _check_keys(value, (*path, key))


def _freeze(tree: dict[str, Any]) -> Config:
    """The tree, immutable. FrozenConfigDict sorts its keys; ours have an order, which is put back:
    of two groups that claim a weight, the later one gets it."""

    def put_back(frozen: Any, like: dict[str, Any]) -> None:
        object.__setattr__(frozen, "_sort_keys", False)
        fields = frozen._fields
        for key, value in like.items():
            fields[key] = fields.pop(key)
            if isinstance(value, dict):
                put_back(fields[key], value)

    _check_keys(tree, ())
    frozen = FrozenConfigDict(tree)
    put_back(frozen, tree)
    return frozen


if __name__ == "__main__":
    cli.run(cli.program("config"))
