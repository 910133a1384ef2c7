"""`train.warm_start`: what earlier runs left in `ckpts/`, put where this run begins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft import merging, tensor_file
from jaxft.errors import UserError
from jaxft.formats import embeddings, lora
from jaxft.formats.diffusers_folder import Model
from jaxft.low_rank import LowRank
from jaxft.lycoris import Change
from jaxft.merging import MERGED, Addition
from jaxft.selection import Selection, has_branches
from jaxft.tuning.adapters import Adapter

KEY = "train.warm_start"


class Begun(NamedTuple):
    """What a run begins with besides its model."""

    model: Model
    """With the weights of the files."""
    loras: dict[tuple[str, str], tuple[str, LowRank | Change]]
    """(network, module) -> file, and the factors that are trained on."""
    words: dict[str, np.ndarray]
    """Word -> its rows [n, d], float32."""
    notices: list[str]


def read(options: Any, model: Model) -> Begun:
    """The files that `options`, `train.warm_start`, name.

    Raises:
        UserError: a file is unreadable, of another model, or has nothing to begin with.
    """
    begun = Begun(model, {}, {}, [])
    for kind, networks in MERGED.items():
        for path in options[kind]:
            try:
                begun = _with(begun, path, networks, f"{KEY}.{kind}: {path}")
            except UserError as error:
                raise UserError(f"{KEY}.{kind}: {error}") from None
    widths = embeddings.widths(model.configs)
    for word, path in options.words.items():
        rows = embeddings.from_tensors(tensor_file.read(Path(path)), f"{KEY}.words.{word}: {path}")
        embeddings.check(rows, widths, f"{KEY}.words.{word}: {path}")
        begun.words[word] = rows
    return begun


def _with(begun: Begun, path: str, networks: Sequence[str], where: str) -> Begun:
    """What there is so far, with a file's weights and LoRAs of some networks."""
    told, model = [], begun.model
    keys = tensor_file.read_header(Path(path)).tensors
    weights = sum(key.startswith("base:") for key in keys)
    if weights:
        model = merging.merge_parts(model, [Addition(path)], networks=networks)
        told.append(f"{weights} weights")
    if not weights or any(key.startswith("lora:") for key in keys):
        found = {
            (network, module): (path, low)
            for network, layers in lora.read(Path(path), model.configs).items()
            for module, low in layers.items()
            if network in networks
        }
        if not found:
            raise UserError(f"{path}: has no LoRA of {' or '.join(networks)}")
        if twice := sorted(found.keys() & begun.loras.keys()):
            other, _ = begun.loras[twice[0]]
            raise UserError(f"{path}: {twice[0][1]} has its LoRA from {other} already; leave one")
        begun.loras.update(found)
        told.append(f"the LoRAs of {len(found)} layers")
    return begun._replace(
        model=model, notices=[*begun.notices, f"{where}: begins with {' and '.join(told)}"]
    )


def select(selection: Selection, begun: Begun) -> Selection:
    """The selection whose LoRAs begin with the factors of the files.

    Raises:
        UserError: lists the layers whose LoRAs are not those of the configuration; or there are
            rows of a word that is not trained.
    """
    for word in begun.words:
        if word not in selection.labels.get("words", {}):
            raise UserError(
                f"{KEY}.words.{word}: no word {word!r} is trained (tokenizer_pt.train); words that "
                "prompts only say lie in tokenizer_pt.emb_dir"
            )
    if not begun.loras:
        return selection
    if has_branches(selection):
        raise UserError(
            f"{KEY}: a file does not say of which branch its LoRAs are; take the branches out of "
            "lora_unet and lora_text_encoder, or begin anew"
        )
    factors: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for (network, module), (path, low) in begun.loras.items():
        adapters = selection.adapters.get(network, {}).get(module, [])
        if problem := _misfit(adapters, low):
            problems.append(f"{path}: {network}: {module}: {problem}")
        else:
            factors.setdefault(f"lora_{network}", {}).update(_factors(module, adapters, low))
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError(
            f"{KEY}: the LoRAs of its files are not those of lora_unet and lora_text_encoder; make "
            "them the same, or merge the files into the model before:\n  "
            + "\n  ".join([*problems[:8], *more])
        )
    new = sum(
        (network, module) not in begun.loras
        for network, own in selection.adapters.items()
        for module in own
    )
    notices = [f"{KEY}: the LoRAs of {new} layers are in no file, and begin anew"] if new else []
    return selection._replace(begun=factors, notices=[*selection.notices, *notices])


def _misfit(adapters: Sequence[Adapter], low: LowRank | Change) -> str | None:
    """How a layer's LoRAs differ from what a file has for it."""
    if not adapters:
        return "the configuration has no LoRA there"
    if any(adapter.svd for adapter in adapters):
        return f"{adapters[0].group}.svd_init begins as a part of the weight; leave it out"
    first, kind = adapters[0], low.kind if isinstance(low, Change) else "lora"
    if first.kind != kind:
        return f"{first.group}.type is {first.kind}, the file has {kind}"
    rank = sum(adapter.rank for adapter in adapters)
    if isinstance(low, LowRank) and low.rank != rank:
        return f"{first.group}.rank makes {rank} ranks, the file has {low.rank}"
    if isinstance(low, Change):
        shapes = {name: np.shape(value) for name, value in low.factors.items()}
        if shapes != first.shapes:
            return f"{first.group}.rank or .factor makes {first.shapes}, the file has {shapes}"
    if not np.isclose(low.scale, first.scale, rtol=1e-3):  # alphas may be stored as float16
        return f"{first.group}.alpha makes a scale of {first.scale:g}, the file has {low.scale:g}"
    return None


def _factors(
    module: str, adapters: Sequence[Adapter], low: LowRank | Change
) -> Mapping[str, np.ndarray]:
    """A layer's factors as training has them; several LoRAs share the ranks of the file's one."""
    name = f"{module}.lora"
    if isinstance(low, Change):
        whole = {f"{name}.0.{factor}": value for factor, value in low.factors.items()}
        return {factor: np.asarray(value, np.float32) for factor, value in whole.items()}
    made, start = {}, 0
    for number, adapter in enumerate(adapters):
        rows = slice(start, start := start + adapter.rank)
        share = np.float32(adapters[0].scale / adapter.scale)
        down = np.asarray(low.down[rows], np.float32)
        up = np.asarray(low.up[:, rows], np.float32) * share
        for factor, value in (("down", down), ("up", up)):
            made[f"{name}.{number}.{factor}"] = value.reshape(adapter.shapes[factor])
    return made
