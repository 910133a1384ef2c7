"""LoRA files in their three forms: kohya's (webuis), PEFT's (diffusers), HCP-Diffusion's.

A form is only a matter of names, and of where alpha stands.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, families, hcp, modelspec
from jaxft.formats.diffusers_folder import Configs
from jaxft.formats.webui_names import PREFIXES, names
from jaxft.low_rank import Lora, LowRank
from jaxft.lycoris import Change

KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
KOHYA_XL_PREFIXES = KOHYA_PREFIXES | {"text_encoder": "lora_te1"}
LORA_ENDS = {f"lora_{name}.weight": name for name in ("down", "mid", "up")}
"""Ends of kohya's keys -> factors; of other kinds the two are the same."""

MARKS = {
    "hada_w1_a": "loha",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "oft_blocks": "oft",
    "dora_scale": "dora",
    "mid": "locon",
}
"""Factor -> the kind of adapter that has it."""

NEEDED = {
    "locon": {"down", "mid", "up"},
    "dora": {"down", "up", "dora_scale"},
    "loha": {f"hada_w{number}_{side}" for number in (1, 2) for side in "ab"},
    "lokr": set(),
    "oft": {"oft_blocks"},
}
"""Kind -> factors that every one has."""

VERSIONS = {"stable-diffusion-v1": "sd_v1", "stable-diffusion-v2": "sd_v2"}
"""ModelSpec's architecture -> kohya's name of the base; XL's is its own."""

TEXT_PREFIX = "text_model."
"""Of the text encoders' modules, but not in transformers since 5.6."""

PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers looks for ranks and alphas."""

OTHER_KINDS = {
    "oft_diag": "OFT of LyCORIS' first versions",
    "rescale": "OFT with rescaling",
    ".diff.": "full difference",
    "w_norm": "trained norms",
    "a1.weight": "GLoRA",
}
"""Parts of keys -> the kind of adapter that has them."""


def modules(configs: Configs) -> dict[str, dict[str, tuple[int, ...]]]:
    """Network -> module -> shape of its weight, for every layer that can have a LoRA."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for part, network in configs.family.networks.items():
        shapes = diffusers_folder.shapes(network, configs.parts[part])
        found[part] = {
            name.removesuffix(".weight"): leaf.shape
            for name, leaf in shapes.items()
            if name.endswith(".weight") and leaf.ndim > 1 and "embedding.weight" not in name
        }
    del found["vae"]
    return found


def kohya_names(configs: Configs) -> dict[tuple[str, str], str]:
    """(network, module) -> beginning of kohya's keys, without the dot; one to one.

    Those of Stable Diffusion XL's UNet come from the single file's names, as webuis expect.
    """
    is_xl = configs.family.is_xl
    prefixes = KOHYA_XL_PREFIXES if is_xl else KOHYA_PREFIXES
    table = names(configs.family, configs.parts) if is_xl else {}
    keys = {}
    for part, layers in modules(configs).items():
        for module in layers:
            name = module
            if is_xl and part == "unet":
                key = table[f"unet.{module}.weight"].key
                name = key.removeprefix(PREFIXES["unet"]).removesuffix(".weight")
            keys[part, module] = f"{prefixes[part]}_{name.replace('.', '_')}"
    return keys


def read(path: Path, configs: Configs, average: bool = False) -> Lora:
    """Reads a LoRA of any of the three forms.

    Args:
        path: the file.
        configs: of the model that it belongs to.
        average: whether to take the moving average in HCP-Diffusion's form; other forms have none.

    Raises:
        UserError: the file is unreadable, no LoRA, of a kind that is not supported, or made for
            another model.
    """
    stored = tensor_file.read(path)
    metadata = tensor_file.read_header(path).metadata
    for key in stored:
        for mark, kind in OTHER_KINDS.items():
            if mark in f"{key}.":
                raise UserError(f"{path}: not supported: {kind} ({key})")
    if any(key.startswith(("lora:", "lora_ema:")) for key in stored):
        lora = _from_hcp(stored, path, average)
    elif any(".lora_A." in key for key in stored):
        lora = _from_peft(stored, metadata, path)
    elif any(key.partition(".")[2] in (*LORA_ENDS, *MARKS) for key in stored):
        lora = _from_kohya(stored, configs, path)
    else:
        raise UserError(f"{path}: holds no LoRA in kohya's, PEFT's or HCP-Diffusion's form")
    _check(lora, configs, path)
    return lora


