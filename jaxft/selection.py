"""What a configuration trains: from its groups to weights of networks, and to LoRAs beside them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import params
from jaxft.errors import UserError
from jaxft.formats import hcp
from jaxft.formats.diffusers_folder import Model
from jaxft.formats.lora import modules
from jaxft.low_rank import Lora
from jaxft.models import clip
from jaxft.shapes import NEGATIVE
from jaxft.tuning import adapters as loras
from jaxft.tuning.adapters import Adapters, LoraGroup
from jaxft.tuning.groups import Group, Labels, assign
from jaxft.tuning.groups import layers as patterns_of

NETWORKS = ("unet", "text_encoder")
"""What LoRAs are of; XL's two text encoders are one, their names beginning as in part files."""

FULL = (*NETWORKS, "controlnet")
"""What is trained in full."""


class Selection(NamedTuple):
    """What is trained, and by which group."""

    groups: list[Group]
    labels: Labels
    """Part of what is trained -> name in it -> group. A part is a network, `lora_<network>`, or
    `words`, where a name is a word."""
    adapters: dict[str, Adapters]
    """Network -> its LoRAs; `negative_unet`, …: those for negative prompts, if they have others."""
    notices: list[str]
    begun: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """`lora_<network>` -> factors that do not begin at nothing."""
    principal: Mapping[str, Mapping[str, np.ndarray]] = MappingProxyType({})
    """Network -> factors of its LoRAs that begin as a part of its weights; see `begin`."""


def select(
    config: Mapping[str, Any],
    model: Model,
    factor: float = 1.0,
    words: Mapping[str, Group] = MappingProxyType({}),
) -> Selection:
    """What the groups of a configuration choose of a model.

    Args:
        config: with `unet`, `text_encoder`, `controlnet`, `lora_unet`, `lora_text_encoder`, each
            name -> group, and `model.clip_skip` and `model.clip_final_norm`.
        model: what is trained.
        factor: of the rates of these groups.
        words: word -> the group that trains it.

    Raises:
        UserError: nothing is trained, a pattern matches nothing, or a group trains nothing.
    """
    full = [
        _group(f"{network}.{name}", network, group, factor)
        for network in FULL
        for name, group in config[network].items()
    ]
    low = [
        LoraGroup(
            _group(f"lora_{network}.{name}", network, group, factor),
            group["rank"],
            group["alpha"],
            group["dropout"],
            group["type"],
            group["rank_dropout"],
            group["factor"],
            group["svd_init"],
            group["replaces"],
            group["branch"],
        )
        for network in NETWORKS
        for name, group in config[f"lora_{network}"].items()
    ]
    named = hcp.by_file({n: part.params for n, part in model.parts.items() if n != "vae"})
    assignment = assign(full, named) if full or not (low or words) else None
    idle = _idle(model, config["model"]["clip_skip"], config["model"]["clip_final_norm"])
    labels, notices = {}, list(assignment.notices if assignment else ())
    for network, own in (assignment.labels if assignment else {}).items():
        kept = {name: label for name, label in own.items() if name not in idle}
        _check_used({*own.values()} - {*kept.values()})
        if len(kept) < len(own):
            notices.append(f"{network}: {_left_out(len(own) - len(kept), 'weights')}")
        for name, label in kept.items():
            place, inner = hcp.place(name, network)
            labels.setdefault(place, {})[inner] = label
    adapters = _adapters(low, named, model, idle, notices)
    _check_begun(adapters, labels)
    labels |= {f"lora_{network}": loras.labels(own) for network, own in adapters.items()}
    labels |= {"words": {word: group.name for word, group in words.items()}} if words else {}
    groups = [*full, *(lora.group for lora in low), *words.values()]
    return Selection(groups, labels, adapters, notices)


def _group(name: str, network: str, node: Mapping[str, Any], factor: float) -> Group:
    layers = patterns_of(node["layers"], network, f"{name}.layers")
    ratio = node.get("loraplus_lr_ratio", 1.0)
    return Group(name, network, layers, node["lr"] * factor, {**node["optimizer"]}, ratio)


def _check_begun(adapters: Mapping[str, Adapters], labels: Labels) -> None:
    for network, layers in adapters.items():
        for module, own in layers.items():
            if own[0].svd and f"{module}.weight" in labels.get(network, {}):
                raise UserError(
                    f"{own[0].group}.svd_init: {module} is trained in full as well, by "
                    f"{labels[network][f'{module}.weight']}; keep one"
                )


def _idle(model: Model, clip_skip: int, final_norm: bool) -> set[str]:
    """Names, as in part files, of what has no influence on the UNet: with `clip_skip` the last
    layers, except in XL's second text encoder, whose pooled state is used too."""
    skip, norm = model.family.text_layer(clip_skip, final_norm)
    found = {}
    for network in model.family.text_encoders:
        component = model.parts[network]
        is_pooled = model.family.is_xl and network == model.family.text_encoders[-1]
        names = () if is_pooled else component.params
        layers = clip.read_options(component.config).num_hidden_layers
        found[network] = dict.fromkeys(clip.unused(names, layers, skip, norm))
    return {*hcp.by_file(found).get("text_encoder", ())}


def _check_used(groups: set[str]) -> None:
    if groups:
        raise UserError(
            f"{min(groups)}: its layers have no influence on the images: they lie behind the last "
            "layer of the text encoder that is used (model.clip_skip, model.clip_final_norm)"
        )


def _left_out(count: int, what: str) -> str:
    return f"{count} {what} behind the last layer that is used (model.clip_skip) are not trained"


