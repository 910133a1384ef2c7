"""LoRAs and other adapters in training: from groups to factors beside the layers, and from trained
factors to a LoRA.

A layer may have several LoRAs, of different groups: they add up; of other kinds it has one. Their
factors are a part of what is trained, `lora_<network>`, under the names that
`models.adapters.adapt` gives them in the network.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxft import lycoris, patterns
from jaxft.errors import UserError
from jaxft.low_rank import LowRank, extract
from jaxft.lycoris import Change
from jaxft.models import adapters as forms
from jaxft.tuning.groups import Group

WITHOUT_DROPOUT = ("lokr", "oft")
"""Kinds that have no values of their own between two factors."""

WITH_UP = ("lora", "locon", "dora")
"""Kinds with a factor `up`, whose rate may be another."""

UNIFORM = ("down", "mid", "lokr_w1", "lokr_w2_a")
"""Factors that begin uniform in ±1/√(inputs of a row), as `torch.nn.Linear` (He et al. 2015 with
a = √5), HCP-Diffusion and LyCORIS have it."""

NORMAL = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}
"""Factors that begin normal, with their standard deviations, as in LyCORIS."""


class LoraGroup(NamedTuple):
    """Layers that have a LoRA."""

    group: Group
    rank: float
    """From 1 a whole number; below 1 a share of the layer's output width."""
    alpha: float
    dropout: float
    kind: str = "lora"
    """A name in `models.adapters.FORWARD`."""
    rank_dropout: float = 0.0
    factor: int = -1
    """What `lokr` divides widths by; -1: near their roots."""
    svd: bool = False
    """Whether it begins as the largest part of the layer's weight, of which it takes the place."""
    replaces: bool = False
    """Whether it takes its layers over from groups before it; if not, LoRAs add up."""
    branch: str | None = None
    """`p`: only as the network answers prompts; `n`: negative prompts; None: both."""


class Adapter(NamedTuple):
    """One LoRA of one layer."""

    group: str
    shape: tuple[int, ...]
    """Of the layer's weight."""
    rank: int
    alpha: float
    dropout: float
    kind: str = "lora"
    rank_dropout: float = 0.0
    factor: int = -1
    svd: bool = False
    branch: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the factors."""
        return forms.SHAPES[self.kind](self.shape, self.rank, self.factor)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by; of `oft` the limit of a turn."""
        return lycoris.scale(self.kind, self._rows, self.alpha)

    @property
    def is_scaled(self) -> bool:
        """Whether alpha is divided by the rank; `oft` and a `lokr` of whole factors have none."""
        return lycoris.rank(self._rows) is not None

    @property
    def _rows(self) -> dict[str, range]:
        return {name: range(shape[0]) for name, shape in self.shapes.items()}

    @property
    def size(self) -> int:
        """Scalars in the factors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


Adapters = dict[str, list[Adapter]]
"""Module -> its LoRAs."""


def check(lora: LoraGroup) -> None:
    """Raises UserError for a kind, a rank, an alpha or a dropout without meaning."""
    name, rank = lora.group.name, lora.rank
    if lora.kind not in forms.FORWARD:
        raise UserError(f"{name}.type: {lora.kind!r} is none of {', '.join(forms.FORWARD)}")
    if lora.factor != -1 and (lora.kind != "lokr" or lora.factor < 1):
        raise UserError(
            f"{name}.factor: {lora.factor} must be at least 1, and is of `type: lokr`; leave it out"
        )
    if rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise UserError(
            f"{name}.rank: {rank:g} is neither a whole number from 1 nor a share of the layer's "
            "width below 1"
        )
    if lora.svd and lora.kind != "lora":
        raise UserError(f"{name}.svd_init: is of `type: lora`, not of {lora.kind}; leave it out")
    if lora.svd and lora.branch:
        raise UserError(
            f"{name}.svd_init: takes a part of the weight, which prompts and negative prompts "
            "share; leave it out, or the branch"
        )
    ratio = lora.group.up_ratio
    if ratio <= 0 or (ratio != 1 and lora.kind not in WITH_UP):
        raise UserError(
            f"{name}.loraplus_lr_ratio: {ratio:g} must be more than 0, and is of the types "
            f"{', '.join(WITH_UP)}, which have a factor up; leave it out"
        )
    if lora.alpha <= 0:
        raise UserError(f"{name}.alpha: {lora.alpha:g} must be more than 0: nothing would be added")
    for key in ("dropout", "rank_dropout"):
        share = getattr(lora, key)
        if not 0 <= share < 1:
            raise UserError(f"{name}.{key}: {share:g} must be from 0 to below 1")
        if share and lora.kind in WITHOUT_DROPOUT:
            raise UserError(f"{name}.{key}: {lora.kind} has nothing that it could drop; use 0")


def describe(own: Sequence[Adapter]) -> str:
    """A group's adapters in words, by kind: how many, their ranks and scales."""
    texts = []
    for kind in dict.fromkeys(one.kind for one in own):
        these = [one for one in own if one.kind == kind]
        texts.append(f"{'LoRAs' if kind == 'lora' else kind} of {len(these)} layers")
        if kind == "oft":
            sides = [one.shapes["oft_blocks"][1] for one in these]
            texts.append(f"blocks of {_span(sides)} channels, limit {_span([these[0].alpha])}")
        elif scaled := [one for one in these if one.is_scaled]:
            ranks, scales = ([getattr(one, what) for one in scaled] for what in ("rank", "scale"))
            texts.append(f"rank {_span(ranks)}, scale {_span(scales)} (alpha / rank)")
            if any(one.svd for one in these):
                texts.append("begun by SVD")
        if kind == "lokr" and (whole := sum(not one.is_scaled for one in these)):
            texts.append(f"both factors whole in {whole}, where rank and alpha have no influence")
        if these[0].branch:
            texts.append(f"for {'prompts' if these[0].branch == 'p' else 'negative prompts'} alone")
    return ", ".join(texts)


