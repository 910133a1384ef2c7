"""What a file or folder of weights is, in lines for people."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxft import tensor_file
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, embeddings, hcp, webui
from jaxft.formats.webui_names import PREFIXES
from jaxft.tensor_file import Entry, Header

LORA_MARKS = {
    "lora:": "HCP-Diffusion's",
    ".lora_A.": "PEFT's (diffusers)",
    ".lora_down.": "kohya's (webuis)",
}
"""Parts of keys -> whose form of LoRA has them."""

DOWN = ("lora_down.weight", "lora_A.weight", "W_down")
"""Ends of the keys of a LoRA's first factor, whose rows are its rank."""

LONGEST = 100
"""Characters of a text in the header that are shown."""


def lines(path: Path) -> Iterator[str]:
    """What it is, what it holds, what it says of itself.

    Raises:
        UserError: there is no such thing, or it is damaged.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    header = tensor_file.read_header(path)
    yield f"{path}: {_kind(header.tensors, str(path))}"
    yield f"  {_counted(header.tensors.values())}"
    yield from _networks(header.tensors, str(path))
    if ranks := _ranks(header.tensors):
        yield f"  ranks: {ranks}"
    yield from _hashes(path, header)
    for key, value in sorted(header.metadata.items()):
        short = value if len(value) <= LONGEST else f"{value[:LONGEST]}… ({len(value)} characters)"
        yield f"  {key}: {short}"


def _folder(path: Path) -> Iterator[str]:
    configs = diffusers_folder.read_configs(path)
    yield f"{path}: {configs.family.title} as a diffusers folder"
    prediction = configs.scheduler.get("prediction_type", "epsilon")
    yield f"  scheduler: {configs.scheduler.get('_class_name', 'unnamed')}, predicts {prediction}"
    for part in configs.parts:
        for file in sorted((path / part).glob("*.safetensors")):
            tensors = tensor_file.read_header(file).tensors
            yield f"  {part}/{file.name}: {_counted(tensors.values())}"


def _networks(tensors: Mapping[str, Entry], source: str) -> Iterator[str]:
    """What a webui file holds of each network, a line each."""
    try:
        family = webui.detect(tensors, source)
    except UserError:
        return
    for network, prefix in (PREFIXES | dict(family.text_prefixes)).items():
        own = [entry for key, entry in tensors.items() if key.startswith(prefix)]
        yield f"  {network}: {_counted(own)}"


def _hashes(path: Path, header: Header) -> Iterator[str]:
    """The file's SHA-256, by which sites know it, and whether its header states the right ones."""
    with open(path, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    yield f"  SHA-256 of the file: {whole} (AutoV2 of webuis: {whole[:10].upper()})"
    stated = [key for key in tensor_file.HASHES if header.metadata.get(key)]
    if not stated:
        return
    weights = tensor_file.digest(path, header.size)
    for key in stated:
        right = header.metadata[key] == tensor_file.HASHES[key] + weights
        yield f"  {key} is {'that of the weights' if right else 'NOT that of the weights'}"


def _kind(tensors: Mapping[str, Entry], source: str) -> str:
    kinds = {key.partition(":")[0] for key in tensors if ":" in key}
    if kinds & {"base", "base_ema"}:
        held = ", ".join(hcp.KINDS.get(kind, kind) for kind in sorted(kinds))
        return f"HCP-Diffusion's part file: {held}"
    for mark, whose in LORA_MARKS.items():
        if any(mark in key for key in tensors):
            return f"LoRA in {whose} form"
    if shape := embeddings.shape(tensors):
        return f"embedding of the word {Path(source).stem!r}: {embeddings.describe(*shape)}"
    if any(key.startswith("control_model.") for key in tensors):
        return "ControlNet in one file"
    try:
        family = webui.detect(tensors, source)
    except UserError:
        return "weights under other names"
    marks = " (predicts velocities: v_pred)" if "v_pred" in tensors else ""
    return f"{family.title} in one file{marks}"


def _counted(entries: Iterable[Entry]) -> str:
    """Number and bytes of the tensors, by dtype."""
    entries = list(entries)
    count: Counter[str] = Counter(tensor_file.NAMES[entry.dtype] for entry in entries)
    kinds = ", ".join(f"{number} {name}" for name, number in count.most_common())
    size = sum(entry.end - entry.start for entry in entries)
    return f"{len(entries)} tensors ({kinds}), {size / 1e6:.1f} MB"


def _ranks(tensors: Mapping[str, Entry]) -> str:
    """How many layers of a LoRA have which rank."""
    ranks = Counter(entry.shape[0] for key, entry in tensors.items() if key.endswith(DOWN))
    return ", ".join(f"{rank} in {count} layers" for rank, count in sorted(ranks.items()))
