"""A network's weights as one flat dict: PyTorch's names to arrays in PyTorch's layouts.

Weights are data, modules are code: `abstract` says which weights a module has, `bind` joins a
module with its weights inside a traced function, `load` and `check` are the way from files.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxft import tensor_file
from jaxft.errors import UserError
from jaxft.shapes import Params

DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}

Shapes = dict[str, jax.ShapeDtypeStruct]


def abstract(build: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Shapes]:
    """The structure of a module and the shapes of its weights; allocates nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    leaves = nnx.to_flat_state(state)
    return graphdef, {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in leaves
    }


def bind(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Any:
    """The module of `graphdef` with these weights; to be called inside a traced function."""
    paths = {name: tuple(_part(p) for p in name.split(".")) for name in params}
    state = nnx.from_flat_state([(paths[name], nnx.Param(params[name])) for name in params])
    return nnx.merge(graphdef, state)


def _part(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def load(path: Path) -> dict[str, np.ndarray]:
    """Weights of one safetensors file, or of all shards that an index names.

    Raises:
        UserError: a file is missing or is no safetensors file, or the index names a file
            outside its own folder.
    """
    if ".index." in path.name and path.suffix == ".json":
        return {k: v for shard in _shards(path) for k, v in load(shard).items()}
    return tensor_file.read(path)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: the shard {name!r} is no plain file name")
    return [index.parent / name for name in names]


def check(params: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    """Compares names and shapes with what a network expects.

    Raises:
        UserError: lists every missing, unexpected and misshapen weight of `source`.
    """
    problems = [
        *_listing("missing", sorted(expected.keys() - params.keys())),
        *_listing("unexpected", sorted(params.keys() - expected.keys())),
        *_listing(
            "of the wrong shape",
            [
                f"{name} {tuple(params[name].shape)}, expected {tuple(expected[name].shape)}"
                for name in sorted(expected.keys() & params.keys())
                if tuple(params[name].shape) != tuple(expected[name].shape)
            ],
        ),
    ]
    if problems:
        title = f"{source}: the weights do not fit the configuration"
        raise UserError("\n".join([title, *problems]))


def _listing(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"  {len(names)} {what}:", *(f"    {name}" for name in names)] if names else []


def cast(params: Mapping[str, Any], dtype: Any) -> Params:
    """The same weights with floating ones in another dtype; what need not change is not copied."""

    def convert(value: Any) -> Any:
        floating = jax.numpy.issubdtype(value.dtype, np.floating)
        return value.astype(dtype) if floating and value.dtype != dtype else value

    return {name: convert(value) for name, value in params.items()}


def digest(params: Mapping[str, Any]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, as hexadecimal digits."""
    whole = hashlib.sha256()
    for name in sorted(params):
        value = np.ascontiguousarray(params[name])
        whole.update(f"{name} {value.dtype.name} {value.shape} ".encode())
        whole.update(value.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def count(params: Mapping[str, Any]) -> int:
    """Number of scalars."""
    return sum(int(np.prod(value.shape)) for value in params.values())
