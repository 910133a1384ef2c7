"""The published configurations: the architecture of files that carry none.

From the folders of stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-2-1-base,
stable-diffusion-xl-base-1.0 and stable-diffusion-xl-refiner-1.0.
"""

from typing import Any

from jaxft.formats import families
from jaxft.formats.diffusers_folder import Configs

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
_OPENCLIP_H = _CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
_OPENCLIP_BIGG = _CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_SCHEDULE: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_PNDM = {"_class_name": "PNDMScheduler"} | _SCHEDULE
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False} | _SCHEDULE
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"} | _SCHEDULE

SD15 = Configs(families.SD1, {"unet": _UNET, "vae": _VAE, "text_encoder": _CLIP_L}, _PNDM)

_UNET_2 = _UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD21_BASE = Configs(
    families.SD2, {"unet": _UNET_2, "vae": _VAE, "text_encoder": _OPENCLIP_H}, _PNDM
)
SD21 = Configs(
    families.SD2,
    {
        "unet": _UNET_2 | {"sample_size": 96, "upcast_attention": True},
        "vae": _VAE | {"sample_size": 768},
        "text_encoder": _OPENCLIP_H,
    },
    _DDIM | {"prediction_type": "v_prediction"},
)

_ADDED = {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "sample_size": 128,
    "use_linear_projection": True,
}
_VAE_XL = _VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
SDXL = Configs(
    families.SDXL,
    {
        "unet": _UNET
        | _ADDED
        | {
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "projection_class_embeddings_input_dim": 2816,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        },
        "vae": _VAE_XL,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPENCLIP_BIGG,
    },
    _EULER,
)
REFINER = Configs(
    families.REFINER,
    {
        "unet": _UNET
        | _ADDED
        | {
            "attention_head_dim": [6, 12, 24, 24],
            "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
            "projection_class_embeddings_input_dim": 2560,
            "transformer_layers_per_block": 4,
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        },
        "vae": _VAE_XL,
        "text_encoder_2": _OPENCLIP_BIGG,
    },
    _EULER,
)
ALL = {"SD15": SD15, "SD21_BASE": SD21_BASE, "SD21": SD21, "SDXL": SDXL, "REFINER": REFINER}


_UNETS = {"SD15": _UNET, "SD21": _UNET_2}
_ONLY_UNETS = ("center_input_sample", "out_channels", "sample_size", "up_block_types")
CONTROLNETS: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in unet.items() if key not in _ONLY_UNETS}
    | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
    }
    for name, unet in _UNETS.items()
}
"""Those of lllyasviel's ControlNets, as diffusers has them: a UNet's options and the image's."""