def _span(values: Sequence[float]) -> str:
    return " to ".join(f"{value:g}" for value in dict.fromkeys((min(values), max(values))))


def choose(lora: LoraGroup, names: Sequence[str], shapes: Mapping[str, Any]) -> Adapters:
    """The LoRAs of a group.

    Args:
        lora: the group.
        names: of all weights of its network.
        shapes: module -> shape of its weight, for the layers that can have a LoRA.

    Raises:
        UserError: a pattern matches nothing, or nothing that can have a LoRA.
    """
    check(lora)
    where, chosen = f"{lora.group.name}.layers", {}
    for pattern in lora.group.layers:
        taken = {*patterns.match([pattern], names, where)}
        modules = [module for module in shapes if f"{module}.weight" in taken]
        if not modules:
            raise UserError(
                f"{where}: {pattern!r} matches no linear layer and no convolution; others cannot "
                "have a LoRA"
            )
        chosen |= dict.fromkeys(modules)
    if not chosen:
        raise UserError(f"{where}: no layers; name some")
    if lora.kind == "locon" and not any(forms.has_kernel(shapes[module]) for module in chosen):
        raise UserError(
            f"{lora.group.name}.type: locon differs from lora in convolutions over several pixels, "
            f"and {where} has none; use lora"
        )
    made = {
        module: [_adapter(lora, tuple(shapes[module]))] for module in shapes if module in chosen
    }
    for module, (own,) in made.items():
        if own.svd and own.rank > (most := min(own.shape[0], math.prod(own.shape[1:]))):
            raise UserError(
                f"{lora.group.name}.svd_init: {module} has no more than {most} singular values, "
                f"and the rank is {own.rank}; lower it, or leave the layer out"
            )
    return made


def _adapter(lora: LoraGroup, shape: tuple[int, ...]) -> Adapter:
    rank = int(lora.rank) if lora.rank >= 1 else max(round(shape[0] * lora.rank), 1)
    kind = lora.kind
    if kind == "locon" and not forms.has_kernel(shape):
        kind = "lora"
    return Adapter(
        lora.group.name,
        shape,
        rank,
        lora.alpha,
        lora.dropout,
        kind,
        lora.rank_dropout,
        lora.factor,
        lora.svd,
        lora.branch,
    )


def join(before: Sequence[Adapter], added: Sequence[Adapter], module: str) -> list[Adapter]:
    """All LoRAs of a layer.

    Raises:
        UserError: one is of a kind of which a layer has no more than one.
    """
    every = [*before, *added]
    other = ["svd_init" if one.svd else one.kind for one in every if one.kind != "lora" or one.svd]
    if len(every) > 1 and other:
        raise UserError(
            f"{added[0].group}: {module} has an adapter of {before[0].group} already, and only "
            f"those of `type: lora` add up, {other[0]} does not; choose other layers, or give "
            f"{added[0].group} `replaces: true`"
        )
    return every


def _named(adapters: Adapters) -> Iterator[tuple[str, Adapter]]:
    for module, own in adapters.items():
        for number, adapter in enumerate(own):
            yield f"{module}.lora.{number}", adapter


def shapes(adapters: Adapters) -> dict[str, tuple[int, ...]]:
    """Factor -> its shape."""
    return {
        f"{name}.{factor}": shape
        for name, adapter in _named(adapters)
        for factor, shape in adapter.shapes.items()
    }


def labels(adapters: Adapters) -> dict[str, str]:
    """Factor -> name of its group."""
    return {
        f"{name}.{factor}": adapter.group
        for name, adapter in _named(adapters)
        for factor in adapter.shapes
    }


