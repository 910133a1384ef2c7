"""Folders that the Flax models of diffusers wrote, until its release 0.35: read, never written.

    unet/diffusion_flax_model.msgpack   vae/diffusion_flax_model.msgpack
    text_encoder/flax_model.msgpack

Their configurations are those of the PyTorch models. Weights lie transposed (`kernel` [in, out] and
HWIO) under names in which numbers are joined to the word before them (`down_blocks_0`).
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from jaxft import params
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, families, layout
from jaxft.formats.diffusers_folder import Component, Model

FILES = {
    "unet": "diffusion_flax_model.msgpack",
    "vae": "diffusion_flax_model.msgpack",
    "text_encoder": "flax_model.msgpack",
}
FLAX_OPTIONS = {"dtype", "split_head_dim", "use_memory_efficient_attention"}
"""Of configurations: how those models computed, not what."""

VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of the VAE's attention, now and then."""


def is_one(folder: Path) -> bool:
    """Whether a folder holds Flax weights."""
    return any((folder / part / file).is_file() for part, file in FILES.items())


def read(folder: Path) -> Model:
    """Reads a pipeline whole.

    Raises:
        UserError: a file is missing or damaged, or weights and configuration disagree.
    """
    configs = {part: _config(folder, part) for part in FILES}
    family = families.of_configs(configs, str(folder))
    parts = {}
    for part, network in family.networks.items():
        expected = diffusers_folder.shapes(network, configs[part])
        parts[part] = Component(
            configs[part], _weights(folder / part / FILES[part], part, expected)
        )
    scheduler = layout.read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler["_class_name"] = scheduler.get("_class_name", "PNDMScheduler").removeprefix("Flax")
    return Model(family, parts, scheduler, {"text_encoder": folder / "tokenizer"}, folder)


def _config(folder: Path, part: str) -> dict[str, Any]:
    config = layout.read_json(folder / part / "config.json")
    if "_class_name" in config:
        config["_class_name"] = config["_class_name"].removeprefix("Flax")
    return {key: value for key, value in config.items() if key not in FLAX_OPTIONS}


def _weights(path: Path, part: str, expected: params.Shapes) -> dict[str, np.ndarray]:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # msgpack raises a dozen kinds
        raise UserError(f"{path}: not a readable Flax file ({error})") from None
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(tree))
    stored = {".".join(path): leaf for path, leaf in flat.items()}
    found = {}
    for name, leaf in expected.items():
        key = flax_name(name, len(leaf.shape), part)
        if key in stored:
            found[name] = _transposed(stored.pop(key), key)
    params.check(found | stored, expected, str(path))
    return found


def flax_name(name: str, rank: int, part: str) -> str:
    """Where a weight of PyTorch's name and number of axes is in the Flax model's tree."""
    module, _, leaf = name.rpartition(".")
    matrix = "kernel"
    if part == "text_encoder":
        matrix = "embedding" if "embedding" in module else "kernel"
    if leaf == "weight":
        leaf = "scale" if rank == 1 else matrix
    if part == "text_encoder":
        return f"{module}.{leaf}"
    if part == "vae":
        for now, then in VAE_ATTENTION.items():
            if module.endswith(f"mid_block.attentions.0.{now}"):
                module = module.removesuffix(now) + then
    return f"{re.sub(r'[.]([0-9]+)', lambda number: '_' + number[1], module)}.{leaf}"


def _transposed(array: np.ndarray, key: str) -> np.ndarray:
    """A weight in PyTorch's layout."""
    if not key.endswith("kernel"):
        return array
    return np.ascontiguousarray(array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0)))
