"""Teaches a small model a new subject, in minutes, without a GPU or a download: `make demo`.

Runs the commands that a user would run, in one process, so that what one has compiled serves the
next: paints with the base model, trains it, paints the same with the trained one. Ends with a sheet
of both and a file for webuis, in `demo/`.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxft import cli, gallery, sample, train
from jaxft import config as configuration

FOLDER = Path("demo")
TRAINING, SHEET = "configs/train/examples/demo.yaml", "configs/infer/demo_sheet.yaml"
PROGRAMS = {"sample": sample.main, "train": train.main}

GAP, MARGIN, LINE = 2, 16, 30
"""Pixels between pictures, around blocks of them, and of a line of text."""

SUMMARY = """
before and after      {sheet}
file for webuis       {model}.safetensors
folder for diffusers  {model}

Try next, after `source .venv/bin/activate`:

  jaxft sample --config configs/infer/demo.yaml pretrained_model={model} \\
      prompt='a sks figure on a dotted pink background' infer_args.guidance_scale=1.5 seed=7
  jaxft sample --config configs/infer/demo.yaml prompt='a small red star on a blue background'
  jaxft plan --config configs/train/examples/demo.yaml
  jaxft train --config configs/train/examples/demo.yaml exp_dir=demo/no_class data.class=---

The last one trains without the class set: docs/demo.md says what that costs. With images and a
model of your own: docs/guide.md"""


def main(argv: Sequence[str]) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args(argv)
    before, after, trained = (FOLDER / name for name in ("before", "after", "run"))
    for folder in (before, after, trained):
        shutil.rmtree(folder, ignore_errors=True)
    model = trained / "export" / trained.name
    run("sample", "--config", SHEET, f"save.out_dir={before}")
    run("train", "--config", TRAINING, f"exp_dir={trained}")
    run("sample", "--config", SHEET, f"pretrained_model={model}", f"save.out_dir={after}")

    config, _ = configuration.load(SHEET, schema="infer")
    prompts = list(dict.fromkeys(config.prompt))
    blocks = {"before training": read_pictures(before), "after training": read_pictures(after)}
    sheet = FOLDER / "demo.png"
    gallery.write_image(sheet, contact_sheet(prompts, blocks), {}, quality=100)
    print(SUMMARY.format(sheet=sheet, model=model))
    return 0


def run(program: str, *arguments: str) -> None:
    """Shows a command and runs it; where it ends early (Ctrl-C), so does the demo."""
    print(f"\n$ jaxft {shlex.join([program, *arguments])}", flush=True)
    if code := PROGRAMS[program](arguments):
        sys.exit(code)


def read_pictures(folder: Path) -> np.ndarray:
    """The pictures that `jaxft sample` wrote, in the order of their numbers: uint8 [n, h, w, 3]."""
    paths = sorted(folder.glob("*.png"), key=lambda path: int(path.name.partition("-")[0]))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def contact_sheet(prompts: Sequence[str], blocks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Blocks of pictures side by side under their titles, uint8 [h, w, 3].

    Args:
        prompts: each above its row.
        blocks: title -> pictures, uint8 [n, h, w, 3], as many for each prompt, in their order.
    """
    num_pictures, height, width, _ = next(iter(blocks.values())).shape
    per_prompt = num_pictures // len(prompts)
    block_width, row_height = per_prompt * (width + GAP) + MARGIN, LINE + height
    size = MARGIN + len(blocks) * block_width, LINE + len(prompts) * row_height + MARGIN
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)

    def write(x: int, y: int, text: str, colour: str) -> None:
        draw.text((x, y + LINE // 2), text, colour, font, anchor="lm")

    for row, prompt in enumerate(prompts):
        write(MARGIN, LINE + row * row_height, prompt, "black")
    for block, (title, pictures) in enumerate(blocks.items()):
        left = MARGIN + block * block_width
        write(left, 0, title, "gray")
        for number, picture in enumerate(pictures):
            row, column = divmod(number, per_prompt)
            place = left + column * (width + GAP), 2 * LINE + row * row_height
            canvas.paste(Image.fromarray(picture), place)
    return np.asarray(canvas)


if __name__ == "__main__":
    cli.run(main)
