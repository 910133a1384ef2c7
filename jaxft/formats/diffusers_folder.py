"""Stable Diffusion 1.x as a diffusers folder: `StableDiffusionPipeline.save_pretrained`'s layout.

    model_index.json   unet/ vae/ text_encoder/ (config.json + weights)   scheduler/   tokenizer/

Two things differ between writers and are made equal on reading: transformers since 5.6 stores
the text encoder without the prefix `text_model.`, and VAEs of 2022 call the parts of their
attention `query key value proj_attn`. We write names that readers old and new take.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jaxft import params
from jaxft.builtin.names import resolve
from jaxft.errors import UserError
from jaxft.models.clip import CLIPTextModel
from jaxft.models.unet import UNet2DConditionModel
from jaxft.models.vae import AutoencoderKL

NETWORKS: dict[str, type[Any]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
"""The networks of a pipeline: folder to class; our classes have the names that diffusers uses."""

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}

VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in VAEs saved before diffusers 0.18, and what they are called now."""


class Component(NamedTuple):
    """One network: its `config.json` and its weights (NumPy arrays, dtype as stored)."""

    config: dict[str, Any]
    params: dict[str, Any]


class Model(NamedTuple):
    """A Stable Diffusion 1.x pipeline in memory; weights are under PyTorch's names."""

    unet: Component
    vae: Component
    text_encoder: Component
    scheduler: dict[str, Any]
    """`scheduler_config.json`."""
    tokenizer: Path
    """Folder of CLIP's tokenizer: `vocab.json` + `merges.txt`, or `tokenizer.json`, or all."""
    folder: Path


class Configs(NamedTuple):
    """The configurations of a pipeline, without weights."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]


def locate(name_or_path: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a model: the path itself, `builtin:NAME`, or the snapshot of a hub model.

    What exists here, or is written as a path, never touches the network. Of a hub model only
    the configurations, the tokenizer and one set of weights are downloaded.

    Raises:
        UserError: there is no such folder, or the hub has no such model or cannot be reached.
    """
    path = resolve(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{path} is a file, not a diffusers folder; for a webui file run "
            "`python -m jaxft.convert from-webui` first"
        )
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name_or_path)
    if not is_hub_id or path.parent.is_dir():
        raise UserError(f"{name_or_path}: no such model folder (a hub model is named owner/name)")
    folder = _download(name_or_path, revision, variant)
    if not all(_weights(folder / part, STEMS[part], variant) for part in NETWORKS):
        _download(name_or_path, revision, None if variant else "fp16")
    return folder


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    patterns = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*"]
    for part in NETWORKS:
        patterns += [f"{part}/{name}" for name in _weight_patterns(STEMS[part], variant)]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: no such folder here, and the hub did not give a model of this name: {reason}"
        ) from None


def _weight_patterns(stem: str, variant: str | None) -> list[str]:
    dot = f".{variant}" if variant else ""
    return [
        f"{stem}{dot}.safetensors",
        f"{stem}.safetensors.index{dot}.json",
        f"{stem}-[0-9]*-of-[0-9]*{dot}.safetensors",
        f"{stem}{dot}-[0-9]*-of-[0-9]*.safetensors",
    ]


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
    folder = locate(name_or_path, revision, variant)
    configs, tokenizer = read_configs(folder), find_tokenizer(folder)
    files = {part: _weights(folder / part, STEMS[part], variant) for part in NETWORKS}
    lacking = [_no_weights(folder / part, STEMS[part]) for part, file in files.items() if not file]
    if lacking:
        raise UserError("\n".join(lacking))
    if variant and not any(f".{variant}." in str(file) for file in files.values()):
        raise UserError(f"{folder}: no network has weights of the variant {variant!r}")
    parts = {
        part: _read(part, getattr(configs, part), file) for part, file in files.items() if file
    }
    return Model(**parts, scheduler=configs.scheduler, tokenizer=tokenizer, folder=folder)


def read_component(folder: Path, part: str) -> Component:
    """Reads one network (`unet`, `vae` or `text_encoder`) from a folder of its own.

    Raises:
        UserError: as `read`.
    """
    config = _read_json(folder / "config.json")
    file = _weights(folder, STEMS[part], None)
    if file is None:
        raise UserError(_no_weights(folder, STEMS[part]))
    return _read(part, config, file)


