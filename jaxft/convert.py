"""`python -m jaxft.convert`: models between a diffusers folder and a webui's single file.

to-webui   --model_path DIR --save_path FILE [--half]
from-webui --model_path FILE --save_path DIR --config DIR
verify A B      do diffusers' own loaders see the same model in both?
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.cli import run
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, webui
from jaxft.formats.diffusers_folder import NETWORKS, Component, Model
from jaxft.formats.sd15 import SD15

TOLERANCE = 1e-2
"""Of an output's largest value: above what rounding the weights to half precision does."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxft convert", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("to-webui", help="diffusers folder -> one safetensors file")
    add_to_webui_arguments(command)
    command.set_defaults(run=to_webui)

    command = commands.add_parser("from-webui", help="one safetensors file -> diffusers folder")
    command.add_argument("--model_path", required=True, type=Path, help="webui file")
    command.add_argument("--save_path", required=True, type=Path, help="folder to write")
    command.add_argument(
        "--config",
        required=True,
        help="diffusers folder (or hub model) of the same architecture, for what a webui file "
        "lacks: configurations and tokenizer",
    )
    command.set_defaults(run=from_webui)

    command = commands.add_parser("verify", help="compare two models in diffusers (needs torch)")
    command.add_argument("a", type=Path, metavar="A", help="diffusers folder or webui file")
    command.add_argument("b", type=Path, metavar="B", help="diffusers folder or webui file")
    command.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference allowed, as a share of the output's largest value (%(default)s)",
    )
    command.set_defaults(run=verify)
    return parser


def add_to_webui_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `to-webui`, those of HCP-Diffusion's `diffusers2sd`."""
    parser.add_argument("--model_path", required=True, help="diffusers folder or hub model")
    parser.add_argument("--save_path", required=True, type=Path, help="file to write")
    parser.add_argument("--half", action="store_true", help="store half-precision weights")
    parser.add_argument(
        "--use_safetensors", action="store_true", help="always so; accepted for old scripts"
    )


def to_webui(args: argparse.Namespace) -> int:
    """Writes a diffusers folder as one file; weights keep their dtype unless `--half`."""
    path: Path = args.save_path
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"--save_path {path}: only safetensors is written; name it .safetensors")
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    if path.is_dir():
        raise UserError(f"--save_path {path}: a folder of this name is in the way")
    model = diffusers_folder.read(args.model_path)
    webui.write(path, model, "fp16" if args.half else None)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def from_webui(args: argparse.Namespace) -> int:
    """Writes a webui file as a diffusers folder; weights keep their dtype."""
    diffusers_folder.check_replaceable(args.save_path)
    like = diffusers_folder.locate(args.config)
    configs = diffusers_folder.read_configs(like)
    tokenizer = diffusers_folder.find_tokenizer(like)
    weights = webui.read(args.model_path, configs)
    parts = {part: Component(getattr(configs, part), getattr(weights, part)) for part in NETWORKS}
    model = Model(**parts, scheduler=configs.scheduler, tokenizer=tokenizer, folder=like)
    diffusers_folder.write(args.save_path, model, dtype=None)
    if weights.ignored:
        print(f"left out {len(weights.ignored)} keys that are no weights:")
        print("\n".join(f"  {key}" for key in weights.ignored))
    print(f"wrote {args.save_path}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Runs both models in diffusers on the same inputs; 1 if an output differs by too much."""
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
    folder = next((path for path in (args.a, args.b) if path.is_dir()), None)
    outputs = []
    for path in (args.a, args.b):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        with tempfile.TemporaryDirectory() as shipped:
            outputs.append(_outputs(path, folder or _shipped(Path(shipped))))
    print(f"{'output':<14}{'largest value':>16}{'largest difference':>22}{'share':>12}")
    differs = False
    for name, ours in outputs[0].items():
        theirs = outputs[1][name]
        if ours.shape != theirs.shape:
            raise UserError(f"{name}: {tuple(ours.shape)} in A, {tuple(theirs.shape)} in B")
        scale, difference = float(ours.abs().max()), float((ours - theirs).abs().max())
        share = difference / scale if scale else difference
        differs |= not share <= args.tolerance  # so that NaN differs
        print(f"{name:<14}{scale:>16.4g}{difference:>22.4g}{share:>12.2e}")
    print(f"{'different' if differs else 'the same'} (tolerance {args.tolerance:g})")
    return int(differs)


def _shipped(folder: Path) -> Path:
    """A folder of Stable Diffusion 1.5's configurations, for files that come without any."""
    for name, config in SD15._asdict().items():
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(config), "utf-8")
    index = diffusers_folder.model_index(SD15.unet, SD15.scheduler)
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder


def _outputs(path: Path, config: Path) -> dict[str, Any]:
    """Outputs (torch tensors) of a model's networks on inputs that are the same every time."""
    import torch

    pipeline = _open(path, config)
    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    generator = torch.Generator().manual_seed(0)
    sizes = text.config
    states = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    latents = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator)
    images = torch.rand(1, vae.config.in_channels, 64, 64, generator=generator) * 2 - 1
    small = torch.randn(1, vae.config.latent_channels, 8, 8, generator=generator)
    length = (1, sizes.max_position_embeddings)
    ids = torch.randint(sizes.vocab_size, length, generator=generator)
    with torch.no_grad():
        return {
            "unet": unet(latents, 500, states).sample,
            "vae encode": vae.encode(images).latent_dist.mean,
            "vae decode": vae.decode(small).sample,
            "text_encoder": text(ids).last_hidden_state,
        }


def _open(path: Path, config: Path) -> Any:
    """The model as diffusers' own loaders see it, float32, without tokenizer."""
    import torch
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    options: dict[str, Any] = {"local_files_only": True, "safety_checker": None, "tokenizer": None}
    options["dtype"] = torch.float32
    try:
        if path.is_dir():
            return StableDiffusionPipeline.from_pretrained(path, **options)
        return StableDiffusionPipeline.from_single_file(str(path), config=str(config), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: diffusers does not open it: {error}") from error


if __name__ == "__main__":
    run(main)
