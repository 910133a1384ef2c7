"""Stable Diffusion as a diffusers folder: the layout of diffusers' `save_pretrained`.

    model_index.json   unet/ vae/ text_encoder/ (config.json + weights)   scheduler/   tokenizer/

Stable Diffusion XL has text_encoder_2/ and tokenizer_2/ as well; its refiner these alone.

Two things differ between writers and are made equal on reading: transformers since 5.6 stores
the text encoder without the prefix `text_model.`, and VAEs of 2022 call the parts of their
attention `query key value proj_attn`. We write names that readers old and new take.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import families, layout
from jaxft.formats.families import Family

VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in VAEs saved before diffusers 0.18, and what they are called now."""


class Component(NamedTuple):
    """One network: its `config.json` and its weights (NumPy arrays, dtype as stored)."""

    config: dict[str, Any]
    params: dict[str, Any]


class Configs(NamedTuple):
    """The configurations of a pipeline, without weights."""

    family: Family
    parts: dict[str, dict[str, Any]]
    """Folder -> `config.json`."""
    scheduler: dict[str, Any]


class Model(NamedTuple):
    """A Stable Diffusion pipeline in memory; weights are under PyTorch's names."""

    family: Family
    parts: dict[str, Component]
    """Folder -> network: unet, vae, text_encoder, text_encoder_2."""
    scheduler: dict[str, Any]
    """`scheduler_config.json`."""
    tokenizers: dict[str, Path]
    """Text encoder's folder -> folder of CLIP's tokenizer: `vocab.json` + `merges.txt`, or
    `tokenizer.json`, or all."""
    folder: Path

    @property
    def configs(self) -> Configs:
        """All but the weights."""
        configs = {part: component.config for part, component in self.parts.items()}
        return Configs(self.family, configs, self.scheduler)

    def replace(self, **parts: Component) -> "Model":
        """The same with other networks."""
        return self._replace(parts=self.parts | parts)


def read(name_or_path: str, *, revision: str | None = None, variant: str | None = None) -> Model:
    """Reads a pipeline whole; safety checker and feature extractor are left out.

    Args:
        name_or_path: a folder, `builtin:NAME`, or a model on the Hugging Face hub.
        revision: branch, tag or commit of a hub model.
        variant: `fp16` to prefer `…fp16.safetensors`; a network with one set of weights has
            that one read, whatever it is called.

    Raises:
        UserError: a file is missing or unreadable, the pipeline is of another kind, or weights
            and configuration disagree (every missing, unexpected and misshapen one is listed).
    """
    folder = layout.locate(name_or_path, revision, variant)
    configs, tokenizers = read_configs(folder), layout.find_tokenizers(folder)
    files = {
        part: layout.weights(folder / part, layout.STEMS[part], variant) for part in configs.parts
    }
    lacking = [
        layout.no_weights(folder / part, layout.STEMS[part])
        for part, file in files.items()
        if not file
    ]
    if lacking:
        raise UserError("\n".join(lacking))
    if variant and not any(f".{variant}." in str(file) for file in files.values()):
        raise UserError(f"{folder}: no network has weights of the variant {variant!r}")
    classes = configs.family.networks
    parts = {
        part: _read(part, classes[part], configs.parts[part], file)
        for part, file in files.items()
        if file
    }
    return Model(configs.family, parts, configs.scheduler, tokenizers, folder)


def is_inpainting(model: Model) -> bool:
    """Whether the UNet takes a mask and the latents of a masked picture besides the noisy ones."""
    latents = model.parts["vae"].config.get("latent_channels", 4)
    return model.parts["unet"].config.get("in_channels", 4) == 2 * latents + 1


def check_text_to_image(model: Model) -> None:
    """Raises UserError unless the model makes pictures of text and noise alone."""
    channels = model.parts["unet"].config.get("in_channels", 4)
    if channels != model.parts["vae"].config.get("latent_channels", 4):
        raise UserError(
            f"{model.folder}/unet: takes {channels} channels; only text-to-image models are "
            "supported, no inpainting or depth models"
        )
    if model.family == families.REFINER:
        raise UserError(
            f"{model.folder}: the refiner works on pictures of another model; it is converted, not "
            "trained or sampled"
        )


def read_part(
    folder: Path, part: str, configs: Configs, stored: dict[str, Any] | None
) -> Component:
    """One network of a pipeline, from these weights under the file's names, or from its file.

    Raises:
        UserError: as `read`.
    """
    network, config = configs.family.networks[part], configs.parts[part]
    if stored is None:
        file = layout.weights(folder / part, layout.STEMS[part], None)
        if file is None:
            raise UserError(layout.no_weights(folder / part, layout.STEMS[part]))
        return _read(part, network, config, file)
    named = _rename(part, stored)
    params.check(named, shapes(network, config), str(folder / part))
    return Component(config, named)


def read_component(folder: Path, part: str) -> Component:
    """Reads one network (`unet` or `vae`) from a folder of its own.

    Raises:
        UserError: as `read`.
    """
    config = layout.read_json(folder / "config.json")
    file = layout.weights(folder, layout.STEMS[part], None)
    if file is None:
        raise UserError(layout.no_weights(folder, layout.STEMS[part]))
    return _read(part, families.NETWORKS[part], config, file)


