"""A webui file as a whole pipeline: what its keys, shapes and header tell of what it lacks.

The family is told by the keys. The configurations are those in the header, in files that jaxft
wrote, and else the published ones of the family, whose weights the file must then have. CLIP's
tokenizer comes with jaxft.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft import tensor_file
from jaxft.errors import UserError
from jaxft.formats import clip_tokenizer, diffusers_folder, families, layout, published, webui
from jaxft.formats.diffusers_folder import Component, Configs, Model
from jaxft.formats.families import Family
from jaxft.formats.webui_names import PREFIXES

SPREAD = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
MOST_SPREAD = 0.09
"""A trained weight of Stable Diffusion 2.x and its standard deviation, above which ComfyUI takes
the UNet to predict velocities."""

ZERO_SNR = "ztsnr"
"""The key by which a file says that its schedule ends in noise alone."""


class Opened(NamedTuple):
    """A model, and what its user should know of how it was read, a line each."""

    model: Model
    told: list[str]


def open_model(
    name_or_path: str, *, revision: str | None = None, variant: str | None = None
) -> Opened:
    """Reads a model wherever it is: a folder, a webui file, `builtin:NAME`, the Hugging Face hub.

    Args:
        name_or_path: which.
        revision: branch, tag or commit of a hub model.
        variant: of a folder's weights, see `diffusers_folder.read`.

    Raises:
        UserError: as `read` and `diffusers_folder.read`.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return read(path)
    return Opened(diffusers_folder.read(name_or_path, revision=revision, variant=variant), [])


def read(
    path: Path,
    like: str | None = None,
    load: Callable[[Path], dict[str, Any]] = tensor_file.read,
) -> Opened:
    """Reads a webui file.

    Args:
        path: the file.
        like: a diffusers folder (or hub model) of the same architecture; its configurations and
            tokenizers are taken.
        load: reads the tensors.

    Raises:
        UserError: the file is unreadable or no whole model, its architecture cannot be told, or its
            weights do not fit it.
    """
    folder = layout.locate(like) if like is not None else None
    configs = diffusers_folder.read_configs(folder) if folder else None
    tokenizers = layout.find_tokenizers(folder) if folder else None
    stored = load(path)
    family = webui.detect(stored, str(path))
    predicts, source = webui.prediction(path, stored), str(folder)
    if configs is None:
        configs, source = _in_header(path), "its header"
    if configs is None:
        predicts = predicts or _by_spread(stored, family)
        configs, source = _published(path, stored, family, predicts), "the published model's"
    own = configs.scheduler.get("prediction_type", "epsilon"), "the configuration of its scheduler"
    kind, evidence = predicts or own
    marks: dict[str, Any] = {"prediction_type": kind}
    if ZERO_SNR in stored:
        marks["rescale_betas_zero_snr"] = True
    configs = configs._replace(scheduler=configs.scheduler | marks)

    weights = webui.from_tensors(stored, configs, str(path))
    parts = {part: Component(configs.parts[part], own) for part, own in weights.parts.items()}
    if tokenizers is None:
        tokenizers = _tokenizers(path, parts, family)
    told = [
        f"{path}: {family.title}, predicts {kind}: so says {evidence}; configurations: {source}",
        *_left_out(weights.ignored),
    ]
    return Opened(Model(family, parts, configs.scheduler, tokenizers, path), told)


def _in_header(path: Path) -> Configs | None:
    """The configurations that jaxft puts into a file's header; None in a file of others."""
    content = webui.configs_in_header(path)
    if content is None:
        return None
    if not content.keys() >= {"unet", "vae", "scheduler"}:
        raise UserError(f"{path}: {webui.CONFIGS} in its header are not those of a whole model")
    scheduler = content.pop("scheduler")
    return Configs(families.of_configs(content, str(path)), content, scheduler)


def _by_spread(stored: Mapping[str, Any], family: Family) -> tuple[str, str] | None:
    """What a UNet of Stable Diffusion 2.x predicts, by ComfyUI's rule, and that it says so."""
    if family != families.SD2 or SPREAD not in stored:
        return None
    spread = float(np.std(np.asarray(stored[SPREAD], np.float32)))
    kind = "v_prediction" if spread > MOST_SPREAD else "epsilon"
    return kind, f"the spread of {SPREAD}, {spread:.3f} (ComfyUI's rule: above {MOST_SPREAD} for v)"


def _published(
    path: Path, stored: Mapping[str, Any], family: Family, predicts: tuple[str, str] | None
) -> Configs:
    """The configurations of the model that a family began with; the UNet may have other inputs."""
    configs = next(known for known in published.ALL.values() if known.family == family)
    if family == families.SD2 and predicts and predicts[0] == "v_prediction":
        configs = published.SD21
    if ZERO_SNR in stored:
        trailing = configs.scheduler | {"timestep_spacing": "trailing"}
        configs = configs._replace(scheduler=trailing)
    first = stored.get(f"{PREFIXES['unet']}input_blocks.0.0.weight")
    if first is None or first.ndim != 4:
        return configs  # the check of all weights will list it
    width = configs.parts["unet"]["block_out_channels"][0]
    if len(first) != width:
        raise UserError(
            f"{path}: this is a {family.title} whose UNet begins with {len(first)} channels; the "
            f"published one has {width}, and a single file does not say how others are built: make "
            "a folder of it with `jaxft convert to-diffusers --config FOLDER`, FOLDER being a "
            "diffusers folder of the same architecture"
        )
    unet = configs.parts["unet"] | {"in_channels": first.shape[1]}
    return configs._replace(parts=configs.parts | {"unet": unet})


def _tokenizers(path: Path, parts: Mapping[str, Component], family: Family) -> dict[str, Path]:
    """CLIP's tokenizer for every text encoder.

    Raises:
        UserError: a text encoder was made for another tokenizer.
    """
    for part in family.text_encoders:
        known = len(parts[part].params["text_model.embeddings.token_embedding.weight"])
        if known < clip_tokenizer.SIZE:
            raise UserError(
                f"{path}: {part} of this {family.title} knows {known} tokens, so its tokenizer is "
                f"not CLIP's, of {clip_tokenizer.SIZE}, and a single file holds none: make a "
                "folder of it with `jaxft convert to-diffusers --config FOLDER`, FOLDER being the "
                "diffusers folder that has the tokenizer"
            )
    pads = {part: "!" if part in family.openclip else clip_tokenizer.END for part in parts}
    return {part: clip_tokenizer.folder(pads[part]) for part in family.text_encoders}


def _left_out(keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    return [f"left out {len(keys)} keys that are no weights:", *(f"  {key}" for key in keys)]
