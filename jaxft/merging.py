"""Files of training merged into a model: HCP-Diffusion's parts, and LoRAs of any form."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxft import low_rank
from jaxft.errors import UserError
from jaxft.formats import hcp, lora
from jaxft.formats.diffusers_folder import Model
from jaxft.formats.hcp import Share

MERGED = {"unet": ("unet",), "TE": ("text_encoder", "text_encoder_2")}
"""What configurations call a file's kind -> the networks that it is of."""


class Addition(NamedTuple):
    """A file, how much of it, and which layers (`all`, or patterns)."""

    path: str
    alpha: float = 1.0
    layers: str | Sequence[str] = "all"


def merge_parts(
    model: Model,
    files: Iterable[Addition],
    *,
    base_model_alpha: float = 0.0,
    networks: Sequence[str] = (),
    average: bool = False,
) -> Model:
    """The model with W ← base_model_alpha · W + Σ alpha · V in the layers that files hold.

    Args:
        model: its weights are W.
        files: HCP-Diffusion's part files; theirs are V.
        base_model_alpha: share of W.
        networks: of which files may be; the first is meant where the names in a file do not tell.
            Empty: each file's weights say by names and shapes of which network they are.
        average: whether to take the moving averages in the files.

    Raises:
        UserError: a file is unreadable, or does not fit the model.
    """
    shares: dict[str, list[Share]] = {}
    for path, alpha, layers in files:
        part = hcp.read_part(Path(path), average)
        for network, weights in _by_network(part, model, path, networks).items():
            shares.setdefault(network, []).append(Share(weights, alpha, layers, path))
    for network, own in shares.items():
        component = model.parts[network]
        merged = hcp.merge_parts(component.params, own, base_model_alpha)
        model = model.replace(**{network: component._replace(params=merged)})
    return model


def _by_network(
    part: Mapping[str, Any], model: Model, path: str, networks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Network -> its weights in a part file."""
    named: dict[str, dict[str, Any]] = {}
    for name, array in part.items():
        network, own = hcp.place(name, "")
        named.setdefault(network, {})[own] = array
    if "" in named:
        plain = named.pop("")
        named[networks[0] if networks else _network_of(plain, model, path)] = plain
    allowed = [name for name in networks or model.parts if name in model.parts]
    if wrong := sorted(named.keys() - {*allowed}):
        raise UserError(f"{path}: is of {wrong[0]}; asked for is {' or '.join(allowed)}")
    return named


def _network_of(part: Mapping[str, Any], model: Model, path: str) -> str:
    """The network that has weights of these names and shapes."""
    for name, component in model.parts.items():
        shapes = {key: array.shape for key, array in component.params.items()}
        if all(shapes.get(key) == array.shape for key, array in part.items()):
            return name
    raise UserError(f"{path}: its weights are of no network of {model.folder}")


def merge_loras(
    model: Model,
    files: Iterable[Addition],
    *,
    networks: Sequence[str] = (),
    average: bool = False,
) -> Model:
    """The model with LoRAs added, each alpha times; of these networks only (empty: of all).

    Raises:
        UserError: a file is unreadable, does not fit the model, or has no layers to add.
    """
    for path, alpha, layers in files:
        factors = lora.read(Path(path), model.configs, average)
        taken = [part for part in factors if not networks or part in networks]
        if not taken:
            raise UserError(
                f"{path}: changes {' and '.join(factors)}, asked for is {' or '.join(networks)}"
            )
        for part in taken:
            component = model.parts[part]
            chosen = low_rank.choose(factors[part], component.params, layers, path)
            merged = low_rank.merge(component.params, chosen, alpha)
            model = model.replace(**{part: component._replace(params=merged)})
    return model
