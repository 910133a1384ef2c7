"""The YAML file beside a webui file, by which webuis know what the file itself does not say.

It is the configuration of CompVis' latent-diffusion; needed for Stable Diffusion 1.x and 2.x that
predict velocities. Written as JSON, which is YAML.
"""

import json
from pathlib import Path
from typing import Any

from jaxft.formats.diffusers_folder import Configs
from jaxft.models import unet, vae
from jaxft.models.options import per_level

MARK = '"ldm.models.diffusion.ddpm.LatentDiffusion",\n    "params": {\n      "parameterization"'
"""What our files hold, and others do not hold like this."""


def is_ours(path: Path) -> bool:
    """Whether a file was written by this module."""
    return MARK in path.read_text("utf-8", "replace")


def text(configs: Configs) -> str:
    """The file's content for a model with these configurations."""
    schedule = configs.scheduler
    is_v = schedule.get("prediction_type") == "v_prediction"
    content = {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "parameterization": "v" if is_v else "eps",
                "linear_start": schedule.get("beta_start", 0.00085),
                "linear_end": schedule.get("beta_end", 0.012),
                "num_timesteps_cond": 1,
                "timesteps": schedule.get("num_train_timesteps", 1000),
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": configs.parts["unet"].get("sample_size", 64),
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "scale_factor": configs.parts["vae"].get("scaling_factor", 0.18215),
                "use_ema": False,
                "unet_config": _unet({**unet.FREE, **configs.parts["unet"]}),
                "first_stage_config": _vae({**vae.FREE, **configs.parts["vae"]}),
                "cond_stage_config": _text_encoder(bool(configs.family.openclip)),
            },
        }
    }
    return json.dumps(content, indent=2) + "\n"


def _unet(config: dict[str, Any]) -> dict[str, Any]:
    widths = config["block_out_channels"]
    heads = per_level(config["num_attention_heads"] or config["attention_head_dim"], len(widths))
    crossed = [i for i, kind in enumerate(config["down_block_types"]) if kind.startswith("Cross")]
    linear = config["use_linear_projection"]
    return {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "use_checkpoint": True,
            "image_size": 32,
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "model_channels": widths[0],
            "attention_resolutions": [2**i for i in reversed(crossed)],
            "num_res_blocks": config["layers_per_block"],
            "channel_mult": [width // widths[0] for width in widths],
            "use_spatial_transformer": True,
            "use_linear_in_transformer": linear,
            "transformer_depth": config["transformer_layers_per_block"],
            "context_dim": config["cross_attention_dim"],
            "legacy": False,
        }
        | ({"num_head_channels": widths[0] // heads[0]} if linear else {"num_heads": heads[0]}),
    }


def _vae(config: dict[str, Any]) -> dict[str, Any]:
    widths = config["block_out_channels"]
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": config["latent_channels"],
            "ddconfig": {
                "double_z": True,
                "z_channels": config["latent_channels"],
                "resolution": 256,
                "in_channels": config["in_channels"],
                "out_ch": config["out_channels"],
                "ch": widths[0],
                "ch_mult": [width // widths[0] for width in widths],
                "num_res_blocks": config["layers_per_block"],
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


def _text_encoder(openclip: bool) -> dict[str, Any]:
    where = "ldm.modules.encoders.modules."
    if openclip:
        params = {"freeze": True, "layer": "penultimate"}
        return {"target": f"{where}FrozenOpenCLIPEmbedder", "params": params}
    return {"target": f"{where}FrozenCLIPEmbedder"}
