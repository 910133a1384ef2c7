"""Stable Diffusion 1.x as one safetensors file: what AUTOMATIC1111's webui and ComfyUI load.

`webui_names` has the keys. Eight tensors also change form: `VAE_CONVS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import params
from jaxft.errors import UserError
from jaxft.formats.diffusers_folder import NETWORKS, Configs, Model, shapes
from jaxft.formats.sd15 import SD15
from jaxft.formats.webui_names import names

VAE_CONVS = frozenset(
    f"vae.{half}.mid_block.attentions.0.{layer}.weight"
    for half in ("encoder", "decoder")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
)
"""Linear [c, c] in diffusers, 1x1 convolution [c, c, 1, 1] in the file. No others differ."""

ALIASES = {
    f"first_stage_model.{half}.mid.attn_1.{name}.{leaf}": tuple(
        f"first_stage_model.{half}.mid.attn_1.{other}.{leaf}" for other in others
    )
    for half in ("encoder", "decoder")
    for leaf in ("weight", "bias")
    for name, others in {
        "norm": ("group_norm",),
        "q": ("query", "to_q"),
        "k": ("key", "to_k"),
        "v": ("value", "to_v"),
        "proj_out": ("proj_attn", "to_out.0"),
    }.items()
}
"""What converters leave in a file if the VAE's names were newer (or older) than they knew."""

IGNORED = frozenset(
    [
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "logvar", "scale_factor"),
        *("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped"),
        *("posterior_mean_coef1", "posterior_mean_coef2", "global_step"),
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.logit_scale",
        "cond_stage_model.text_projection",
        "cond_stage_model.logit_scale",
    ]
)
"""Keys without a weight of the three: constants of the schedule, of training, of CLIP."""

IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.")
"""Averages of the UNet's weights, and the discriminator that the VAE was trained against."""

OTHER_MODELS = {
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "conditioner.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "lora_": "LoRA",
}
"""Beginnings of keys that give away what a file is instead."""


class Weights(NamedTuple):
    """What a file holds, under diffusers' names, dtype as stored."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    ignored: list[str]
    """The file's keys that are no weights of the three."""


def to_webui(model: Model) -> dict[str, Any]:
    """The model's weights under the file's keys and in its forms; arrays are shared."""
    table = names(model.unet.config, model.vae.config, model.text_encoder.config)
    stored = {
        f"{part}.{name}": array
        for part in NETWORKS
        for name, array in getattr(model, part).params.items()
    }
    return {
        key: stored[name][:, :, None, None] if name in VAE_CONVS else stored[name]
        for name, key in table.items()
    }


def write(path: Path, model: Model, dtype: str | None = "fp16", title: str = "") -> None:
    """Writes the model as one file, with ModelSpec 1.0.1 metadata.

    Args:
        path: the file.
        model: what to write.
        dtype: `fp32`, `fp16` or `bf16`; `None` keeps each weight as it is stored.
        title: the model's name; the file's, if empty.

    Raises:
        UserError: the model is no Stable Diffusion 1.x.
    """
    stored = to_webui(model)
    if dtype is not None:
        stored = params.cast(stored, params.DTYPES[dtype])
    params.save(path, stored, _metadata(model, title or path.stem))


def _metadata(model: Model, title: str) -> dict[str, str]:
    """https://github.com/Stability-AI/ModelSpec; no date, so that equal models stay equal."""
    scale = 2 ** (len(model.vae.config["block_out_channels"]) - 1)
    size = scale * model.unet.config.get("sample_size", 64)
    is_v = model.scheduler.get("prediction_type") == "v_prediction"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if is_v else "epsilon",
    }


def read(path: Path, configs: Configs = SD15) -> Weights:
    """Reads a file's weights; the file has no configurations, so they are given.

    Raises:
        UserError: the file is not readable, or lacks weights, or has ones that the
            configurations do not, or of another shape (each is listed).
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read, no pickled checkpoints")
    stored = params.load(path)
    for prefix, kind in OTHER_MODELS.items():
        if any(key.startswith(prefix) for key in stored):
            raise UserError(f"{path}: this is a {kind} file; jaxft reads Stable Diffusion 1.x")
    table = names(configs.unet, configs.vae, configs.text_encoder)
    for key in table.values():
        alias = next((other for other in ALIASES.get(key, ()) if other in stored), None)
        if key not in stored and alias:
            stored[key] = stored.pop(alias)
    ignored = sorted(k for k in stored if k in IGNORED or k.startswith(IGNORED_PREFIXES))
    for key in ignored:
        del stored[key]
    params.check(stored, _expected(table, configs, stored), str(path))

    found: dict[str, dict[str, Any]] = {part: {} for part in NETWORKS}
    for name, key in table.items():
        part, _, rest = name.partition(".")
        array = stored.pop(key)
        found[part][rest] = array.reshape(array.shape[:2]) if name in VAE_CONVS else array
    return Weights(**found, ignored=ignored)


def _expected(
    table: Mapping[str, str], configs: Configs, stored: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Keys and shapes of a file with these configurations; a VAE_CONVS one also as linear."""
    known = {
        f"{part}.{name}": shape
        for part in NETWORKS
        for name, shape in shapes(part, getattr(configs, part)).items()
    }
    expected = {}
    for name, key in table.items():
        is_conv = name in VAE_CONVS and (key not in stored or stored[key].ndim != 2)
        shape, dtype = known[name].shape, known[name].dtype
        expected[key] = jax.ShapeDtypeStruct((*shape, 1, 1), dtype) if is_conv else known[name]
    return expected
