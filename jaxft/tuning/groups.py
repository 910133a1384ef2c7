"""Groups of layers with a rate each: from patterns to one label for every trained weight."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft import mesh, patterns
from jaxft.errors import UserError


class Group(NamedTuple):
    """Layers of one network that are trained at one rate."""

    name: str
    """Also its key in the configuration, `unet.0`."""
    network: str
    layers: Sequence[str]
    """Patterns; see `jaxft.patterns.match`."""
    lr: float
    optimizer: Mapping[str, Any] = MappingProxyType({})
    """Its own options of the optimizer; with `_target_`, of an optimizer of its own."""
    up_ratio: float = 1.0
    """Rate of a LoRA's `up` over the group's; Hayou et al. 2024 (https://arxiv.org/abs/2402.12354)."""


_ATTENTION, _TRANSFORMERS = [r"re:.*\.attn\d+$"], [r"re:.*\battentions\.\d+$"]
PRESETS: dict[str, dict[str, list[str]]] = {
    "attn": {
        "unet": _ATTENTION,
        "controlnet": _ATTENTION,
        "text_encoder": [r"re:.*\bself_attn$"],
    },
    "attn-mlp": {
        "unet": _TRANSFORMERS,
        "controlnet": _TRANSFORMERS,
        "text_encoder": [r"re:.*\bself_attn$", r"re:.*\bmlp$"],
    },
    "full": {"unet": [""], "controlnet": [""], "text_encoder": [""]},
}
"""Name -> network -> patterns: attention; whole transformers, as in kohya's trainer; everything."""


def layers(chosen: str | Sequence[str], network: str, where: str) -> Sequence[str]:
    """The patterns of a group: its own, or those of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if not isinstance(chosen, str):
        return chosen
    if chosen not in PRESETS:
        raise UserError(
            f"{where}: {chosen!r} is none of {', '.join(PRESETS)}; patterns: [{chosen!r}]"
        )
    return PRESETS[chosen][network]


Labels = dict[str, dict[str, str]]
"""Network -> parameter -> name of its group; the trained parameters only."""


class Assignment(NamedTuple):
    """Which weight is trained by which group."""

    labels: Labels
    notices: list[str]


def assign(groups: Sequence[Group], parameters: Mapping[str, Iterable[str]]) -> Assignment:
    """Gives every parameter that a group's patterns select to the last group that does.

    Args:
        groups: in the order of the configuration.
        parameters: of each network, all names.

    Raises:
        UserError: no groups, a pattern that matches nothing, or a group that later ones leave
            without any weight.
    """
    if not groups:
        example = "unet: [{lr: 1e-5, layers: ['']}]"
        raise UserError(f"unet: nothing is trained; add a group such as `{example}`")
    labels: Labels = {}
    notices = []
    for group in groups:
        known = labels.setdefault(group.network, {})
        names = patterns.match(group.layers, parameters[group.network], f"{group.name}.layers")
        for earlier in groups:
            taken = sum(known.get(name) == earlier.name for name in names)
            if taken:
                notices.append(f"{group.name} takes {taken} weights over from {earlier.name}")
        known.update(dict.fromkeys(names, group.name))
    kept = {label for network in labels.values() for label in network.values()}
    for group in groups:
        if group.name not in kept:
            raise UserError(
                f"{group.name}: later groups claim every weight of it; remove it or put it last"
            )
    return Assignment(labels, notices)


def norms(
    labels: Labels, weights: Mapping[str, Mapping[str, Array]]
) -> dict[str, Float[Array, ""]]:
    """Euclidean norm of all numbers of each group, float32."""
    values: dict[str, list[Array]] = {}
    for part, own in weights.items():
        for name, value in own.items():
            values.setdefault(labels[part][name], []).append(value)
    return {group: norm(own) for group, own in values.items()}


def norm(values: Iterable[Array]) -> Float[Array, ""]:
    """Euclidean norm of all numbers of some arrays, float32.

    Small arrays, which every device has whole, are laid side by side: one sum takes all of them.
    """
    kinds = {True: [], False: []}
    for value in values:
        kinds[value.size < mesh.SMALLEST_SHARDED].append(value.astype(jnp.float32))
    small = [jnp.concatenate([value.ravel() for value in kinds[True]])] if kinds[True] else []
    return jnp.sqrt(sum(jnp.square(value).sum() for value in (*kinds[False], *small)))
