"""Lists names and shapes of the published Stable Diffusion models: no weights, nothing of jaxft.

The single file's side comes from the programs that the models were trained with: Stability's `ldm`
(1.x, 2.x) and `sgm` (XL), OpenCLIP, and ControlNet's `cldm`, built on PyTorch's meta device with
the numbers of their published YAML files. The diffusers' side comes from diffusers and
transformers, with the configurations that diffusers itself makes of those YAML files. The programs'
packages are unpacked, not installed; what they import besides PyTorch is replaced by stand-ins:

    pip download --no-deps -d wheels stable-diffusion-sdkit==2.1.5 imaginAIry==15.0.0 \\
        open_clip_torch==3.3.0 comfylib==0.0.5
    for wheel in wheels/*.whl; do unzip -q -o "$wheel" -d unpacked; done
    PYTHONPATH=unpacked python scripts/list_published_names.py tests/data/names
"""

import argparse
import gzip
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

STAND_INS = (
    *("einops", "timm", "ftfy", "torchvision", "torchvision.ops", "torchvision.ops.misc"),
    *("torchvision.transforms", "torchvision.transforms.functional", "cv2", "psutil"),
    *("imaginairy.utils", "imaginairy.modules.diffusion.util"),
)
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "legacy": False,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": UNET | {"num_heads": 8, "context_dim": 768},
    "sd21": UNET
    | {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True},
    "sdxl": UNET
    | {
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4],
        "num_head_channels": 64,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
}
"""`unet_config` of v1-inference.yaml, v2-inference-v.yaml and sd_xl_base.yaml."""

VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
"""`ddconfig`, alike in all three."""

CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
OPENCLIP = {
    "sd21": ("cond_stage_model.model.", {"width": 1024, "heads": 16, "layers": 24}),
    "sdxl": ("conditioner.embedders.1.model.", {"width": 1280, "heads": 20, "layers": 32}),
}
"""Family -> beginning of the keys and tower of the OpenCLIP model in its file."""

CLIP_PREFIXES = {
    "sd15": "cond_stage_model.transformer.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
TEXT_ENCODERS = {
    "sd15": {"text_encoder": (CLIPTextModel, CLIP_L)},
    "sd21": {"text_encoder": (CLIPTextModel, CLIP_H)},
    "sdxl": {
        "text_encoder": (CLIPTextModel, CLIP_L),
        "text_encoder_2": (CLIPTextModelWithProjection, CLIP_G),
    },
}

Line = tuple[str, str, tuple[int, ...]]
"""Part, name, shape; the part of the single file is `webui`."""


def weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a module's parameters."""
    for name, value in module.named_parameters():
        yield prefix + name, tuple(value.shape)


def clip_names(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """As in files: transformers has left out `text_model.` since 5.6."""
    for name, shape in weights(module):
        own = name.startswith(("text_model.", "text_projection."))
        yield f"{prefix}{'' if own else 'text_model.'}{name}", shape


def single_file(family: str) -> Iterator[Line]:
    """What the model's own programs keep in the file, averages and constants aside."""
    if family == "sdxl":
        program = importlib.import_module("imaginairy.modules.sgm.diffusionmodules.openaimodel")
        attention = importlib.import_module("imaginairy.modules.sgm.attention")
        vars(program)["SpatialTransformer"] = attention.SpatialTransformer  # it has another's
        theirs = ("image_size", "use_spatial_transformer", "legacy")  # gone in this version
        options = {key: value for key, value in UNETS[family].items() if key not in theirs}
    else:
        program = importlib.import_module("ldm.modules.diffusionmodules.openaimodel")
        options = UNETS[family]
    model = importlib.import_module("ldm.modules.diffusionmodules.model")
    found = [*weights(program.UNetModel(**options), "model.diffusion_model.")]
    found += weights(model.Encoder(**VAE), "first_stage_model.encoder.")
    found += weights(model.Decoder(**VAE), "first_stage_model.decoder.")
    found += weights(nn.Conv2d(8, 8, 1), "first_stage_model.quant_conv.")
    found += weights(nn.Conv2d(4, 4, 1), "first_stage_model.post_quant_conv.")
    if prefix := CLIP_PREFIXES.get(family):
        found += clip_names(CLIPTextModel(CLIPTextConfig(**CLIP_L)), prefix)
    if family in OPENCLIP:
        prefix, tower = OPENCLIP[family]
        clip = importlib.import_module("open_clip.model").CLIP
        vision = {"layers": 1, "width": 64, "image_size": 28, "patch_size": 14}
        made = clip(tower["width"], vision, {"vocab_size": 49408, "context_length": 77} | tower)
        found += [
            (prefix + name, shape)
            for name, shape in weights(made)
            if not name.startswith("visual.")
        ]
    for name, shape in found:
        yield "webui", name, shape


def folder(family: str) -> Iterator[Line]:
    """The networks of the diffusers folder."""
    original: dict[str, Any] = {"model": {"params": {"unet_config": {"params": UNETS[family]}}}}
    first_stage = {"params": {"ddconfig": VAE}}
    original["model"]["params"] |= {"first_stage_config": first_stage, "scale_factor": 0.18215}
    sample = {"sample_size": 512}
    unet = single_file_utils.create_unet_diffusers_config_from_ldm(original, {}, image_size=512)
    vae = single_file_utils.create_vae_diffusers_config_from_ldm(original, {}, image_size=512)
    made: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(unet | sample),
        "vae": AutoencoderKL.from_config(vae),
    }
    for part, module in made.items():
        for name, shape in weights(module):
            yield part, name, shape
    for part, (network, config) in TEXT_ENCODERS[family].items():
        for name, shape in clip_names(network(CLIPTextConfig(**config))):
            yield part, name, shape


def controlnet() -> Iterator[Line]:
    """ControlNet of Stable Diffusion 1.x, in its single file and in diffusers."""
    program = importlib.import_module("comfy.hazard.cldm.cldm")
    options = {k: v for k, v in UNETS["sd15"].items() if k != "out_channels"}
    made = program.ControlNet(**options, hint_channels=3)
    for name, shape in weights(made, "control_model."):
        yield "webui", name, shape
    for name, shape in weights(ControlNetModel(cross_attention_dim=768)):
        yield "controlnet", name, shape


def write(path: Path, lines: Iterator[Line]) -> None:
    text = "".join(f"{part} {name} {'x'.join(map(str, s)) or 1}\n" for part, name, s in lines)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{path}: {text.count(chr(10))} names")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    for name in STAND_INS:
        sys.modules.setdefault(name, MagicMock())
    with torch.device("meta"):
        for family in UNETS:
            lines = [*single_file(family), *folder(family)]
            write(target / f"{family}.txt.gz", iter(lines))
        write(target / "controlnet.txt.gz", controlnet())


if __name__ == "__main__":
    main()
