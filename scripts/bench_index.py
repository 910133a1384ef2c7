"""A large set of captioned images, planned from an index and without one.

    python scripts/bench_index.py --images 1000000

The files are hard links to a few small photographs and captions, a thousand in each folder: what is
measured is what jaxft does for each of them. Prints seconds and peak memory of `jaxft plan` for ten
images (what the program itself takes) and for all of them, with an index; with `--first` before
that of the plan that reads all images and makes the index. Else it is made with each of the
different images decoded once. `--table` has the captions in one metadata.jsonl, `--held-out` a
share of the images that is held out.
"""

import argparse
import functools
import json
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

from jaxft.data import images, source

CAPTION = "of a place, in the light of the afternoon"
KINDS, PER_FOLDER = 64, 1000
"""Different images, each with a caption; files in a folder of each sort."""

RECIPE = {
    "_base_": ["configs/train/examples/fine-tuning.yaml"],
    "model": {"pretrained_model_name_or_path": "builtin:demo"},
    "data": {"dataset1": {"bucket": {"target_area": 32 * 32, "step_size": 8}}},
}


MEASURED = """
import sys
from jaxft import planning
planning.main(sys.argv[1:])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
"""Plans, and says the most memory that it had; what the kernel says of a child is the parent's."""


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    busy: float
    """Seconds of the processors: what it takes where nothing else runs, at most."""
    gigabytes: float
    """The most memory that it had at once."""


def write_kinds(folder: Path) -> list[tuple[Path, Path]]:
    """Images of different shapes, small so that they are soon decoded, and their captions."""
    folder.mkdir()
    pairs = []
    for number in range(KINDS):
        image, text = folder / f"{number}.png", folder / f"{number}.txt"
        with Image.open(SOURCES[number % len(SOURCES)]) as photo:
            size = (32 + number % 8, 32 + number // 8)
            photo.convert("RGB").resize(size).save(image)
        text.write_text(f"photograph {number} {CAPTION}\n")
        pairs.append((image, text))
    return pairs


def write_set(folder: Path, count: int, pairs: list[tuple[Path, Path]], table: bool) -> None:
    """A folder of folders of links; the captions as links too, or in a table."""
    rows = []
    for number in range(count):
        inner = folder / f"{number // PER_FOLDER:05d}"
        if number % PER_FOLDER == 0:
            inner.mkdir(parents=True)
        image, text = pairs[number % KINDS]
        name = f"{number:08d}"
        os.link(image, inner / f"{name}{image.suffix}")
        if table:
            row = {"file_name": f"{inner.name}/{name}{image.suffix}", "text": f"{name}, {CAPTION}"}
            rows.append(json.dumps(row))
        else:
            os.link(text, inner / f"{name}{text.suffix}")
    if table:
        (folder / "metadata.jsonl").write_text("\n".join(rows))


def build(photos: Path, kept: Path) -> None:
    """Makes the index, with each of the different images decoded once."""
    decode, kind = images.decode, images.kind
    images.decode, images.kind = functools.cache(decode), functools.cache(kind)
    source.index(photos, caption_file=photos, recursive=True, kept=kept)
    images.decode, images.kind = decode, kind


def plan(recipe: Path, photos: Path, held_out: float) -> Cost:
    """What `jaxft plan` takes for a set."""
    source = "data.dataset1.source.data_source1"
    command = [
        *(sys.executable, "-c", MEASURED, "--config", str(recipe)),
        *(f"{source}.img_root={photos}", f"{source}.caption_file={photos}"),
        *(f"{source}.recursive=true", f"index_cache={recipe.parent / 'index'}"),
        f"data.dataset1.held_out={held_out}",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    assert process.stdout
    told = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, told
    seconds = time.perf_counter() - started
    return Cost(seconds, usage.ru_utime + usage.ru_stime, int(told.split()[-1]) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the plan of a large set.")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--first", action="store_true", help="read all images with jaxft plan")
    parser.add_argument("--table", action="store_true", help="captions in one metadata.jsonl")
    parser.add_argument("--held-out", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        pairs = write_kinds(folder / "kinds")
        write_set(folder / "few", 10, pairs, args.table)
        write_set(folder / "all", args.images, pairs, args.table)
        time.sleep(2)  # files as young as that are not kept
        print(f"{args.images:,} images with captions", flush=True)
        if not args.first:
            build(folder / "all", folder / "index")
        first = {"first time": "all"} if args.first else {}
        for title, photos in ({"ten images": "few"} | first | {"again": "all"}).items():
            cost = plan(recipe, folder / photos, args.held_out)
            times = f"{cost.seconds:8.1f} s, {cost.busy:.1f} s of processors"
            print(f"  {title:12}{times}, {cost.gigabytes:.2f} GiB", flush=True)
        size = sum(path.stat().st_size for path in (folder / "index").iterdir())
        print(f"  index on disk{size / 2**20:7.0f} MiB")


if __name__ == "__main__":
    main()
