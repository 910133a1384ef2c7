"""Groups of layers with a rate each: from patterns to one label for every trained weight."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxft import patterns
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