def _check(lora: Lora, configs: Configs, path: Path) -> None:
    """Raises UserError unless every layer is one of the model's, and its factors fit."""
    known, problems = modules(configs), []
    for part, layers in lora.items():
        for module, low in layers.items():
            shape = known.get(part, {}).get(module)
            if shape is None:
                problems.append(f"{part}: {module}: the model has no such layer")
                continue
            if isinstance(low, Change):
                if not low.fits(tuple(shape)):
                    problems.append(f"{part}: {module}: its {low.kind} is not of {tuple(shape)}")
                continue
            made = (len(low.up), *low.down.shape[1:])
            if _flat(made) != _flat(shape):
                problems.append(f"{part}: {module}: makes {made}, the layer has {shape}")
            elif low.up.shape[1] != low.rank:
                problems.append(f"{part}: {module}: ranks {low.up.shape[1]} and {low.rank}")
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError(
            f"{path}: this LoRA was made for another model than {configs.family.title}:\n  "
            + "\n  ".join([*problems[:8], *more])
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1x1 convolution as that of a matrix."""
    return shape[:2] if shape[2:] == (1, 1) else shape


# ------------------------------------------------------------------------------------------ kohya


def _from_kohya(stored: Mapping[str, Any], configs: Configs, path: Path) -> Lora:
    places = {key: place for place, key in kohya_names(configs).items()}
    if configs.family.is_xl:  # some trainers write diffusers' names for XL too
        for part, module in [*places.values()]:
            alias = f"{KOHYA_XL_PREFIXES[part]}_{module.replace('.', '_')}"
            places.setdefault(alias, (part, module))
    lora: Lora = {}
    unknown, layers = [], {}
    for key, value in stored.items():
        start, _, end = key.partition(".")
        known = end == "alpha" or end in LORA_ENDS or end.startswith(("hada_", "lokr_"))
        if start not in places or not (known or end in MARKS):
            unknown.append(key)
        else:
            layers.setdefault(start, {})[LORA_ENDS.get(end, end)] = value
    for start, factors in layers.items():
        part, module = places[start]
        alpha = float(factors.pop("alpha", 0))
        lora.setdefault(part, {})[module] = _made(f"{path}: {start}", factors, alpha)
    if unknown:
        raise UserError(
            f"{path}: this LoRA was made for another model than {configs.family.title}; it has "
            f"{len(unknown)} keys that this model has no layers for, such as {unknown[0]}"
        )
    return lora


def _made(where: str, factors: dict[str, Any], alpha: float) -> LowRank | Change:
    """The adapter that has these factors; an alpha of 0 is one that the file does not say."""
    kinds = [kind for name, kind in MARKS.items() if name in factors]
    if not kinds:
        for name in ("down", "up"):
            if name not in factors:
                raise UserError(f"{where}.lora_{name}.weight is missing")
        return LowRank(factors["down"], factors["up"], alpha or float(len(factors["down"])))
    if len(kinds) > 1:
        raise UserError(f"{where}: not supported: {' and '.join(kinds)} in one layer")
    if missing := sorted(NEEDED[kinds[0]] - factors.keys()):
        raise UserError(f"{where}: {kinds[0]} without {missing[0]}")
    if kinds[0] == "oft" and factors["oft_blocks"].ndim != 3:
        raise UserError(f"{where}.oft_blocks: not supported: BOFT")
    made = Change(kinds[0], factors, alpha)
    return made if alpha or kinds[0] == "oft" else made._replace(alpha=float(made.rank or 1))


def write_kohya(
    path: Path,
    lora: Lora,
    configs: Configs,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the form that webuis read.

    Args:
        path: the file.
        lora: what to write.
        configs: of the model that it belongs to.
        dtype: `fp32`, `fp16` or `bf16`; None: as it is.
        metadata: more texts for the header.
    """
    table = kohya_names(configs)
    stored = {}
    for part, layers in lora.items():
        for module, low in layers.items():
            key = table[part, module]
            if isinstance(low, Change):
                ends = {name: end for end, name in LORA_ENDS.items()}
                for name, value in low.factors.items():
                    stored[f"{key}.{ends.get(name, name)}"] = value
                stored[f"{key}.alpha"] = np.asarray(low.alpha, np.float32)
                continue
            stored[f"{key}.lora_down.weight"] = low.down
            stored[f"{key}.lora_up.weight"] = low.up
            stored[f"{key}.alpha"] = np.asarray(low.alpha, low.down.dtype)
    texts = kohya_metadata(lora, configs, path.stem) | dict(metadata or {})
    tensor_file.write(path, stored, texts, _dtype(dtype))


def kohya_metadata(lora: Lora, configs: Configs, name: str) -> dict[str, str]:
    """What webuis look at: the kind of base model, ranks, alphas."""
    family = configs.family
    velocity = "_v" if configs.scheduler.get("prediction_type") == "v_prediction" else ""
    every = [low for layers in lora.values() for low in layers.values()]
    ranks, alphas = ({getattr(low, what) for low in every} for what in ("rank", "alpha"))
    kinds = sorted({low.kind for low in every if isinstance(low, Change)})
    return modelspec.header(configs, name, "lora") | {
        "sshs_model_hash": "",
        "sshs_legacy_hash": "",
        "ss_base_model_version": VERSIONS.get(family.architecture, "sdxl_base_v1-0") + velocity,
        "ss_v2": str(family == families.SD2),
        "ss_network_module": "lycoris.kohya" if kinds else "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_args": json.dumps({"algo": kinds[0]} if kinds else {}),
        "ss_output_name": name,
    }


# ------------------------------------------------------------------------------------------- PEFT


def _from_peft(stored: Mapping[str, Any], metadata: Mapping[str, str], path: Path) -> Lora:
    try:
        settings = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except ValueError:
        raise UserError(f"{path}: {PEFT_METADATA} in its header is no JSON") from None
    lora: Lora = {}
    for key, down in stored.items():
        start, mark, _ = key.partition(".lora_A.")
        if not mark:
            if ".lora_B." not in key:
                raise UserError(f"{path}: {key} belongs to no LoRA in PEFT's form")
            continue
        part, _, module = start.partition(".")
        up = stored.get(f"{start}.lora_B.{key.rpartition('.lora_A.')[2]}")
        if up is None:
            raise UserError(f"{path}: {start}.lora_B.weight is missing")
        default = settings.get(f"{part}.lora_alpha", len(down))
        patterns = settings.get(f"{part}.alpha_pattern") or {}
        alpha = patterns.get(module, patterns.get(_unprefixed(module), default))
        if part.startswith("text_encoder"):
            module = f"{TEXT_PREFIX}{_unprefixed(module)}"
        lora.setdefault(part, {})[module] = LowRank(down, up, float(alpha))
    return lora


def write_peft(
    path: Path,
    lora: Lora,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the form that diffusers' `load_lora_weights` and PEFT read, alphas in its header.

    Args:
        path: the file.
        lora: what to write.
        dtype: `fp32`, `fp16` or `bf16`; None: as it is.
        metadata: more texts for the header.
    """
    stored, settings = {}, {}
    for part, own in lora.items():
        layers = {module: _plain(path, module, low) for module, low in own.items()}
        ranks = {_unprefixed(module): low.rank for module, low in layers.items()}
        alphas = {_unprefixed(module): low.alpha for module, low in layers.items()}
        rank, alpha = (max(kind.values()) for kind in (ranks, alphas))
        settings |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {m: r for m, r in ranks.items() if r != rank},
            f"{part}.alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
            f"{part}.target_modules": sorted(ranks),
        }
        for module, low in layers.items():
            stored[f"{part}.{module}.lora_A.weight"] = low.down
            stored[f"{part}.{module}.lora_B.weight"] = low.up
    text = json.dumps(settings, indent=2, sort_keys=True)
    tensor_file.write(path, stored, {PEFT_METADATA: text} | dict(metadata or {}), _dtype(dtype))


def _plain(path: Path, module: str, low: LowRank | Change) -> LowRank:
    """The adapter as a LoRA."""
    if isinstance(low, Change):
        raise UserError(
            f"{path}: {module} has a {low.kind}, and this form is only LoRA's; write kohya's form, "
            "or merge it into a model"
        )
    return low


def _unprefixed(module: str) -> str:
    """A module's name that PEFT, which compares ends, finds with and without the prefix."""
    return module.removeprefix(TEXT_PREFIX)


# -------------------------------------------------------------------------------------------- HCP


HCP_ENDS = {"layer.W_down": "down", "layer.W_up": "up"} | {
    f"{parent}.lora_{name}.weight": name
    for parent in ("layer", "lora_block")
    for name in ("down", "up")
}
"""End of a key -> factor; `lora_down` in files of its first versions. Of kinds that HCP-Diffusion
lacks, the two are the same."""


def _from_hcp(stored: Mapping[str, Any], path: Path, average: bool) -> Lora:
    kind = "lora_ema" if average else "lora"
    named = hcp.kinds(path, stored).get(kind)
    if named is None:
        raise UserError(f"{path}: no LoRA in it (no key '{kind}:…')")
    lora: Lora = {}
    layers: dict[str, dict[str, Any]] = {}
    for key, value in named.items():
        layer, mark, end = key.partition(".___.")
        if not mark:
            raise UserError(f"{path}: {kind}:{key} is no key of a LoRA in HCP-Diffusion's form")
        layers.setdefault(layer, {})[HCP_ENDS.get(end, end)] = value
    for layer, factors in layers.items():
        factors.pop("layer.bias", None)
        scale = float(factors.pop("alpha", 0))
        made = _made(f"{path}: {kind}:{layer}", factors, 0.0)
        own = "text_encoder" if layer.startswith(TEXT_PREFIX) else "unet"
        part, module = hcp.place(layer, own)
        alpha = scale * (made.rank or 1) if scale else made.alpha
        lora.setdefault(part, {})[module] = made._replace(alpha=alpha)
    return lora


def write_hcp(folder: Path, lora: Lora, dtype: str | None = None) -> None:
    """Writes HCP-Diffusion's part files, `unet` and `text_encoder`."""
    for name, named in hcp.by_file(hcp_names(lora)).items():
        stored = {f"lora:{key}": value for key, value in named.items()}
        tensor_file.write(folder / f"{name}.safetensors", stored, dtype=_dtype(dtype))


def hcp_names(lora: Lora) -> dict[str, dict[str, Any]]:
    """Network -> HCP-Diffusion's names of factors and alphas, these divided by the rank."""
    return {
        part: {
            f"{module}.___.{end}": value
            for module, low in layers.items()
            for end, value in _hcp_factors(low).items()
        }
        for part, layers in lora.items()
    }


def _hcp_factors(low: LowRank | Change) -> dict[str, Any]:
    alpha = {"alpha": np.asarray(low.scale, np.float32)}
    if isinstance(low, Change):
        return {**low.factors} | alpha
    return {"layer.W_down": low.down, "layer.W_up": low.up} | alpha


def _dtype(name: str | None) -> Any:
    return name and params.DTYPES[name]
