"""Stable Diffusion as one safetensors file: what AUTOMATIC1111's webui and ComfyUI load.

`webui_names` has the keys, and the forms of the few weights that lie in the file differently.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import gallery, params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import families, ldm_config, modelspec
from jaxft.formats.diffusers_folder import Configs, Model, shapes
from jaxft.formats.families import Family
from jaxft.formats.webui_names import PREFIXES, Form, Place, names

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
        *("posterior_mean_coef1", "posterior_mean_coef2", "global_step", "v_pred", "ztsnr"),
        *("denoiser.sigmas", "edm_mean", "edm_std"),
    ]
)
"""Constants of the schedule and of training, and marks of the prediction type."""

IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.")
"""Averages of the UNet's weights, and the discriminator that the VAE was trained against."""

IGNORED_OF_TEXT = (
    *("text_model.embeddings.position_ids", "text_projection.weight", "text_projection"),
    *("logit_scale", "attn_mask"),
)
"""Beneath a text encoder's prefix: constants, and CLIP's weights that images do not need."""

MARKS = {
    "conditioner.embedders.0.model.": families.REFINER,
    "conditioner.": families.SDXL,
    "cond_stage_model.model.": families.SD2,
    "cond_stage_model.transformer.": families.SD1,
}
"""Beginning of keys that only a family's files have -> the family; the first that is there."""

OTHER_MODELS = {
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
    "model.diffusion_model.double_blocks.": "a Flux model",
    "control_model.": "a ControlNet (see `jaxft convert controlnet`)",
    "lora_": "a LoRA",
    "lora:": "a LoRA in HCP-Diffusion's form",
    "base_model.model.": "a LoRA in PEFT's form",
    "base:": "a part file of HCP-Diffusion",
    "emb_params": "an embedding",
    "clip_l": "an embedding",
}
"""Beginnings of keys that give away what a file is instead."""

CONFIGS = "jaxft.configs"
"""Metadata key of the configurations in our files, JSON: folder (and `scheduler`) -> its object."""

VELOCITY_IN_YAML = re.compile(r"""parameterization["']?\s*:\s*["']?(v|eps)\b""")
"""What a YAML file beside a model says of it."""

ROWS = (Form.FIRST_ROWS, Form.SECOND_ROWS, Form.THIRD_ROWS)


class Weights(NamedTuple):
    """What a file holds, under diffusers' names, dtype as stored."""

    parts: dict[str, dict[str, Any]]
    """Folder of the network -> its weights."""
    ignored: list[str]
    """The file's keys that are no weights of the networks."""


class Joined:
    """Weights that lie one below the other in the file; made into one when they are written."""

    def __init__(self, rows: Sequence[Any]):
        self._rows = rows
        self.dtype = rows[0].dtype
        self.shape = (sum(len(part) for part in rows), *rows[0].shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._rows, dtype=dtype, casting="unsafe")


def to_webui(model: Model) -> dict[str, Any]:
    """The model's weights under the file's keys and in its forms; arrays are shared."""
    pieces: dict[str, dict[Form, Any]] = {}
    for name, place in names(model.family, model.configs.parts).items():
        part, _, rest = name.partition(".")
        pieces.setdefault(place.key, {})[place.form] = model.parts[part].params[rest]
    stored = {key: _put(forms) for key, forms in pieces.items()}
    for part in model.family.openclip:
        prefix = model.family.text_prefixes[part]
        dtype = stored[f"{prefix}ln_final.weight"].dtype
        stored[f"{prefix}logit_scale"] = np.ones((), dtype)
        if f"{prefix}text_projection" not in stored:
            stored |= _last_block(stored, model.parts[part].config, prefix)
    return stored


def _put(forms: Mapping[Form, Any]) -> Any:
    """A tensor of the file from the weights that it is made of."""
    if len(forms) > 1:
        return Joined([forms[form] for form in ROWS])
    ((form, weight),) = forms.items()
    if form is Form.CONV:
        return weight[:, :, None, None]
    return weight.T if form is Form.TRANSPOSED else weight


