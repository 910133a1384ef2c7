"""Where in a diffusers folder things are, here or on the hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jaxft.builtin.names import resolve
from jaxft.errors import UserError
from jaxft.formats import families

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Folder -> name of the weights in it."""

PICKLES = {
    part: "pytorch_model" if part.startswith("text") else stem for part, stem in STEMS.items()
}
"""Folder -> name of pickled weights in it, without `.bin`."""

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Folder of a text encoder -> folder of its tokenizer."""


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
            f"{path} is a file, not a diffusers folder; make one of it with `jaxft convert "
            f"to-diffusers --model_path {path} --save_path FOLDER`"
        )
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name_or_path)
    if not is_hub_id or path.parent.is_dir():
        raise UserError(f"{name_or_path}: no such model folder (a hub model is named owner/name)")
    folder = _download(name_or_path, revision, variant)
    if not all(weights(folder / part, STEMS[part], variant) for part in networks(folder)):
        _download(name_or_path, revision, None if variant else "fp16")
    return folder


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    patterns = ["model_index.json", "*/config.json", "scheduler/*.json"]
    patterns += [f"{folder}/*" for folder in TOKENIZERS.values()]
    for part, stem in STEMS.items():
        patterns += [f"{part}/{name}" for name in _weight_patterns(stem, variant)]
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


def networks(folder: Path) -> list[str]:
    """The folders of a pipeline's networks, after its `model_index.json`.

    Raises:
        UserError: it is a pipeline that we do not know, or has a network of another class.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    kind = index.get("_class_name")
    if kind not in families.PIPELINES:
        known = ", ".join(families.PIPELINES)
        raise UserError(f"{path}: this is a {kind}; jaxft takes {known}")
    parts = [part for part in STEMS if (index.get(part) or [None])[-1] is not None]
    for part in ("unet", "vae"):
        if part not in parts:
            raise UserError(f"{path}: names no {part}")
    for part in parts:
        named, wanted = index[part][-1], families.NETWORKS[part].__name__
        if named != wanted:
            raise UserError(f"{path}: {part} is {named}; jaxft takes {wanted}")
    return parts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if there is none."""
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


def find_tokenizers(folder: Path) -> dict[str, Path]:
    """Text encoder -> folder of its CLIP tokenizer.

    Raises:
        UserError: one has neither `tokenizer.json` nor `vocab.json` with `merges.txt`.
    """
    encoders = [part for part in networks(folder) if part in TOKENIZERS]
    found = {part: folder / TOKENIZERS[part] for part in encoders}
    for path in found.values():
        if not (path / "tokenizer.json").is_file():
            lacking = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
            if lacking:
                raise UserError(f"{path}: lacks {' and '.join(lacking)} (or tokenizer.json)")
    return found


def weights(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The file of a network's weights (or the index of its shards): the variant's, else any."""
    for choice in dict.fromkeys([variant, None, "fp16"]):
        for name in _weight_patterns(stem, choice)[:2]:
            if (folder / name).is_file():
                return folder / name
    return None


def no_weights(folder: Path, stem: str) -> str:
    """What to tell a user whose folder has no weights that we read."""
    if any(folder.glob("*.bin")):
        return (
            f"{folder}: holds only .bin (pickle) weights, which may run code; make safetensors of "
            f"them: python -m jaxft.convert to-diffusers --model_path {folder.parent} "
            "--save_path FOLDER"
        )
    return f"{folder / stem}.safetensors: missing (nor is there a sharded or fp16 one beside it)"