def read_configs(folder: Path) -> Configs:
    """The configurations in a folder of a Stable Diffusion pipeline.

    Raises:
        UserError: one is missing or unreadable, `model_index.json` names another pipeline, or the
            networks belong to no family.
    """
    parts = {
        part: layout.read_json(folder / part / "config.json") for part in layout.networks(folder)
    }
    scheduler = layout.read_json(folder / "scheduler" / "scheduler_config.json")
    family = families.of_configs(parts, str(folder))
    named = layout.read_json(folder / "model_index.json")["_class_name"]
    if ("XL" in named) != family.is_xl:
        raise UserError(f"{folder}: is called a {named}, and its UNet is of {family.title}")
    return Configs(family, parts, scheduler)


def _read(part: str, network: type[Any], config: dict[str, Any], file: Path) -> Component:
    stored = _rename(part, params.load(file))
    params.check(stored, shapes(network, config), str(file))
    return Component(config, stored)


def shapes(network: type[Any], config: Mapping[str, Any]) -> params.Shapes:
    """Names and shapes of the weights of a network with this configuration.

    Raises:
        UserError: it asks for what jaxft lacks, or has values of the wrong kind.
    """
    try:
        return params.abstract(lambda: network(config))[1]
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{network.__name__}: no network can be built from its config.json ({error}); get the "
            "file again"
        ) from error


def _rename(part: str, stored: dict[str, Any]) -> dict[str, Any]:
    """The names that today's diffusers and older transformers use, from either's."""
    if part in layout.TOKENIZERS:
        prefix = "text_model."
        named = {
            name if name.startswith((prefix, "text_projection.")) else prefix + name: array
            for name, array in stored.items()
        }
        named.pop(prefix + "embeddings.position_ids", None)  # a constant, 0 … 76
        return named
    if part == "vae":
        return {_rename_vae(name): array for name, array in stored.items()}
    return stored


def _rename_vae(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    if parent.endswith("mid_block.attentions.0") and last in VAE_ATTENTION:
        return f"{parent}.{VAE_ATTENTION[last]}.{leaf}"
    return name


def write(folder: Path, model: Model, dtype: str | None = "fp32") -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` opens, whole or not at all.

    Configurations are written as they were read. An earlier model in `folder` is replaced.

    Args:
        folder: where to; its parents are made.
        model: what to write.
        dtype: `fp32`, `fp16` or `bf16`; `None` keeps each weight as it is stored.

    Raises:
        UserError: `folder` holds something that is no model.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would stay with the finished model
        _write_content(temporary, model, dtype)
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless `folder` is new, empty, or a model (which `write` replaces)."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file of this name is in the way")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: holds files that are no model; name another folder")


def _write_content(folder: Path, model: Model, dtype: str | None) -> None:
    for part, component in model.parts.items():
        file = folder / part / f"{layout.STEMS[part]}.safetensors"
        tensor_file.write(file, component.params, dtype=dtype and params.DTYPES[dtype])
    for part, tokenizer in model.tokenizers.items():
        _write_tokenizer(folder / layout.TOKENIZERS[part], tokenizer)
    write_configs(folder, model.configs)


def write_configs(folder: Path, configs: Configs) -> None:
    """Writes all that is JSON: configurations, scheduler, and the index, which makes it a model."""
    for part, config in configs.parts.items():
        _write_json(folder / part / "config.json", config)
    _write_json(folder / "scheduler" / "scheduler_config.json", configs.scheduler)
    _write_json(folder / "model_index.json", model_index(configs))


def model_index(configs: Configs) -> dict[str, Any]:
    """`model_index.json` of a pipeline with these configurations, without safety checker."""
    family, unet = configs.family, configs.parts["unet"]
    index: dict[str, Any] = {
        "_class_name": families.pipeline(family, unet),
        "_diffusers_version": unet.get("_diffusers_version", "0.42.0"),
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", configs.scheduler.get("_class_name", "PNDMScheduler")],
    }
    if family.is_xl:
        index |= {"image_encoder": [None, None], "force_zeros_for_empty_prompt": True}
        index |= {"add_watermarker": None}
        index |= {part: [None, None] for part in layout.TOKENIZERS}
        index |= {folder: [None, None] for folder in layout.TOKENIZERS.values()}
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    for part, cls in family.networks.items():
        index[part] = ["transformers" if part in layout.TOKENIZERS else "diffusers", cls.__name__]
    for part in family.text_encoders:
        index[layout.TOKENIZERS[part]] = ["transformers", "CLIPTokenizer"]
    return index


def _write_tokenizer(folder: Path, source: Path) -> None:
    """Copies the files; adds `vocab.json` and `merges.txt`, all that transformers 4 reads."""
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return
    bpe = layout.read_json(folder / "tokenizer.json")["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    _write_text(folder / "vocab.json", json.dumps(bpe["vocab"], ensure_ascii=False))
    _write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *pairs]) + "\n")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`; what was there is removed last."""
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(old / "old")
    new.rename(folder)
    shutil.rmtree(old)
