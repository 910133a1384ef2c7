"""HCP-Diffusion's part files: the trained weights of one network, keys `base:<parameter>`.

Other kinds share the file format: `base_ema:` (the same weights averaged, left aside here),
`lora:` and `plugin:` (not supported yet).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.patterns import match


def write_part(path: Path, part: Mapping[str, Any], dtype: str = "fp32") -> None:
    """Writes trained weights (names as in the network) as `base:<name>`."""
    named = {f"base:{name}": array for name, array in part.items()}
    tensor_file.write(path, named, dtype=params.DTYPES[dtype])


def read_part(path: Path) -> dict[str, Any]:
    """Weights of a part file under the network's own names, dtype as stored.

    Raises:
        UserError: the file is unreadable, empty, or holds LoRA or plugin weights.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for key, array in tensor_file.read(path).items():
        kind, _, name = key.partition(":")
        kinds.setdefault(kind, {})[name] = array
    for kind, what in {"lora": "LoRA part", "plugin": "plugin part"}.items():
        if kind in kinds:
            raise UserError(f"{path}: not supported yet: {what}")
    unknown = sorted(kinds.keys() - {"base", "base_ema"})
    if unknown:
        raise UserError(
            f"{path}: no part file; its keys should begin with 'base:', but some begin with "
            + ", ".join(map(repr, unknown[:5]))
        )
    if "base" not in kinds:
        raise UserError(f"{path}: no weights in it (no key 'base:…'); was nothing trained?")
    return kinds["base"]


def merge_part(
    base: Mapping[str, Any],
    part: Mapping[str, Any],
    *,
    alpha: float,
    base_model_alpha: float = 0.0,
    layers: str | Sequence[str] = "all",
    source: str = "part",
) -> dict[str, Any]:
    """The network's weights with W ← base_model_alpha · W + alpha · V for those in the part.

    Args:
        base: all weights W of the network.
        part: some of its weights V.
        alpha: share of V.
        base_model_alpha: share of W.
        layers: `'all'`, or layer patterns (`jaxft.patterns`): the others stay as they are.
        source: the part's file, for errors.

    Returns:
        A new dict: merged weights in float32, the others untouched.

    Raises:
        UserError: the part has weights that the network lacks or of another shape, or `layers`
            selects nothing in it.
    """
    params.check(part, {name: base[name] for name in part if name in base}, source)
    if layers == "all":
        chosen = list(part)
    else:
        patterns = [layers] if isinstance(layers, str) else layers
        chosen = [name for name in match(patterns, base, f"{source}: layers") if name in part]
    if not chosen:
        raise UserError(f"{source}: layers: none of its weights lie in {layers!r}")
    return dict(base) | {
        name: _mix(base[name], part[name], alpha, base_model_alpha) for name in chosen
    }


def _mix(weight: Any, addition: Any, alpha: float, base_model_alpha: float) -> np.ndarray:
    mixed = np.float32(alpha) * np.asarray(addition, np.float32)
    if base_model_alpha:  # 0 · W would turn −0 into 0 and let a NaN through
        mixed += np.float32(base_model_alpha) * np.asarray(weight, np.float32)
    return mixed