def _adapters(
    groups: Sequence[LoraGroup],
    named: Mapping[str, Mapping[str, Any]],
    model: Model,
    idle: set[str],
    notices: list[str],
) -> dict[str, Adapters]:
    """Network -> the LoRAs that groups give it; what the user should know is added to notices."""
    hosts = hcp.by_file(modules(model.configs))
    _check_branches(groups)
    found: dict[str, Adapters] = {}
    for lora in groups:
        group, of, more = lora.group, lora.group.network, 0
        chosen = loras.choose(lora, [*named[of]], hosts[of])
        used = {module: own for module, own in chosen.items() if f"{module}.weight" not in idle}
        _check_used(set() if used else {group.name})
        if len(used) < len(chosen):
            notices.append(f"{group.name}: {_left_out(len(chosen) - len(used), 'layers')}")
        for module, own in used.items():
            network, inner = hcp.place(module, of)
            if lora.branch:
                sides = {"p": network, "n": f"{NEGATIVE}{network}"}
                found |= {side: found.get(side, {}) for side in sides.values()}
                network = sides[lora.branch]
            before = found.setdefault(network, {}).setdefault(inner, [])
            more += bool(before)
            before = [] if lora.replaces else before
            found[network][inner] = loras.join(before, own, module)
        if more:
            adds = f"{group.name} adds to the LoRAs that {more} of its layers have already"
            takes = f"{group.name} takes {more} layers over from groups before it"
            notices.append(takes if lora.replaces else adds)
        elif lora.replaces:
            raise UserError(f"{group.name}.replaces: no group before it has one of its layers")
    kept = {one.group for layers in found.values() for own in layers.values() for one in own}
    for lora in groups:
        if lora.group.name not in kept:
            raise UserError(
                f"{lora.group.name}: later groups replace all its LoRAs; remove it, or put it last"
            )
    return found


def _check_branches(groups: Sequence[LoraGroup]) -> None:
    for network in NETWORKS:
        own = [lora for lora in groups if lora.group.network == network]
        for lora in own:
            if lora.branch is None and any(other.branch for other in own):
                raise UserError(
                    f"{lora.group.name}.branch: other groups of lora_{network} have one; say p or "
                    "n here too, or give the layers a group of each"
                )


def initial(
    selection: Selection, model: Model, seed: int, dtype: Any = np.float32
) -> dict[str, dict[str, Any]]:
    """What is trained as it is before step 1, on the host; `dtype`: of layers, not of LoRAs, which
    are float32."""
    trained: dict[str, dict[str, Any]] = {}
    for network, own in selection.labels.items():
        if network in model.parts:
            weights = model.parts[network].params
            chosen = {name: weights[name] for name in weights if name in own}
            trained[network] = params.cast(chosen, dtype)
    for network, own in selection.adapters.items():
        weights = model.parts[network.removeprefix(NEGATIVE)].params
        principal = selection.principal.get(network, {})
        factors = loras.init(own, seed, weights, principal)
        trained[f"lora_{network}"] = factors | dict(selection.begun.get(f"lora_{network}", {}))
    return trained


def shapes(
    selection: Selection, model: Model, dtype: Any = np.float32
) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes of `initial`."""
    found: dict[str, dict[str, Any]] = {
        network: {
            name: jax.ShapeDtypeStruct(weight.shape, dtype)
            for name, weight in model.parts[network].params.items()
            if name in own
        }
        for network, own in selection.labels.items()
        if network in model.parts
    }
    for network, own in selection.adapters.items():
        found[f"lora_{network}"] = {
            name: jax.ShapeDtypeStruct(shape, np.float32)
            for name, shape in loras.shapes(own).items()
        }
    return found


def begin(selection: Selection, model: Model) -> Selection:
    """The selection with what its LoRAs begin as, where that is a part of the weights; an SVD of
    each such weight, a second for one of 1280 x 1280."""
    principal = {
        network: loras.begin(own, model.parts[network.removeprefix(NEGATIVE)].params)
        for network, own in selection.adapters.items()
    }
    return selection._replace(principal=principal)


def frozen(selection: Selection, model: Model, network: str) -> dict[str, Any]:
    """The weights of a network that stay as they are."""
    own, labels = model.parts[network].params, selection.labels.get(network, {})
    adapters, principal = selection.adapters.get(network, {}), selection.principal.get(network, {})
    weights = loras.hosts(adapters, principal, own)
    return {name: weight for name, weight in weights.items() if name not in labels}


def lora(selection: Selection, trained: Mapping[str, Mapping[str, Any]]) -> Lora:
    """The LoRA of what is trained; empty if there is none."""
    return {
        network: loras.result(own, trained[f"lora_{network}"], selection.principal.get(network, {}))
        for network, own in selection.adapters.items()
        if own
    }


def has_branches(selection: Selection) -> bool:
    """Whether negative prompts have LoRAs of their own."""
    return any(network.startswith(NEGATIVE) for network in selection.adapters)


def check_guided(selection: Selection, guided: bool) -> None:
    """Raises UserError where LoRAs have branches and there is no guidance."""
    if has_branches(selection) and not guided:
        network = next(n for n in selection.adapters if n.startswith(NEGATIVE))
        raise UserError(
            f"lora_{network.removeprefix(NEGATIVE).removesuffix('_2')}: branch tells LoRAs for "
            "prompts from those for negative prompts, of which there are none; set train.cfg_scale "
            "(to '3.0', say) and pairs in word_names, or leave branch out"
        )
