"""Counts how many of a demo model's pictures show what they should: the figures of its card.

    python scripts/evaluate_demo.py builtin:demo
    python scripts/evaluate_demo.py builtin:demo --unet demo/run/ckpts/unet-450.safetensors

Prompts are captions of combinations that training never showed; `judge` looks at the pictures.
Writes figures.json and a sheet of pictures for each kind of prompt, wrong ones framed in red.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import demo_subject as subject
import demo_world as world
import jax
import jax.numpy as jnp
import judge
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxft import cli, compile_cache, gallery, params, sample, step
from jaxft import config as configuration
from jaxft.config import Config
from jaxft.formats import diffusers_folder
from jaxft.models.vae import AutoencoderKL

CONFIG = "configs/infer/demo.yaml"
SIZE = world.SIZES[0]
BATCH = 20
NUM_SUBJECT = 50
"""Pictures asked for of the subject, at most."""

NUM_DECODED, DECODED_BATCH = 128, 16
"""Renders that the VAE's error is measured with, and how many at a time."""

SHEET, SHEET_COLUMNS, FRAME = 50, 10, 4
"""Pictures on a sheet at most, in a row, and pixels of frame around each."""


class Task(NamedTuple):
    """A picture to ask for, and what should be seen in it."""

    kind: str
    prompt: str
    seed: int
    background: str
    scene: world.Scene | None = None
    """None where it is the subject."""


class Verdict(NamedTuple):
    """What the judge says of a picture."""

    right: bool
    """The figures' shapes and colours, or the subject."""
    relation: bool
    """Besides, of two figures: that they lie as the prompt says."""
    background: bool


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    args = read_arguments(argv)
    config = make_config(args)
    compile_cache.enable(config.compile_cache)
    model = sample.load_model(config)
    tasks = [task for kind in args.prompts for task in TASKS[kind](kind, args)]
    pictures = paint(tasks, model, config)
    verdicts = [judged(task, picture) for task, picture in zip(tasks, pictures, strict=True)]

    args.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"vae_psnr": round(measure_vae(model.parts["vae"], args.seed), 2)}
    for kind in args.prompts:
        at = [number for number, task in enumerate(tasks) if task.kind == kind]
        figures[kind] = tally([tasks[i] for i in at], [verdicts[i] for i in at])
        shown = sheet([pictures[i] for i in at[:SHEET]], [_whole(verdicts[i]) for i in at[:SHEET]])
        gallery.write_image(args.out / f"{kind}.png", shown, {}, 100)
    rows = [
        {"kind": task.kind, "prompt": task.prompt, "seed": task.seed, **verdict._asdict()}
        for task, verdict in zip(tasks, verdicts, strict=True)
    ]
    everything = {"arguments": vars(args), **figures, "pictures": rows}
    text = json.dumps(everything, indent=1, default=str)
    gallery.write_text(args.out / "figures.json", f"{text}\n")
    print("\n".join(table(figures)))
    print(f"wrote {args.out}")
    return 0


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `prompts` is a list of kinds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="builtin:demo, or a folder in diffusers format")
    parser.add_argument("--unet", type=Path, help="part file with trained weights")
    parser.add_argument("--text-encoder", type=Path, help="part file with trained weights")
    parser.add_argument("--images", type=int, default=200, help="for each kind of prompt")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("output/evaluation"))
    parser.add_argument("--prompts", choices=[*TASKS, "all"], default="all")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error("--images must be at least 1")
    args.prompts = list(TASKS) if args.prompts == "all" else [args.prompts]
    return args


def make_config(args: argparse.Namespace) -> Config:
    """The configuration with which `jaxft sample` would make the same pictures."""
    values = {
        "pretrained_model": args.model,
        "bs": BATCH,
        "compile_cache": ".cache/xla",
        "infer_args.guidance_scale": args.guidance,
        "infer_args.num_inference_steps": args.steps,
    }
    for kind, part in {"unet": args.unet, "TE": args.text_encoder}.items():
        if part is not None:
            values |= {f"merge.{kind}.type": kind, f"merge.{kind}.part.0.path": str(part)}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return configuration.load(CONFIG, overrides, "infer")[0]


def scene_tasks(kind: str, args: argparse.Namespace) -> list[Task]:
    """Captions, telling all, of scenes kept out of training."""
    num_figures = {"one": 1, "two": 2}[kind]
    rng = np.random.default_rng((args.seed, num_figures))
    scenes = [world.random_scene(rng, SIZE, num_figures, kept_out=True) for _ in range(args.images)]
    return [
        Task(kind, full_caption(scene, rng), args.seed + i, scene.background.colour, scene)
        for i, scene in enumerate(scenes)
    ]


def full_caption(scene: world.Scene, rng: np.random.Generator) -> str:
    """A caption that names the shapes, the relation and the background's colour."""
    colour = scene.background.colour
    while True:
        words = (text := world.caption(scene, rng)).split()
        ground = any(name in words for name in world.SYNONYMS.get(colour, (colour,)))
        if ground and not {world.CLASS, "and"} & set(words):
            return text


