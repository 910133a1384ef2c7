"""Trains the base model of the demo from nothing: tokenizer, VAE, text encoder and UNet.

    python scripts/make_demo_base.py --work output/demo_base --out jaxft/builtin/demo/model

The pictures are drawn by `demo_world`, the networks and the step are jaxft's own. Every stage keeps
its results in the work folder; the same command goes on after an interruption, at the last state
saved. `tensorboard --logdir output/demo_base` shows the losses.

    python scripts/make_demo_base.py --start builtin:demo --work output/more --out output/model

takes VAE, text encoder and UNet from a finished model and trains the last two for another cycle.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import demo_world as world
import numpy as np
from demo_base import unet, vae

from jaxft import compile_cache, params, step
from jaxft.formats import diffusers_folder, families, layout

FIGURES = Path(__file__).parent / "demo_base" / "figures.md"
"""What `evaluate_demo.py` found, for the card."""


def make(work: Path, out: Path, seed: int, start: str | None = None) -> None:
    """All stages, or the last one from the model `start` on; writes the folder with its card."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = unet.write_tokenizer(work / "tokenizer")
    weights: step.Weights | None = None
    before: list[str] = []
    if start:
        lines = (layout.locate(start) / "README.md").read_text("utf-8").splitlines()
        before = [line for line in lines if line.startswith(("| VAE |", "| UNet"))]
        model = diffusers_folder.read(start)
        scaling_factor = model.parts["vae"].config["scaling_factor"]
        weights = {name: params.cast(part.params, np.float32) for name, part in model.parts.items()}
        autoencoder = weights.pop("vae")
    else:
        autoencoder = vae.train(work / "vae", seed)
        scaling_factor = vae.scaling_factor(autoencoder, seed)
    ids = {"bos_token_id": tokenizer.vocab_size - 2, "eos_token_id": tokenizer.vocab_size - 1}
    configs = {
        "unet": unet.UNET,
        "vae": vae.CONFIG | {"scaling_factor": scaling_factor},
        "text_encoder": unet.TEXT | {"vocab_size": tokenizer.vocab_size} | ids,
    }
    weights = unet.train(work, autoencoder, scaling_factor, tokenizer, configs, seed, weights)
    weights["vae"] = autoencoder
    parts = {name: diffusers_folder.Component(configs[name], weights[name]) for name in configs}
    tokenizers = {"text_encoder": work / "tokenizer"}
    model = diffusers_folder.Model(families.SD1, parts, unet.SCHEDULER, tokenizers, out)
    diffusers_folder.write(out, model, "fp16")
    (out / "README.md").write_text(card(work, seed, scaling_factor, before), "utf-8")
    print(f"wrote {out}")


def card(work: Path, seed: int, scaling_factor: float, before: Sequence[str] = ()) -> str:
    """The model card; `before`: the rows of the model's table that this one went on from."""
    sizes = ", ".join(f"{width}×{height}" for width, height in unet.NUM_SCENES)
    stages = [
        ("VAE", work / "vae", vae.RECIPE),
        ("UNet and text encoder", work / "unet", unet.RECIPE),
    ]
    if before:
        stages = [(f"UNet and text encoder, once more (seed {seed})", work / "unet", unet.AGAIN)]
    rows = "\n".join(
        [*before]
        + [
            f"| {title} | {joined(cycle.steps for cycle in recipe.cycles)} | {recipe.batch} "
            f"| {joined(cycle.lr for cycle in recipe.cycles)} | {last_loss(folder):.4f} |"
            for title, folder, recipe in stages
        ]
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, jaxft]
---

# jaxft's demo model

A small Stable Diffusion 1.x that paints coloured shapes: the base of jaxft's demo, called
`builtin:demo`. Its layout is that of Stable Diffusion 1.5 (four levels, cross-attention in three,
a VAE of 8× and four latent channels), its widths are tiny. It opens in diffusers, and in webuis
after `jaxft convert to-webui`.

It knows {len(world.SHAPES)} shapes ({", ".join(world.SHAPES)}), {len(world.COLOURS)} colours
({", ".join(world.COLOURS)}),
sizes, places, plain and patterned backgrounds, one figure or two:

- a small red star on a blue background
- a green ring left of a yellow square on a striped pink background

## Training

Nothing but pictures drawn by `scripts/demo_world.py`, and captions from its grammar. A tenth of all
combinations (a figure's shape and colour with the background's colour; the shapes and colours of
two figures) was never drawn.

| | steps, counted from the first | batch | peak rate | mean loss of the last 500 steps |
|---|---|---|---|---|
{rows}

Muon for matrices and kernels, AdamW for the rest; a rate that falls along a half cosine at the end
of each cycle, after the numbers of steps that the table names; gradients clipped to 1.
{sum(unet.NUM_SCENES.values())} pictures of {sizes} pixels
for the UNet (as many new ones for each seed), {unet.NO_CAPTION:.0%} of them without their caption.
Scaling factor
{scaling_factor:.4f}, measured: latents have unit variance. Made in float32 with
`python scripts/make_demo_base.py`, the row "once more" with `--start builtin:demo --seed 1`; stored
in float16.

## Measured

{FIGURES.read_text("utf-8") if FIGURES.exists() else ""}"""


def joined(values: Iterable[object]) -> str:
    """The values, in a cell of a table."""
    return ", ".join(map(str, values))


def last_loss(folder: Path, steps: int = 500) -> float:
    """The mean loss of a stage's last steps."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]["step"]
    return float(np.mean([record["total"] for record in records if record["step"] > last - steps]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains the base model of the demo.")
    parser.add_argument("--work", type=Path, default=Path("output/demo_base"))
    parser.add_argument("--out", type=Path, default=Path("jaxft/builtin/demo/model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="a finished model to go on from, such as builtin:demo")
    args = parser.parse_args()
    compile_cache.enable(".cache/xla")
    make(args.work, args.out, args.seed, args.start)
