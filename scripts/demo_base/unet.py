"""Tokenizer, text encoder and UNet of the demo's base model."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import demo_world as world
import jax
import jax.numpy as jnp
import numpy as np
import random_model
from tqdm import tqdm

from demo_base import vae as autoencoder
from demo_base.fit import Recipe, fit
from jaxft import params, step
from jaxft.data.tokens import Tokenizer
from jaxft.diffusion import schedule
from jaxft.formats import families
from jaxft.models.vae import AutoencoderKL
from jaxft.shapes import Params

UNET = random_model.UNET | {
    "block_out_channels": [32, 64, 96, 112],
    "cross_attention_dim": 64,
    "attention_head_dim": 2,
}
TEXT = random_model.TEXT | {"intermediate_size": 256}
SCHEDULER = random_model.SCHEDULER | {"beta_end": 0.02, "prediction_type": "v_prediction"}
"""More noise than Stable Diffusion's own at the end: in latents as small as these, a background of
one colour would still shine through. The velocity is learnt well at every level of noise."""

FIRST = Recipe(5000, 32, 2e-3, parts=2, decay=0.5)
SECOND = FIRST._replace(steps=12_500, before=FIRST)
RECIPE = SECOND._replace(steps=15_000, lr=1.2e-3, decay=1.0, before=SECOND)
"""Three cycles of the rate: each went on from the one before, as long as pictures became better."""

AGAIN = Recipe(3000, 32, 1.2e-3, parts=2)
"""One cycle more for a finished model."""

NUM_SCENES = {(128, 128): 11_200, (160, 96): 2400, (96, 160): 2400}
"""Pictures that the UNet learns from, of each size; every second one shows two figures."""

NO_CAPTION = 0.1
"""Share of images trained on without their caption, for classifier-free guidance."""


def write_tokenizer(folder: Path) -> Tokenizer:
    """CLIP's byte-pair encoding, with merges that make every word of the captions one token."""
    random_model.write_tokenizer(folder, merges(world.words()))
    return Tokenizer(folder)


def merges(words: Iterable[str]) -> list[str]:
    """Byte-pair merges, the most frequent first; Sennrich et al. 2016, algorithm 1.

    Ties are broken by the alphabet: the same words always give the same numbers of tokens.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    learnt = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        learnt.append(" ".join(best))
        pieces = [_merged(word, best) for word in pieces]
    return learnt


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def scene(seed: int, size: tuple[int, int], number: int) -> world.Scene:
    """Scene `number` of the training set of one size."""
    rng = np.random.default_rng((seed, *size, number))
    return world.random_scene(rng, size, 1 + number % 2)


def cache_moments(folder: Path, vae: Params, seed: int) -> dict[tuple[int, int], Any]:
    """The VAE's moments of all training scenes, float16 [n, h, w, 8] for each size, as files."""
    graphdef, _ = params.abstract(lambda: AutoencoderKL(autoencoder.CONFIG))
    encode = jax.jit(functools.partial(step.encode_pixels, graphdef, vae))
    folder.mkdir(exist_ok=True)
    cached = {}
    for (width, height), count in NUM_SCENES.items():
        file = folder / f"{width}x{height}.npy"
        if not file.exists():
            moments = np.empty((count, height // 8, width // 8, 8), np.float16)
            for first in tqdm(range(0, count, 32), f"encoding {width}x{height}"):
                numbers = range(first, first + 32)
                pictures = [world.paint(scene(seed, (width, height), i)) for i in numbers]
                moments[first : first + 32] = encode(np.stack(pictures))
            np.save(folder / "unfinished.npy", moments)
            (folder / "unfinished.npy").rename(file)
        cached[width, height] = np.load(file, mmap_mode="r")
    return cached


def unet_batch(
    cached: dict[tuple[int, int], Any], tokenizer: Tokenizer, batch: int, seed: int, number: int
) -> dict[str, np.ndarray]:
    """A batch of one size, as `jaxft.step` takes it; captions are made anew each time."""
    rng = np.random.default_rng((seed, 2, number))
    counts = np.array(list(NUM_SCENES.values()))
    size = list(NUM_SCENES)[rng.choice(len(counts), p=counts / counts.sum())]
    numbers = rng.integers(0, NUM_SCENES[size], batch)
    captions = [world.caption(scene(seed, size, int(i)), rng) for i in numbers]
    captions = ["" if rng.random() < NO_CAPTION else caption for caption in captions]
    return {
        "moments": cached[size][numbers].astype(np.float32),
        "input_ids": np.stack([tokenizer.encode(caption) for caption in captions]),
        "weight": np.ones(batch, np.float32),
    }


def train(
    folder: Path,
    vae: Params,
    scaling_factor: float,
    tokenizer: Tokenizer,
    configs: dict[str, dict[str, Any]],
    seed: int,
    weights: step.Weights | None = None,
) -> step.Weights:
    """The weights of UNet and text encoder, trained together; from nothing if none are given."""
    recipe = AGAIN if weights else RECIPE
    cached = cache_moments(folder / "latents", vae, seed)
    parts = {
        name: params.abstract(lambda name=name: families.SD1.networks[name](configs[name]))
        for name in ("unet", "text_encoder")
    }
    objective = step.Objective(
        {name: graphdef for name, (graphdef, _) in parts.items()},
        schedule.from_config(SCHEDULER),
        scaling_factor,
        jnp.float32,
    )
    if weights is None:
        rng = np.random.default_rng(seed)
        weights = {
            name: random_model.random_params(shapes, rng) for name, (_, shapes) in parts.items()
        }

    def loss(trainable, batch, key):
        return step.loss(objective, trainable, {}, batch, key)

    batch = functools.partial(unet_batch, cached, tokenizer, recipe.batch, seed)
    return fit(folder / "unet", recipe, weights, loss, batch, seed)
