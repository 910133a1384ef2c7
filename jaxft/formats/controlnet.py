"""ControlNets: diffusers' folder, and the single file that webuis read.

    config.json   diffusion_pytorch_model.safetensors

In the file the names are those of the original program (`control_model.input_blocks.1.0…`), as
long as the ControlNet belongs to Stable Diffusion 1.x or 2.x; those for XL were never published so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from jaxft import gallery, params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import layout, modelspec, published, webui
from jaxft.formats.diffusers_folder import Component, shapes
from jaxft.formats.webui_names import Pairs, layer, way_down
from jaxft.models import encoder
from jaxft.models.controlnet import FREE, ControlNetModel

PREFIX = "control_model."
STEM = "diffusion_pytorch_model"
CONTEXT = f"{PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
"""The layer whose columns are the width of the text encoder."""

HINT = "controlnet_cond_embedding"
"""What brings the image to the latents' size."""

HINT_WIDTHS = "conditioning_embedding_out_channels"
"""The option that says how wide that is."""


def names(config: Mapping[str, Any]) -> dict[str, str]:
    """Diffusers' name -> the file's key, for every weight; one to one."""
    full = {**FREE, **config}
    return {ours: PREFIX + theirs for ours, theirs in (*way_down(full), *_own(full))}


def _own(config: Mapping[str, Any]) -> Pairs:
    """What a ControlNet has and a UNet has not."""
    hint, blocks = HINT, 2 * len(config[HINT_WIDTHS]) - 2
    yield from layer(f"{hint}.conv_in", "input_hint_block.0")
    for i in range(blocks):
        yield from layer(f"{hint}.blocks.{i}", f"input_hint_block.{2 * i + 2}")
    yield from layer(f"{hint}.conv_out", f"input_hint_block.{2 * blocks + 2}")
    for i in range(len(encoder.skip_widths(SimpleNamespace(**config)))):
        yield from layer(f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0")
    yield from layer("controlnet_mid_block", "middle_block_out.0")


def from_unet(unet: Component, seed: int) -> Component:
    """A ControlNet that adds nothing yet; Zhang et al. 2023, section 3: the UNet's way down, what
    brings the image to it, drawn by a seed as PyTorch draws convolutions, and zeros behind both."""
    copied = (*encoder.FREE, *encoder.FIXED, *encoder.IGNORED, "_diffusers_version")
    config = {key: unet.config[key] for key in copied if key in unet.config}
    config |= {key: value for key, value in FREE.items() if key not in encoder.FREE}
    config |= {"_class_name": "ControlNetModel", HINT_WIDTHS: [*FREE[HINT_WIDTHS]]}
    known, rng, weights = shapes(ControlNetModel, config), np.random.default_rng(seed), {}
    for name in sorted(known):
        shape, layer = known[name].shape, name.rpartition(".")[0]
        if name in unet.params:
            weights[name] = unet.params[name]
        elif layer == f"{HINT}.conv_out" or not layer.startswith(HINT):
            weights[name] = np.zeros(shape, np.float32)
        else:
            bound = np.prod(known[f"{layer}.weight"].shape[1:]) ** -0.5
            weights[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
    return Component(config, weights)


def read_folder(folder: Path) -> Component:
    """Reads what diffusers' `ControlNetModel.save_pretrained` writes.

    Raises:
        UserError: a file is missing or unreadable, it is another network, or weights and
            configuration disagree.
    """
    config = layout.read_json(folder / "config.json")
    if (kind := config.get("_class_name")) != "ControlNetModel":
        raise UserError(f"{folder}: holds a {kind}, not a ControlNetModel")
    file = layout.weights(folder, STEM, None)
    if file is None:
        raise UserError(layout.no_weights(folder, STEM))
    stored = params.load(file)
    params.check(stored, shapes(ControlNetModel, config), str(file))
    return Component(config, stored)


def from_file(path: Path, stored: Mapping[str, Any]) -> Component:
    """A ControlNet from the tensors of a file; those of a model around it are left aside.

    Raises:
        UserError: it is something else, or its weights are not those of the configuration in its
            header or, where there is none, of a published one.
    """
    own = {key: array for key, array in stored.items() if key.startswith(PREFIX)}
    if CONTEXT not in own:
        raise UserError(
            f"{path}: is no ControlNet of Stable Diffusion 1.x or 2.x in one file (no {CONTEXT})"
        )
    config = _in_header(path) or _published(path, own[CONTEXT].shape)
    known, table = shapes(ControlNetModel, config), names(config)
    params.check(own, {table[name]: leaf for name, leaf in known.items()}, str(path))
    return Component(config, {name: own[key] for name, key in table.items()})


def _in_header(path: Path) -> dict[str, Any] | None:
    held = webui.configs_in_header(path)
    return held and held.get("controlnet")


def _published(path: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """The configuration of the ControlNets whose attention has this shape."""
    for known in published.CONTROLNETS.values():
        if shape == (known["block_out_channels"][0], known["cross_attention_dim"]):
            return known
    raise UserError(f"{path}: a ControlNet with attention of {shape} is of no published model")


def write_folder(folder: Path, component: Component, dtype: str | None = None) -> None:
    """Writes a folder that `ControlNetModel.from_pretrained` opens; an earlier one is replaced.

    Args:
        folder: where to.
        component: the ControlNet.
        dtype: `fp32`, `fp16` or `bf16`; None: as it is.

    Raises:
        UserError: there is something else in the folder.
    """
    file = folder / f"{STEM}.safetensors"
    if folder.exists() and (
        not folder.is_dir() or {path.name for path in folder.iterdir()} - {"config.json", file.name}
    ):
        raise UserError(f"{folder}: is in the way; name another folder")
    tensor_file.write(file, component.params, dtype=dtype and params.DTYPES[dtype])
    text = json.dumps(component.config, indent=2, sort_keys=True) + "\n"
    gallery.write_text(folder / "config.json", text)


def write_file(
    path: Path,
    component: Component,
    dtype: str | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes the single file.

    Args:
        path: the file.
        component: the ControlNet.
        dtype: `fp32`, `fp16` or `bf16`; None: as it is.
        metadata: more for its header.

    Raises:
        UserError: it belongs to Stable Diffusion XL.
    """
    config = {**FREE, **component.config}
    if config["addition_embed_type"]:
        raise UserError(
            f"{path}: ControlNets of Stable Diffusion XL have diffusers' names in webuis too: copy "
            f"the folder's {STEM}.safetensors"
        )
    base = published.SD21_BASE if config["use_linear_projection"] else published.SD15
    texts = modelspec.header(base, path.stem, "controlnet") | {**metadata}
    texts[webui.CONFIGS] = webui.configs_text({"controlnet": component.config})
    stored = {key: component.params[name] for name, key in names(component.config).items()}
    tensor_file.write(path, stored, texts, dtype and params.DTYPES[dtype])
