"""Pipelines of PyTorch's diffusers of every family: tiny widths, random weights."""

from typing import Any

import numpy as np
import random_model

from jaxft.formats import families, layout
from tests.weights import randomise

XL: dict[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 4},
    "sd1 inpainting": {
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "in_channels": 9,
    },
    "sd2": {
        "block_out_channels": (16, 32, 32, 64),
        "attention_head_dim": (1, 2, 2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": XL
    | {
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 2, 3),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "sdxl refiner": XL
    | {
        "block_out_channels": (16, 32, 64, 64),
        "attention_head_dim": (1, 2, 4, 4),
        "transformer_layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    },
}
"""The families at small widths."""

FAMILIES = {
    "sd1 inpainting": families.SD1,
    "sd2": families.SD2,
    "sdxl": families.SDXL,
    "sdxl refiner": families.REFINER,
}
WIDTHS = {"text_encoder": 24, "text_encoder_2": 20}


def text_encoder(size: int, part: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    network = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    return network(
        CLIPTextConfig(
            hidden_size=WIDTHS[part],
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=size,
            projection_dim=20,
            hidden_act="gelu",
            bos_token_id=size - 2,
            eos_token_id=size - 1,
        )
    )


def make_pipeline(kind: str, tokenizer_folder) -> Any:
    """diffusers' pipeline of a family, tiny widths, random weights."""
    import diffusers
    from transformers import CLIPTokenizer

    family = FAMILIES[kind]
    size = random_model.write_tokenizer(tokenizer_folder)
    cross = sum(WIDTHS[part] for part in family.text_encoders)
    unet = UNETS[kind] | {"norm_num_groups": 16, "cross_attention_dim": cross, "sample_size": 8}
    if kind == "sdxl refiner":
        unet["projection_class_embeddings_input_dim"] = 20 + 5 * 8
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.13025,
    }
    parts: dict[str, Any] = {
        "unet": randomise(diffusers.UNet2DConditionModel(**unet), 1),
        "vae": randomise(diffusers.AutoencoderKL(**vae), 2),
        "scheduler": diffusers.DDIMScheduler(
            **random_model.SCHEDULER | {"prediction_type": prediction}
        ),
    }
    for part, name in layout.TOKENIZERS.items():
        if part in family.text_encoders:
            parts[part] = randomise(text_encoder(size, part), 3)
            parts[name] = CLIPTokenizer.from_pretrained(tokenizer_folder)
        elif family.is_xl:
            parts |= {part: None, name: None}
    if not family.is_xl:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    return getattr(diffusers, families.pipeline(family, unet))(**parts)


def in_files(part: str, module: Any) -> dict[str, np.ndarray]:
    """A torch network's weights, under the names of the files."""
    own = ("text_model.", "text_projection.") if part in WIDTHS else ("",)
    return {
        name if name.startswith(own) else f"text_model.{name}": value.detach().cpu().numpy()
        for name, value in module.named_parameters()
    }