def subject_tasks(kind: str, args: argparse.Namespace) -> list[Task]:
    """The subject on each of its plain backgrounds in turn."""
    colours = [subject.BACKGROUNDS[i % len(subject.BACKGROUNDS)] for i in range(NUM_SUBJECT)]
    return [
        Task(
            kind,
            subject.caption(world.Background(colour, "plain"), subject.NAME),
            args.seed + i,
            colour,
        )
        for i, colour in enumerate(colours[: args.images])
    ]


TASKS: dict[str, Callable[[str, argparse.Namespace], list[Task]]] = {
    "one": scene_tasks,
    "two": scene_tasks,
    "subject": subject_tasks,
}
"""Kind of prompt -> the tasks of that kind."""


def paint(tasks: Sequence[Task], model: diffusers_folder.Model, config: Config) -> list[np.ndarray]:
    """The model's picture for each task, uint8 [h, w, 3]."""
    # A smaller batch would be compiled anew.
    padded = [*tasks, *tasks[-1:] * (-len(tasks) % config.bs)]
    requests = [sample.Request(task.prompt, "", task.seed) for task in padded]
    images = list(sample.paint(requests, model, config))
    # The judge sees for itself what is no number.
    return [pixels for pixels, _ in images[: len(tasks)]]


def judged(task: Task, picture: np.ndarray) -> Verdict:
    """Whether a picture shows what it should."""
    ground = judge.background(picture) == task.background
    if task.scene is None:
        right = judge.shows_subject(picture)
        return Verdict(right, right, ground)
    right = judge.shows(picture, task.scene)
    relation = not task.scene.relation or judge.relation_holds(picture, task.scene)
    return Verdict(right, right and relation, ground)


def _whole(verdict: Verdict) -> bool:
    return verdict.right and verdict.relation


def tally(tasks: Sequence[Task], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares, 0 … 1, of right pictures: of all, and of one figure by shape and by colour."""

    def share(values: Sequence[bool]) -> float:
        return round(float(np.mean(values)), 4)

    shares: dict[str, Any] = {"images": len(tasks)}
    shares |= {name: share([getattr(v, name) for v in verdicts]) for name in Verdict._fields}
    if tasks[0].kind != "two":
        del shares["relation"]
    if tasks[0].kind == "one":
        for name, values in {"shape": world.SHAPES, "colour": world.COLOURS}.items():
            shares[f"by_{name}"] = {
                value: share(right)
                for value in values
                if (
                    right := [
                        verdict.right
                        for task, verdict in zip(tasks, verdicts, strict=True)
                        if task.scene and getattr(task.scene.figures[0], name) == value
                    ]
                )
            }
    return shares


def measure_vae(vae: diffusers_folder.Component, seed: int) -> float:
    """Mean PSNR in decibels of renders kept out of training, through latents' means and back."""
    graphdef, _ = params.abstract(lambda: AutoencoderKL(vae.config))

    @jax.jit
    def squared_error(weights, pixels):
        mean, _ = jnp.split(step.encode_pixels(graphdef, weights, pixels), 2, axis=-1)
        images = params.bind(graphdef, weights).decode(mean)
        decoded = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255)
        return jnp.mean((decoded - pixels) ** 2, axis=(1, 2, 3))  # [b]

    rng = np.random.default_rng((seed, 3))
    weights, errors = jax.device_put(params.cast(vae.params, jnp.float32)), []
    for _ in tqdm(range(0, NUM_DECODED, DECODED_BATCH), unit="batch", desc="decoding"):
        scenes = [world.random_scene(rng, SIZE, 1 + i % 2, True) for i in range(DECODED_BATCH)]
        errors.append(squared_error(weights, np.stack([world.paint(scene) for scene in scenes])))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(np.concatenate(errors), 1e-3))))


def sheet(pictures: Sequence[np.ndarray], right: Sequence[bool]) -> np.ndarray:
    """Pictures in rows, uint8 [h, w, 3]; a red frame around the wrong ones, else a white one."""
    height, width = (length + 2 * FRAME for length in pictures[0].shape[:2])
    num_rows = -(-len(pictures) // SHEET_COLUMNS)
    canvas = Image.new("RGB", (SHEET_COLUMNS * width, num_rows * height), "white")
    for number, (picture, is_right) in enumerate(zip(pictures, right, strict=True)):
        y, x = divmod(number, SHEET_COLUMNS)
        if not is_right:
            canvas.paste((220, 0, 0), (x * width, y * height, (x + 1) * width, (y + 1) * height))
        canvas.paste(Image.fromarray(picture), (x * width + FRAME, y * height + FRAME))
    return np.asarray(canvas)


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The lines to print."""
    yield f"{'prompts':9}{'images':>8}{'right':>8}{'+relation':>11}{'background':>12}"
    for kind in TASKS:
        if kind in figures:
            shares = figures[kind]
            relation = f"{shares['relation']:.1%}" if "relation" in shares else "–"
            yield (
                f"{kind:9}{shares['images']:8}{shares['right']:8.1%}{relation:>11}"
                f"{shares['background']:12.1%}"
            )
    for name in ("shape", "colour"):
        if by := figures.get("one", {}).get(f"by_{name}"):
            yield f"{name}: " + ", ".join(f"{value} {share:.0%}" for value, share in by.items())
    yield f"VAE: {figures['vae_psnr']:.1f} dB"


if __name__ == "__main__":
    cli.run(main)
