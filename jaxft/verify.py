"""Do diffusers' own loaders see the same model in two places? Needs PyTorch and diffusers."""

import json
import tempfile
from pathlib import Path
from typing import Any

from jaxft import tensor_file
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, layout, published, webui

TOLERANCE = 1e-2
"""Of an output's largest value: above what rounding the weights to half precision does."""


def verify(a: Path, b: Path, tolerance: float = TOLERANCE) -> int:
    """Runs both models in diffusers on the same inputs; prints the differences.

    Args:
        a, b: diffusers folders, or webui files.
        tolerance: largest difference allowed, as a share of the output's largest value.

    Returns:
        1 if an output differs by more, else 0.

    Raises:
        UserError: PyTorch is not installed, or diffusers does not open a model.
    """
    try:
        import diffusers
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"verify compares in diffusers and PyTorch, and {error.name} is not installed: "
            "pip install torch diffusers transformers accelerate"
        ) from None
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    folder = next((path for path in (a, b) if path.is_dir()), None)
    outputs = []
    for path in (a, b):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        with tempfile.TemporaryDirectory() as shipped:
            outputs.append(_outputs(path, folder or _shipped(path, Path(shipped))))
    if outputs[0].keys() != outputs[1].keys():
        raise UserError(f"{a} has {', '.join(outputs[0])}; {b} has {', '.join(outputs[1])}")
    print(f"{'output':<16}{'largest value':>16}{'largest difference':>22}{'share':>12}")
    differs = False
    for name, ours in outputs[0].items():
        theirs = outputs[1][name]
        if ours.shape != theirs.shape:
            raise UserError(f"{name}: {tuple(ours.shape)} in A, {tuple(theirs.shape)} in B")
        scale, difference = float(ours.abs().max()), float((ours - theirs).abs().max())
        share = difference / scale if scale else difference
        differs |= not share <= tolerance  # so that NaN differs
        print(f"{name:<16}{scale:>16.4g}{difference:>22.4g}{share:>12.2e}")
    print(f"{'different' if differs else 'the same'} (tolerance {tolerance:g})")
    return int(differs)


def _shipped(path: Path, folder: Path) -> Path:
    """A folder of the published configurations of a file's family."""
    family = webui.detect(tensor_file.read_header(path).tensors, str(path))
    configs = next(known for known in published.ALL.values() if known.family == family)
    diffusers_folder.write_configs(folder, configs)
    return folder


def _outputs(path: Path, config: Path) -> dict[str, Any]:
    """Outputs (torch tensors) of a model's networks on inputs that are the same every time."""
    import torch

    pipeline = _open(path, config)
    unet, vae = pipeline.unet, pipeline.vae
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    latents = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator)
    images = torch.rand(1, vae.config.in_channels, 64, 64, generator=generator) * 2 - 1
    small = torch.randn(1, vae.config.latent_channels, 8, 8, generator=generator)
    added = None
    if unet.config.addition_embed_type:
        numbers = 5 if getattr(pipeline, "text_encoder", None) is None else 6
        pooled = unet.config.projection_class_embeddings_input_dim
        pooled -= numbers * unet.config.addition_time_embed_dim
        added = {
            "text_embeds": torch.randn(1, pooled, generator=generator),
            "time_ids": torch.rand(1, numbers, generator=generator) * 1024,
        }
    with torch.no_grad():
        outputs = {
            "unet": unet(latents, 500, states, added_cond_kwargs=added).sample,
            "vae encode": vae.encode(images).latent_dist.mean,
            "vae decode": vae.decode(small).sample,
        }
        for name in layout.TOKENIZERS:
            text = getattr(pipeline, name, None)
            if text is None:
                continue
            length = (1, text.config.max_position_embeddings)
            found = text(torch.randint(text.config.vocab_size, length, generator=generator))
            outputs[name] = found.last_hidden_state
            if hasattr(found, "text_embeds"):
                outputs[f"{name} pooled"] = found.text_embeds
    return outputs


def _open(path: Path, config: Path) -> Any:
    """The model as diffusers' own loaders see it, float32, without tokenizer."""
    import diffusers
    import torch

    index = json.loads((config / "model_index.json").read_text("utf-8"))
    pipeline = getattr(diffusers, index["_class_name"])
    options: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32}
    options |= dict.fromkeys(layout.TOKENIZERS.values() & index.keys())
    if "safety_checker" in index:
        options["safety_checker"] = None
    try:
        if path.is_dir():
            return pipeline.from_pretrained(path, **options)
        return pipeline.from_single_file(str(path), config=str(config), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: diffusers does not open it: {error}") from error
