"""jaxft's way from a file to a batch, beside Pillow alone and beside what a device can take.

    python scripts/bench_data.py

Images: photographs of scikit-image and scikit-learn, written again in several sizes, are decoded,
resized and cropped on all cores by jaxft (with its checks: SHA-256, orientation, transparency) and
by bare Pillow; the two take turns. Latents: the loader's batches of latents of 512x512 images for
Stable Diffusion 1, from a cache on disk and from one in memory. Building: that cache of the
images, decoded, encoded by a VAE of middling width and written, beside the VAE alone on as many
that are in memory. Prints three tables.
"""

import argparse
import io
import itertools
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import random_model
import skimage
import sklearn.datasets
from PIL import Image

from jaxft import params
from jaxft import step as steps
from jaxft.data import buckets, latents, loader, prompts, source
from jaxft.data.batches import BatchPlan
from jaxft.data.disk import Disk
from jaxft.data.tokens import Tokenizer
from jaxft.models.vae import AutoencoderKL

SOURCES = (
    Path(skimage.__file__).parent / "data" / "astronaut.png",
    Path(skimage.__file__).parent / "data" / "coffee.png",
    Path(skimage.__file__).parent / "data" / "rocket.jpg",
    Path(sklearn.datasets.__file__).parent / "images" / "china.jpg",
    Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg",
)
SIDES = (512, 768, 1024, 1600)
KINDS: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 92},
    "png": {"compress_level": 3},
    "webp": {"quality": 90},
}
SIZE = (512, 512)
CORES = len(os.sched_getaffinity(0))


def write_images(folder: Path, count: int) -> None:
    """Photographs in turn, of several widths and formats."""
    folder.mkdir()
    for number in range(count):
        with Image.open(SOURCES[number % len(SOURCES)]) as image:
            width = SIDES[number % len(SIDES)]
            height = round(image.height * width / image.width)
            image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        kind = list(KINDS)[number % len(KINDS)]
        image.save(folder / f"{number}.{kind}", **KINDS[kind])


def bare(path: Path) -> np.ndarray:
    """What Pillow alone does: decode, and scale the part that is kept."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        filter_ = Image.Resampling.LANCZOS if side > SIZE[0] else Image.Resampling.BICUBIC
        box = (left, top, left + side, top + side)
        return np.asarray(image.convert("RGB").resize(SIZE, filter_, box=box))


def in_turn(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The best time of each job, in seconds; the jobs take turns."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    return {name: min(found) for name, found in times.items()}


def bench_images(folder: Path, count: int, rounds: int) -> None:
    """Prints images a second of jaxft and of Pillow."""
    write_images(folder, count)
    records = source.index(folder).records
    with ThreadPoolExecutor(CORES) as pool:
        jobs = {
            "Pillow": lambda: list(pool.map(bare, [record.path for record in records])),
            "jaxft": lambda: list(pool.map(lambda r: source.pixels(r, SIZE), records)),
        }
        times = in_turn(jobs, rounds)
    print(f"decode, resize and crop to 512x512, {count} images, {CORES} threads")
    for name, seconds in times.items():
        print(f"  {name:10}{count / seconds:8.1f} images/s")
    print(f"  jaxft / Pillow: {times['Pillow'] / times['jaxft']:.2f}")


def bench_building(folder: Path, photos: Path, rounds: int) -> None:
    """Prints images a second that are cached, and that the VAE encodes."""
    widths = {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 16}
    config = random_model.VAE | widths
    graphdef, shapes = params.abstract(lambda: AutoencoderKL(config))
    weights = jax.device_put(random_model.random_params(shapes, np.random.default_rng(0)))
    compute = jax.jit(lambda w, pixels: steps.encode_pixels(graphdef, w, pixels))

    def encode(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(compute(weights, pixels))

    records = source.index(photos).records
    pixels = np.zeros((1, *SIZE, 3), np.uint8)
    encode(pixels)
    stores = itertools.count()

    def build() -> None:
        store = Disk(folder / f"built{next(stores)}", {})
        wanted = [(record, SIZE) for record in records]
        latents.cache(wanted, encode, batch_size=1, store=store)

    jobs = {"VAE alone": lambda: [encode(pixels) for _ in records], "cached": build}
    times = in_turn(jobs, rounds)
    print(f"\ncache of {len(records)} images of 512x512, VAE of widths 32, 64, 64, 64")
    for name, seconds in times.items():
        print(f"  {name:10}{len(records) / seconds:8.2f} images/s")
    print(f"  cached / VAE alone, times: {times['cached'] / times['VAE alone']:.2f}")


def bench_latents(folder: Path, count: int, seconds: float) -> None:
    """Prints latents a second that the loader gives from disk and from memory."""
    random_model.write_tokenizer(folder / "tokenizer")
    records = [
        source.Record(
            Path(), f"{n}.png", SIZE, f"{n:064x}", (f"photo {n}",), prompts.Recipe(), (0, 0, 0)
        )
        for n in range(count)
    ]
    shaped = buckets.fixed_bucket([SIZE] * count, target_size=list(SIZE))
    plan = BatchPlan(shaped, 8, seed=0, name="bench")
    tokenizers = [Tokenizer(folder / "tokenizer")]
    rng = np.random.default_rng(0)
    keys = [latents.key(record, SIZE) for record in records]
    built = time.perf_counter()
    with Disk(folder / "latents", {}) as store:
        for key in keys:
            store[key] = rng.standard_normal((64, 64, 8), np.float32)
    built = time.perf_counter() - built
    started = time.perf_counter()
    store = Disk(folder / "latents", {}, workers=CORES)
    lacking = store.missing(keys)
    checked = time.perf_counter() - started
    assert not lacking
    print(f"\nlatents of 512x512 images, {count} in {count / 8192:.2f} GiB, batches of 8")
    print(f"  written    {count / built:8.0f} latents/s")
    print(f"  checked    {count / checked:8.0f} latents/s, before the first step")
    memory = latents.Memory({key: store[key] for key in keys})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, moments in {"disk": store, "memory": memory}.items():
        dataset = loader.Dataset("bench", records, shaped, plan, tokenizers, moments=moments)
        print(f"  {name:10}{rate(dataset, seconds):9.0f} latents/s from the loader")
        if name == "disk":
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(f"  memory grew by {grown / 1024:.0f} MiB meanwhile")


def rate(dataset: loader.Dataset, seconds: float) -> float:
    """Images a second of the loader's batches."""
    stream = loader.open(dataset, workers=CORES)
    next(stream)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += len(next(stream)["weight"])
    elapsed = time.perf_counter() - started
    stream.close()
    return images / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the data pipeline.")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5, help="of reading latents, each way")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench_images(Path(name) / "images", args.images, args.rounds)
        bench_building(Path(name), Path(name) / "images", args.rounds)
        bench_latents(Path(name), args.latents, args.seconds)


if __name__ == "__main__":
    main()
