"""A large set of captioned images, planned from an index and without one.

    python scripts/bench_index.py --images 1000000

The files are hard links to a few small photographs and captions, a thousand in each folder: what is
measured is what jaxft does for each of them. Prints seconds and peak memory of `jaxft plan`, first
for ten images (what the program itself takes), then for all, read for the first time, and again.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml
from bench_data import SOURCES
from PIL import Image

KINDS, PER_FOLDER = 64, 1000
"""Different images, each with a caption; files in a folder of each sort."""

RECIPE = {
    "_base_": ["configs/train/examples/fine-tuning.yaml"],
    "model": {"pretrained_model_name_or_path": "builtin:demo"},
    "data": {"dataset1": {"cache_latents": False}},
}


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    gigabytes: float
    """The most memory that it had at once."""


def write_kinds(folder: Path) -> list[tuple[Path, Path]]:
    """Images of different shapes, small so that they are soon decoded, and their captions."""
    folder.mkdir()
    pairs = []
    for number in range(KINDS):
        image, text = folder / f"{number}.png", folder / f"{number}.txt"
        with Image.open(SOURCES[number % len(SOURCES)]) as photo:
            size = (16 + number % 8, 16 + number // 8)
            photo.convert("RGB").resize(size).save(image)
        text.write_text(f"photograph {number} of a place, in the light of the afternoon\n")
        pairs.append((image, text))
    return pairs


def write_set(folder: Path, count: int, pairs: list[tuple[Path, Path]]) -> None:
    """A folder of folders of links."""
    for number in range(count):
        inner = folder / f"{number // PER_FOLDER:05d}"
        if number % PER_FOLDER == 0:
            inner.mkdir(parents=True)
        for path in pairs[number % KINDS]:
            os.link(path, inner / f"{number:08d}{path.suffix}")


def plan(recipe: Path, photos: Path) -> Cost:
    """What `jaxft plan` takes for a set."""
    source = "data.dataset1.source.data_source1"
    command = [
        *(sys.executable, "-m", "jaxft.plan", "--config", str(recipe)),
        *(f"{source}.img_root={photos}", f"{source}.caption_file={photos}"),
        *(f"{source}.recursive=true", f"index_cache={recipe.parent / 'index'}"),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    assert process.stdout
    told = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, told
    return Cost(time.perf_counter() - started, usage.ru_maxrss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the plan of a large set.")
    parser.add_argument("--images", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        pairs = write_kinds(folder / "kinds")
        write_set(folder / "few", 10, pairs)
        write_set(folder / "all", args.images, pairs)
        time.sleep(2)  # files as young as that are not kept
        print(f"{args.images:,} images with captions", flush=True)
        for title, photos in (
            ("ten images", "few"),
            ("first time", "all"),
            ("again", "all"),
        ):
            cost = plan(recipe, folder / photos)
            print(f"  {title:12}{cost.seconds:8.1f} s  {cost.gigabytes:6.2f} GiB", flush=True)
        size = sum(path.stat().st_size for path in (folder / "index").iterdir())
        print(f"  index on disk{size / 2**20:7.0f} MiB")


if __name__ == "__main__":
    main()
