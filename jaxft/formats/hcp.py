"""HCP-Diffusion's part files: what was trained in one run, keys `kind:name`.

`base:<parameter>` is a trained weight, `base_ema:` its moving average; `lora:` and `lora_ema:` are
read by `formats.lora`; `plugin:` is not supported. One file may hold several kinds.

A file is of the UNet or of the text encoders. Those of Stable Diffusion XL share one, the names in
it beginning with `clip_B.` and `clip_bigG.`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.patterns import match
from jaxft.shapes import NEGATIVE

KINDS = {
    "base": "trained weights",
    "base_ema": "averaged weights",
    "lora": "a LoRA",
    "lora_ema": "an averaged LoRA",
    "plugin": "a plugin (not supported)",
    "plugin_ema": "an averaged plugin (not supported)",
}
"""What keys begin with -> what they hold."""

XL_PREFIXES = {"clip_B.": "text_encoder", "clip_bigG.": "text_encoder_2"}
"""Beginning of names in a file of XL's text encoders -> network."""

HOST = "._host."
"""In the names of layers that were trained in full and had a LoRA besides."""


def place(name: str, network: str) -> tuple[str, str]:
    """The network of a name in a file of `network` or of XL's text encoders, and the name in it."""
    for prefix, encoder in XL_PREFIXES.items():
        if name.startswith(prefix):
            return encoder, name.removeprefix(prefix)
    return network, name


def by_file(
    networks: Mapping[str, Mapping[str, Any]], is_xl: bool | None = None
) -> dict[str, dict[str, Any]]:
    """File (`unet`, `text_encoder`, `unet-neg`, …) -> what belongs in it, named as there.

    Args:
        networks: network -> name -> anything.
        is_xl: whether text encoders are those of XL; None: if the second is among them.
    """
    prefixes = {network: prefix for prefix, network in XL_PREFIXES.items()}
    is_xl = "text_encoder_2" in networks if is_xl is None else is_xl
    files: dict[str, dict[str, Any]] = {}
    for network, named in networks.items():
        base = network.removeprefix(NEGATIVE)
        prefix = prefixes.get(base, "") if is_xl else ""
        own = {f"{prefix}{name}": value for name, value in named.items()}
        file = base.removesuffix("_2") + ("" if base == network else "-neg")
        files.setdefault(file, {}).update(own)
    return files


def write_part(path: Path, part: Mapping[str, Any], dtype: str = "fp32") -> None:
    """Writes trained weights, named as in the file, as `base:<name>`."""
    write(path, {"base": part}, dtype)


def write(
    path: Path,
    kinds: Mapping[str, Mapping[str, Any]],
    dtype: str = "fp32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a part file of several kinds, kind -> name -> array, with texts for its header."""
    stored = {f"{kind}:{name}": array for kind, own in kinds.items() for name, array in own.items()}
    tensor_file.write(path, stored, metadata, params.DTYPES[dtype])


def kinds(path: Path, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind -> name -> array of what a file holds.

    Raises:
        UserError: a key is of no kind that we know.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, array in stored.items():
        kind, _, name = key.partition(":")
        found.setdefault(kind, {})[name] = array
    if unknown := sorted(found.keys() - KINDS.keys()):
        raise UserError(
            f"{path}: no part file; its keys should begin with 'base:', but some begin with "
            + ", ".join(map(repr, unknown[:5]))
        )
    return found


def read_part(path: Path, average: bool = False) -> dict[str, Any]:
    """Trained weights of a part file, or their moving average; named as in the file, dtype as
    stored. A LoRA in the same file is left to `formats.lora`.

    Raises:
        UserError: the file is unreadable, no part file, or holds no such weights.
    """
    found, kind = kinds(path, tensor_file.read(path)), "base_ema" if average else "base"
    if kind not in found:
        held = ", ".join(KINDS[other] for other in found)
        told = f"it holds {held}" if found else "was nothing trained?"
        raise UserError(f"{path}: no weights in it (no key '{kind}:…'); {told}")
    return {
        name.replace(HOST, "."): array
        for name, array in found[kind].items()
        if not name.endswith("embeddings.position_ids")  # a constant, averaged with the rest
    }


class Share(NamedTuple):
    """Some trained weights of one network, to be merged."""

    weights: Mapping[str, Any]
    alpha: float
    layers: str | Sequence[str] = "all"
    """`all`, or layer patterns (`jaxft.patterns`): other weights are not merged."""
    source: str = "part"
    """Their file, for errors."""


def merge_parts(
    base: Mapping[str, Any], shares: Sequence[Share], base_model_alpha: float = 0.0
) -> dict[str, Any]:
    """The network's weights with W ← base_model_alpha · W + Σ alpha · V.

    The sum is over the parts that hold the weight and whose layers take it. A weight that none
    has stays as it is.

    Args:
        base: all weights W of the network.
        shares: parts of some weights V each.
        base_model_alpha: share of W.

    Returns:
        A new dict: merged weights in float32, the others untouched.

    Raises:
        UserError: a part has weights that the network lacks or of another shape, or `layers`
            selects nothing in it.
    """
    terms: dict[str, list[tuple[float, Any]]] = {}
    for share in shares:
        for name in _chosen(base, share):
            terms.setdefault(name, []).append((share.alpha, share.weights[name]))
    return dict(base) | {
        name: _mix([*added, (base_model_alpha, base[name])]) for name, added in terms.items()
    }


def _chosen(base: Mapping[str, Any], share: Share) -> list[str]:
    """The names of a part's weights that its layers take."""
    part, source = share.weights, share.source
    params.check(part, {name: base[name] for name in part if name in base}, source)
    if share.layers == "all":
        chosen = list(part)
    else:
        patterns = [share.layers] if isinstance(share.layers, str) else share.layers
        chosen = [name for name in match(patterns, base, f"{source}: layers") if name in part]
    if not chosen:
        raise UserError(f"{source}: layers: none of its weights lie in {share.layers!r}")
    return chosen


def _mix(terms: Sequence[tuple[float, Any]]) -> np.ndarray:
    """Σ factor · array, float32."""
    # 0 · W would turn −0 into 0 and let a NaN through.
    counted = [np.float32(a) * np.asarray(v, np.float32) for a, v in terms if a]
    mixed = counted[0] if counted else np.zeros(np.shape(terms[0][1]), np.float32)
    for addend in counted[1:]:
        mixed += addend
    return mixed