def dropout_keys(adapters: Adapters) -> list[str]:
    """Names of the keys that say what is dropped; a new one for each is wanted in every step."""
    return [
        f"{name}.key"
        for name, adapter in _named(adapters)
        if adapter.dropout or adapter.rank_dropout
    ]


def at_rest(adapters: Adapters) -> Adapters:
    """The same LoRAs, of which nothing is dropped."""
    return {
        module: [adapter._replace(dropout=0.0, rank_dropout=0.0) for adapter in own]
        for module, own in adapters.items()
    }


def attach(network: Any, adapters: Adapters) -> Any:
    """The network (as built, without weights) with LoRAs beside its layers."""
    for module, own in adapters.items():
        made = [forms.Adapter(a.kind, a.shapes, a.scale, a.dropout, a.rank_dropout) for a in own]
        forms.adapt(network, module, made)
    return network


def begin(adapters: Adapters, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Factors that begin as the largest part of a layer's weight, float32: its first singular
    vectors, the values shared out evenly; Meng et al. 2024 (https://arxiv.org/abs/2404.02948)."""
    made = {}
    for name, adapter in _named(adapters):
        if adapter.svd:
            host = np.asarray(weights[f"{name.rpartition('.lora.')[0]}.weight"], np.float32)
            low = extract(host, np.float32(0), adapter.rank)
            share = np.float32(math.sqrt(adapter.scale))
            made |= {f"{name}.down": low.down / share, f"{name}.up": low.up / share}
    return made


def hosts(
    adapters: Adapters, begun: Mapping[str, np.ndarray], weights: Mapping[str, Any]
) -> dict[str, Any]:
    """A network's weights less what its LoRAs begin as, which takes their place."""
    changed = dict(weights)
    for module, own in adapters.items():
        if own[0].svd:
            name, weight = f"{module}.weight", np.asarray(weights[f"{module}.weight"])
            part = _begun(module, own[0], begun).delta().reshape(weight.shape)
            changed[name] = weight.astype(np.float32) - part
    return changed


def _begun(module: str, adapter: Adapter, begun: Mapping[str, np.ndarray]) -> LowRank:
    down, up = (begun[f"{module}.lora.0.{which}"] for which in ("down", "up"))
    return LowRank(down, up, adapter.alpha)


def init(
    adapters: Adapters,
    seed: int,
    weights: Mapping[str, Any] | None = None,
    begun: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Factors before step 1, float32: those that change nothing, beside `hosts`. Each is drawn from
    the seed and its name; what `dora` begins with are norms of the network's weights; `begun` has
    those of an SVD."""
    made = {}
    for name, adapter in _named(adapters):
        for factor, shape in adapter.shapes.items():
            full = f"{name}.{factor}"
            if full in begun:
                made[full] = begun[full]
                continue
            random = np.random.default_rng([seed, zlib.crc32(_stream(name, factor).encode())])
            if factor == "dora_scale":
                assert weights is not None
                host = np.asarray(weights[f"{name.rpartition('.lora.')[0]}.weight"], np.float32)
                axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
                made[full] = np.sqrt(np.sum(host**2, axis=axes, keepdims=True))
            elif factor in UNIFORM:
                bound = 1 / math.sqrt(math.prod(shape[1:]))
                made[full] = random.uniform(-bound, bound, shape).astype(np.float32)
            elif factor in NORMAL:
                made[full] = random.normal(0, NORMAL[factor], shape).astype(np.float32)
            else:
                made[full] = np.zeros(shape, np.float32)
    return made


def _stream(name: str, factor: str) -> str:
    """What a factor's numbers are drawn from: `down` from the adapter's name, as it always was."""
    return name if factor == "down" else f"{name}.{factor}"


def result(
    adapters: Adapters,
    factors: Mapping[str, Any],
    begun: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, LowRank | Change]:
    """What was trained as a network's LoRA: module -> factors.

    Several LoRAs of one layer become one whose rank is the sum of theirs; so does one that began as
    a part of the weight, less that part: it belongs to the weights as they were.
    """
    lora: dict[str, LowRank | Change] = {}
    for module, own in adapters.items():
        if own[0].kind != "lora":
            named = {name: np.asarray(factors[f"{module}.lora.0.{name}"]) for name in own[0].shapes}
            lora[module] = Change(own[0].kind, named, own[0].alpha)
            continue
        rank = sum(adapter.rank * (1 + adapter.svd) for adapter in own)
        downs, ups = (
            [np.asarray(factors[f"{module}.lora.{n}.{which}"]) for n in range(len(own))]
            for which in ("down", "up")
        )
        ups = [up * np.float32(a.scale / own[0].scale) for a, up in zip(own, ups, strict=True)]
        if own[0].svd:
            before = _begun(module, own[0], begun)
            downs, ups = [*downs, before.down], [*ups, -before.up]
        lora[module] = LowRank(
            np.concatenate(downs), np.concatenate(ups, axis=1), own[0].scale * rank
        )
    return lora