def _take(form: Form, tensor: Any) -> Any:
    """A weight from the tensor of the file that it is in."""
    if form in ROWS:
        size = len(tensor) // len(ROWS)
        start = ROWS.index(form) * size
        return tensor[start : start + size]
    if form is Form.CONV:
        return tensor.reshape(tensor.shape[:2])
    return tensor.T if form is Form.TRANSPOSED else tensor


def _last_block(
    stored: Mapping[str, Any], config: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """What Stable Diffusion 2.x's file has and its diffusers folder lacks, so that nothing is
    reported missing: the last of OpenCLIP's blocks, which is never run, and its projection."""
    count, width = config["num_hidden_layers"], config["hidden_size"]
    last, more = (f"{prefix}transformer.resblocks.{i}." for i in (count - 1, count))
    copied = {
        more + key.removeprefix(last): array
        for key, array in stored.items()
        if key.startswith(last)
    }
    dtype = stored[f"{prefix}ln_final.weight"].dtype
    return copied | {f"{prefix}text_projection": np.eye(width, dtype=dtype)}


def write(
    path: Path,
    model: Model,
    dtype: str | None = "fp16",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the model as one file, its configurations and ModelSpec's metadata in the header.

    Beside one of Stable Diffusion 1.x or 2.x that predicts velocities a YAML file says so.

    Args:
        path: the file; the model gets its name.
        model: what to write.
        dtype: `fp32`, `fp16` or `bf16`; `None` keeps each weight as it is stored.
        metadata: more texts for the header.

    Raises:
        UserError: the YAML file would replace one of the user's.
    """
    beside = path.with_suffix(".yaml")
    needs_yaml = predicts_velocity(model) and not model.family.is_xl
    if needs_yaml and beside.exists() and not ldm_config.is_ours(beside):
        raise UserError(
            f"{beside} is in the way: webuis look there for what {path.name} predicts; name the "
            "model otherwise"
        )
    stored = to_webui(model) | _marks(model)
    texts = modelspec.header(model.configs, path.stem)
    texts[CONFIGS] = configs_text(model.configs.parts | {"scheduler": model.scheduler})
    tensor_file.write(path, stored, texts | dict(metadata or {}), dtype and params.DTYPES[dtype])
    if needs_yaml:
        gallery.write_text(beside, ldm_config.text(model.configs))
    elif beside.is_file() and ldm_config.is_ours(beside):
        beside.unlink()  # of a model that was there before


def predicts_velocity(model: Model) -> bool:
    """Whether the UNet predicts velocities, not noise."""
    return model.scheduler.get("prediction_type") == "v_prediction"


def _marks(model: Model) -> dict[str, Any]:
    """Empty tensors by which webuis know an XL model that predicts velocities."""
    marks = {}
    if model.family.is_xl and predicts_velocity(model):
        marks["v_pred"] = np.zeros(0, np.float32)
        if model.scheduler.get("rescale_betas_zero_snr"):
            marks["ztsnr"] = np.zeros(0, np.float32)
    return marks


def configs_text(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Configurations as JSON, without the paths and versions of who made them."""
    return json.dumps(
        {
            name: {k: v for k, v in config.items() if k == "_class_name" or k[0] != "_"}
            for name, config in configs.items()
        }
    )


def configs_in_header(path: Path) -> dict[str, dict[str, Any]] | None:
    """The configurations that jaxft put into a file's header; None in a file of others.

    Raises:
        UserError: they are damaged.
    """
    if path.suffix != ".safetensors":
        return None
    text = tensor_file.read_header(path).metadata.get(CONFIGS)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {CONFIGS} in its header is no JSON ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(f"{path}: {CONFIGS} in its header holds no configurations")
    return content


def detect(keys: Mapping[str, Any], source: str) -> Family:
    """The family of a file, from its keys.

    Raises:
        UserError: it is something else; says what.
    """
    for prefix, kind in OTHER_MODELS.items():
        if any(key.startswith(prefix) for key in keys):
            raise UserError(f"{source}: this is {kind}, not a Stable Diffusion model in one file")
    held = {
        what: any(key.startswith(prefix) for key in keys)
        for what, prefix in {"UNet": PREFIXES["unet"], "VAE": PREFIXES["vae"]}.items()
    }
    family = next((f for mark, f in MARKS.items() if any(k.startswith(mark) for k in keys)), None)
    if family and all(held.values()):
        return family
    held[f"text encoder of {family.title}" if family else "text encoder"] = family is not None
    has = " and ".join(what for what, there in held.items() if there)
    if not has:
        raise UserError(f"{source}: is no Stable Diffusion model in one file")
    lacks = " and no ".join(what for what, there in held.items() if not there)
    raise UserError(f"{source}: has a {has} and no {lacks}; get the file of the whole model")


def prediction(path: Path, stored: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a file's UNet predicts (`epsilon`, `v_prediction`), and what says so.

    None where nothing does.
    """
    beside = path.with_suffix(".yaml")
    if beside.is_file() and (
        found := VELOCITY_IN_YAML.search(beside.read_text("utf-8", "replace"))
    ):
        return ("v_prediction" if found[1] == "v" else "epsilon"), f"parameterization in {beside}"
    if "v_pred" in stored:
        return "v_prediction", "the key v_pred"
    metadata = tensor_file.read_header(path).metadata if path.suffix == ".safetensors" else {}
    if told := metadata.get("modelspec.prediction_type"):
        return ("v_prediction" if told.startswith("v") else "epsilon"), f"its metadata ({told})"
    return None


def read(path: Path, configs: Configs) -> Weights:
    """Reads a file's weights; the file has no configurations, so they are given.

    Raises:
        UserError: the file is not readable, is of another family, or lacks weights, or has ones
            that the configurations do not, or of another shape (each is listed).
    """
    return from_tensors(tensor_file.read(path), configs, str(path))


def from_tensors(stored: dict[str, Any], configs: Configs, source: str) -> Weights:
    """The weights in a file's tensors; see `read`."""
    family = detect(stored, source)
    if family != configs.family:
        raise UserError(
            f"{source}: this is a {family.title}, and the configurations are those of a "
            f"{configs.family.title}"
        )
    known = {
        f"{part}.{name}": leaf
        for part, network in configs.family.networks.items()
        for name, leaf in shapes(network, configs.parts[part]).items()
    }
    table = names(family, configs.parts)
    for place in table.values():
        alias = next((other for other in ALIASES.get(place.key, ()) if other in stored), None)
        if place.key not in stored and alias:
            stored[place.key] = stored.pop(alias)
    ignored = _ignored(stored, family, configs, {place.key for place in table.values()})
    for key in ignored:
        del stored[key]
    params.check(stored, _expected(table, known, stored), source)

    parts: dict[str, dict[str, Any]] = {part: {} for part in configs.parts}
    for name, place in table.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = _take(place.form, stored[place.key])
    return Weights(parts, ignored)


def _ignored(
    stored: Mapping[str, Any], family: Family, configs: Configs, known: set[str]
) -> list[str]:
    """The file's keys that are no weights of the networks."""
    constants = set(IGNORED)
    prefixes: list[str] = [*IGNORED_PREFIXES]
    for part, prefix in family.text_prefixes.items():
        constants |= {prefix + name for name in IGNORED_OF_TEXT}
        if part in family.openclip:  # a block more than are run
            count = configs.parts[part]["num_hidden_layers"]
            prefixes.append(f"{prefix}transformer.resblocks.{count}.")
    found = (key for key in stored if key in constants or key.startswith(tuple(prefixes)))
    return sorted(key for key in found if key not in known)


def _expected(
    table: Mapping[str, Place], known: params.Shapes, stored: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Keys and shapes of a file with these weights; a convolution also as a matrix."""
    expected = {}
    for name, (key, form) in table.items():
        shape, dtype = known[name].shape, known[name].dtype
        if form is Form.CONV and (key not in stored or stored[key].ndim != 2):
            shape = (*shape, 1, 1)
        elif form in ROWS:
            shape = (len(ROWS) * shape[0], *shape[1:])
        elif form is Form.TRANSPOSED:
            shape = shape[::-1]
        expected[key] = jax.ShapeDtypeStruct(shape, dtype)
    return expected