def read_configs(folder: Path) -> Configs:
    """The configurations in a folder of a Stable Diffusion 1.x pipeline.

    Raises:
        UserError: one is missing or unreadable, or `model_index.json` names another pipeline.
    """
    _check_index(folder)
    return Configs(
        **{part: _read_json(folder / part / "config.json") for part in NETWORKS},
        scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def _check_index(folder: Path) -> None:
    """Raises UserError unless the folder holds a pipeline of the classes we have."""
    path = folder / "model_index.json"
    index = _read_json(path)
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise UserError(f"{path}: this is a {kind}; jaxft takes StableDiffusionPipeline (SD 1.x)")
    for part, cls in NETWORKS.items():
        named = index.get(part) or [None, None]
        if named[-1] != cls.__name__:
            raise UserError(f"{path}: {part} is {named[-1]}; jaxft takes {cls.__name__}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; a model folder needs model_index.json, unet, vae, text_encoder, "
            "scheduler and tokenizer as diffusers' save_pretrained writes them"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def find_tokenizer(folder: Path) -> Path:
    """The folder of a pipeline's CLIP tokenizer.

    Raises:
        UserError: it has neither `tokenizer.json` nor `vocab.json` with `merges.txt`.
    """
    path = folder / "tokenizer"
    if not (path / "tokenizer.json").is_file():
        lacking = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
        if lacking:
            raise UserError(f"{path}: lacks {' and '.join(lacking)} (or tokenizer.json)")
    return path


def _weights(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The file of a network's weights (or the index of its shards): the variant's, else any."""
    for choice in dict.fromkeys([variant, None, "fp16"]):
        for name in _weight_patterns(stem, choice)[:2]:
            if (folder / name).is_file():
                return folder / name
    return None


def _read(part: str, config: dict[str, Any], file: Path) -> Component:
    stored = _rename(part, params.load(file))
    params.check(stored, shapes(part, config), str(file))
    return Component(config, stored)


def _no_weights(folder: Path, stem: str) -> str:
    if any(folder.glob("*.bin")):
        return (
            f"{folder}: holds only .bin (pickle) weights, which jaxft does not open; save them as "
            "safetensors with diffusers: StableDiffusionPipeline.from_pretrained(…)"
            ".save_pretrained(…, safe_serialization=True)"
        )
    return f"{folder / stem}.safetensors: missing (nor is there a sharded or fp16 one beside it)"


def shapes(part: str, config: Mapping[str, Any]) -> params.Shapes:
    """Names and shapes of the weights of the network `part` with this configuration."""
    return params.abstract(lambda: NETWORKS[part](config))[1]


def _rename(part: str, stored: dict[str, Any]) -> dict[str, Any]:
    """The names that today's diffusers and older transformers use, from either's."""
    if part == "text_encoder":
        prefix = "text_model."
        named = {prefix + name.removeprefix(prefix): array for name, array in stored.items()}
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
    for part in NETWORKS:
        component: Component = getattr(model, part)
        _write_json(folder / part / "config.json", component.config)
        stored = (
            component.params
            if dtype is None
            else params.cast(component.params, params.DTYPES[dtype])
        )
        params.save(folder / part / f"{STEMS[part]}.safetensors", stored)
    _write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    _write_tokenizer(folder / "tokenizer", model.tokenizer)
    _write_json(folder / "model_index.json", model_index(model.unet.config, model.scheduler))


def model_index(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """`model_index.json` of a pipeline with these configurations, without safety checker."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": unet.get("_diffusers_version", "0.42.0"),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler.get("_class_name", "PNDMScheduler")],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    for part, cls in NETWORKS.items():
        index[part] = ["transformers" if part == "text_encoder" else "diffusers", cls.__name__]
    return index


def _write_tokenizer(folder: Path, source: Path) -> None:
    """Copies the files; adds `vocab.json` and `merges.txt`, all that transformers 4 reads."""
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return
    bpe = _read_json(folder / "tokenizer.json")["model"]
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
