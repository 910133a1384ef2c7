"""What reading and converting model files costs, in time and memory.

    python scripts/bench_files.py load        # 2 GB in one file: to the device, beside reading it
    python scripts/bench_files.py convert     # Stable Diffusion XL, 7 GB: folder -> file -> folder

Weights are random numbers, written into a temporary folder that is removed afterwards. Each
measurement is a process of its own, so that its peak of memory is its own, and reads from the disk,
not from the system's cache.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxft import convert, tensor_file
from jaxft.formats import clip_tokenizer, diffusers_folder, layout, published, single_file
from jaxft.formats.diffusers_folder import Configs

GB = 1e9
BLOCK = 2**26


class Noise:
    """A random tensor in half precision, made when it is written."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.dtype = shape, np.dtype(np.float16)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        few = np.random.default_rng(0).standard_normal(4096).astype(np.float16)
        return np.resize(few, self.shape)


def write_model(folder: Path, configs: Configs) -> None:
    """A diffusers folder with these configurations and random weights in half precision."""
    for part, network in configs.family.networks.items():
        shapes = diffusers_folder.shapes(network, configs.parts[part])
        stored = {name: Noise(leaf.shape) for name, leaf in shapes.items()}
        tensor_file.write(folder / part / f"{layout.STEMS[part]}.safetensors", stored)
    diffusers_folder.write_configs(folder, configs)
    for part in configs.family.text_encoders:
        target = folder / layout.TOKENIZERS[part]
        target.mkdir()
        for file in clip_tokenizer.folder().iterdir():
            (target / file.name).write_bytes(file.read_bytes())


def read_once(path: Path) -> None:
    """Reads a file through one buffer."""
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def to_device(path: Path) -> None:
    """Opens a webui file and puts all its weights on the device."""
    model = single_file.read(path).model
    weights = {name: part.params for name, part in model.parts.items()}
    jax.block_until_ready(jax.device_put(weights))


def to_webui(path: Path) -> None:
    """Converts the folder to a file beside it."""
    file = path.with_name("m.safetensors")
    convert.main(["to-webui", "--model_path", str(path), "--save_path", str(file)])


def to_diffusers(path: Path) -> None:
    """Converts the file to a folder beside it."""
    folder = path.with_name("back")
    convert.main(["to-diffusers", "--model_path", str(path), "--save_path", str(folder)])


JOBS: dict[str, Callable[[Path], None]] = {
    "read once": read_once,
    "to the device": to_device,
    "to-webui": to_webui,
    "to-diffusers": to_diffusers,
}


def measure(job: str, path: Path) -> dict[str, float]:
    """Seconds, processor's seconds, and peak of memory in bytes, of a job in its own process."""
    command = [sys.executable, __file__, "job", "--job", job, "--path", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def forget(path: Path) -> None:
    """Takes files out of the system's cache, so that a job reads them from the disk."""
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_job(job: str, path: Path) -> None:
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # the device itself is not measured
    forget(path)
    start, used = time.perf_counter(), time.process_time()
    JOBS[job](path)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "cpu": used, "peak": peak}))


def line(job: str, found: dict[str, float]) -> str:
    return f"{job:<16}{found['seconds']:>9.1f} s{found['cpu']:>9.1f} s{found['peak'] / GB:>9.2f} GB"


def load(folder: Path) -> None:
    """Loading to the device beside reading the bytes, in turns."""
    write_model(folder / "m", published.SD15)
    to_webui(folder / "m")
    file = folder / "m.safetensors"
    print(f"{file.stat().st_size / GB:.2f} GB")
    times: dict[str, list[float]] = {"read once": [], "to the device": []}
    for _ in range(3):
        for job, seconds in times.items():
            found = measure(job, file)
            seconds.append(found["seconds"])
            print(line(job, found), flush=True)
    once, device = (float(np.median(seconds)) for seconds in times.values())
    print(f"to the device / read once: {device / once:.2f}")


def both_ways(folder: Path) -> None:
    """An XL model from folder to file and back."""
    write_model(folder / "m", published.SDXL)
    largest = (folder / "m" / "unet" / f"{layout.STEMS['unet']}.safetensors").stat().st_size
    print(f"largest component: {largest / GB:.2f} GB")
    for job, path in (("to-webui", folder / "m"), ("to-diffusers", folder / "m.safetensors")):
        found = measure(job, path)
        print(line(job, found), f"   peak / largest: {found['peak'] / largest:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["load", "convert", "job"])
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "job":
        run_job(args.job, args.path)
        return
    print(f"jax {jax.__version__}, numpy {np.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        {"load": load, "convert": both_ways}[args.what](Path(folder))


if __name__ == "__main__":
    main()
