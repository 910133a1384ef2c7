"""LoRAs in training: from groups to factors beside the layers, and from trained factors to a LoRA.

A layer may have several, of different groups: they add up. Their factors are a part of what is
trained, `lora_<network>`, under the names that `models.layers.adapt` gives them in the network.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft import patterns
from jaxft.errors import UserError
from jaxft.low_rank import LowRank
from jaxft.models import layers
from jaxft.tuning.groups import Group


class LoraGroup(NamedTuple):
    """Layers that have a LoRA."""

    group: Group
    rank: float
    """From 1 a whole number; below 1 a share of the layer's output width."""
    alpha: float
    dropout: float


class Adapter(NamedTuple):
    """One LoRA of one layer."""

    group: str
    shape: tuple[int, ...]
    """Of the layer's weight."""
    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    @property
    def size(self) -> int:
        """Scalars in the factors."""
        return self.rank * (self.shape[0] + math.prod(self.shape[1:]))


Adapters = dict[str, list[Adapter]]
"""Module -> its LoRAs."""


def check(lora: LoraGroup) -> None:
    """Raises UserError for a rank, an alpha or a dropout without meaning."""
    name, rank = lora.group.name, lora.rank
    if rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise UserError(
            f"{name}.rank: {rank:g} is neither a whole number from 1 nor a share of the layer's "
            "width below 1"
        )
    if lora.alpha <= 0:
        raise UserError(f"{name}.alpha: {lora.alpha:g} must be more than 0: nothing would be added")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"{name}.dropout: {lora.dropout:g} must be from 0 to below 1")


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
    return {
        module: [_adapter(lora, tuple(shapes[module]))] for module in shapes if module in chosen
    }


def _adapter(lora: LoraGroup, shape: tuple[int, ...]) -> Adapter:
    rank = int(lora.rank) if lora.rank >= 1 else max(round(shape[0] * lora.rank), 1)
    return Adapter(lora.group.name, shape, rank, lora.alpha, lora.dropout)


def _named(adapters: Adapters) -> Iterator[tuple[str, Adapter]]:
    for module, own in adapters.items():
        for number, adapter in enumerate(own):
            yield f"{module}.lora.{number}", adapter


def labels(adapters: Adapters) -> dict[str, str]:
    """Factor -> name of its group."""
    return {
        f"{name}.{factor}": adapter.group
        for name, adapter in _named(adapters)
        for factor in ("down", "up")
    }


def dropout_keys(adapters: Adapters) -> list[str]:
    """Names of the keys that say what is dropped; a new one for each is wanted in every step."""
    return [f"{name}.key" for name, adapter in _named(adapters) if adapter.dropout]


def attach(network: Any, adapters: Adapters) -> Any:
    """The network (as built, without weights) with LoRAs beside its layers."""
    for module, own in adapters.items():
        made = [layers.LowRank(a.shape, a.rank, a.scale, a.dropout) for a in own]
        layers.adapt(network, module, made)
    return network


def init(adapters: Adapters, seed: int) -> dict[str, np.ndarray]:
    """Factors before step 1, float32: `up` is zero, `down` is uniform in ±1/√(inputs of a row).

    He et al. 2015 with a = √5, as `torch.nn.Linear` and HCP-Diffusion have it. Each is drawn from
    the seed and its name.
    """
    made = {}
    for name, adapter in _named(adapters):
        outputs, *inputs = adapter.shape
        bound = 1 / math.sqrt(math.prod(inputs))
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        down = random.uniform(-bound, bound, (adapter.rank, *inputs))
        made[f"{name}.down"] = down.astype(np.float32)
        made[f"{name}.up"] = np.zeros(
            (outputs, adapter.rank, *(1,) * (len(inputs) - 1)), np.float32
        )
    return made


def result(adapters: Adapters, factors: Mapping[str, Any]) -> dict[str, LowRank]:
    """What was trained as a network's LoRA: module -> factors.

    Several LoRAs of one layer become one whose rank is the sum of theirs.
    """
    lora = {}
    for module, own in adapters.items():
        rank = sum(adapter.rank for adapter in own)
        downs, ups = (
            [np.asarray(factors[f"{module}.lora.{n}.{which}"]) for n in range(len(own))]
            for which in ("down", "up")
        )
        ups = [up * np.float32(a.scale / own[0].scale) for a, up in zip(own, ups, strict=True)]
        lora[module] = LowRank(
            np.concatenate(downs), np.concatenate(ups, axis=1), own[0].scale * rank
        )
    return lora
