"""Makes `tests/data/flax`: a tiny pipeline as the Flax models of diffusers 0.35 wrote it.

It needs an environment of its own, in which those models still are:

    pip install diffusers==0.35.2 transformers==4.53.3 flax==0.10.4 jax==0.4.38 'numpy<2.3' torch
    python tests/data_flax.py tests/data/flax

The PyTorch twin, from which the weights are taken, is made in the same way in `test_flax_folder`.
"""

import json
import sys
from pathlib import Path
from typing import Any

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32),  # the Flax model has 32 groups always
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 4, 4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "projection_dim": 8,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 63,
}


def main(folder: Path) -> None:
    """Writes the pipeline's networks and scheduler."""
    import diffusers
    import transformers

    models: Any = diffusers  # today's release lacks what is asked for
    texts: Any = transformers
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.weights import randomise

    text = texts.CLIPTextModel(texts.CLIPTextConfig(**TEXT))
    networks = {
        "unet": (models.UNet2DConditionModel(**UNET), models.FlaxUNet2DConditionModel, 1),
        "vae": (models.AutoencoderKL(**VAE), models.FlaxAutoencoderKL, 2),
        "text_encoder": (text, texts.FlaxCLIPTextModel, 3),
    }
    for part, (module, flax_class, seed) in networks.items():
        twin = folder / f"{part}.torch"
        randomise(module, seed).save_pretrained(twin, safe_serialization=False)
        loaded = flax_class.from_pretrained(twin, from_pt=True)
        if part == "text_encoder":
            loaded.save_pretrained(folder / part)
        else:
            model, weights = loaded
            model.save_pretrained(folder / part, params=weights)
        for file in twin.iterdir():
            file.unlink()
        twin.rmdir()
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    models.FlaxPNDMScheduler(skip_prk_steps=True, steps_offset=1, **schedule).save_pretrained(
        folder / "scheduler"
    )
    index = {"_class_name": "FlaxStableDiffusionPipeline", "_diffusers_version": "0.35.2"}
    (folder / "model_index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
