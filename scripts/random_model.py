"""Writes a small Stable Diffusion 1.x model with random weights, as a diffusers folder.

Its topology is SD 1.5's (four levels, cross-attention in three, 8× VAE), its widths are tiny:
something to try every program on where no model can be had. It paints noise.

    python scripts/random_model.py FOLDER
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import params
from jaxft.formats import clip_tokenizer, diffusers_folder, families
from jaxft.shapes import Params

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [32, 64, 96, 96],
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 128,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 32, 32],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "scaling_factor": 0.18215,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
MERGES = [
    "t h",
    "th e</w>",
    "a n",
    "i n",
    "o n</w>",
    "p h",
    "ph o",
    "pho t",
    "phot o</w>",
    "o f</w>",
]


def write_tokenizer(folder: Path, merges: Sequence[str] = MERGES) -> int:
    """A CLIPTokenizer of bytes and merges; returns the size of its vocabulary."""
    return clip_tokenizer.write(folder, merges)


def random_params(shapes: params.Shapes, rng: np.random.Generator) -> Params:
    """PyTorch's default initialisation: norms 1 and 0, the rest uniform within ±1/√fan_in."""
    out: dict[str, Any] = {}
    for name, leaf in shapes.items():
        if "norm" in name:
            out[name] = np.full(leaf.shape, float(name.endswith("weight")), np.float32)
        elif "embedding.weight" in name:
            out[name] = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        else:
            weight = shapes[name.removesuffix("bias").removesuffix("weight") + "weight"]
            bound = 1 / np.sqrt(np.prod(weight.shape[1:]))
            out[name] = rng.uniform(-bound, bound, leaf.shape).astype(np.float32)
    return out


def write(folder: Path, seed: int = 0) -> None:
    """Writes the model; the same seed gives the same bytes."""
    rng = np.random.default_rng(seed)
    tokenizer = folder.parent / f".{folder.name}.tokenizer"
    size = write_tokenizer(tokenizer)
    text = TEXT | {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
    configs = {"unet": UNET, "vae": VAE, "text_encoder": text}
    parts = {}
    for name, network in families.SD1.networks.items():
        shapes = diffusers_folder.shapes(network, configs[name])
        parts[name] = diffusers_folder.Component(configs[name], random_params(shapes, rng))
    tokenizers = {"text_encoder": tokenizer}
    model = diffusers_folder.Model(families.SD1, parts, SCHEDULER, tokenizers, folder)
    diffusers_folder.write(folder, model)
    for file in tokenizer.iterdir():
        file.unlink()
    tokenizer.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Writes a small Stable Diffusion with random weights."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.seed)
    print(f"wrote {args.folder}")
