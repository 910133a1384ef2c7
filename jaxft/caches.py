"""What is computed once, before the first step: the latents of images, the states of prompts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft import hosts, params
from jaxft import mesh as meshes
from jaxft import plan as plans
from jaxft import step as steps
from jaxft.data import latents, text_states
from jaxft.data.columns import joined
from jaxft.data.disk import Disk, Memory
from jaxft.data.loader import Dataset
from jaxft.diffusion import conditioning
from jaxft.models import clip, vae
from jaxft.models.vae import AutoencoderKL
from jaxft.params import abstract
from jaxft.plan import Plan
from jaxft.prediction import Weights
from jaxft.shapes import TEXT_STATES

PROMPTS_AT_ONCE = 8
"""On a device."""

ENCODER = ("encoder.", "quant_conv.")
"""Beginnings of the names of the VAE's weights that moments depend on."""


def fill(
    made: Plan,
    *,
    say: Callable[[str], None] = lambda text: None,
    stopped: Callable[[], object] = lambda: False,
) -> Plan:
    """The plan with the moments and states that its data sets want to be kept.

    Args:
        made: the plan.
        say: gets what a user should know.
        stopped: where it is true, the caches are left as far as they are.

    Raises:
        UserError: an image is gone or changed, or a cache's folder cannot be used.
    """
    datasets = [*made.datasets, *made.held_out]
    for key, field, compute in (
        ("cache_latents", "moments", _moments),
        ("cache_text", "text", _texts),
    ):
        # Data sets that share a folder share what they compute.
        by_folder: dict[str | None, list[Dataset]] = {}
        for dataset in datasets:
            if made.config.data[dataset.name][key]:
                folder = made.config.data[dataset.name].cache_dir
                by_folder.setdefault(folder, []).append(dataset)
        if by_folder:
            stores = compute(made, by_folder, say, stopped)
            datasets = [replace(d, **{field: stores.get(d.name)}) for d in datasets]
    trained = len(made.datasets)
    return made._replace(datasets=datasets[:trained], held_out=datasets[trained:])


def blank(made: Plan) -> Plan:
    """The plan as `fill` makes it, for its shapes: of what is to be kept, all numbers are 0."""
    encoders = [made.model.parts[name].config for name in made.model.family.text_encoders]
    width = made.model.parts["unet"].config["cross_attention_dim"]
    rows = 75 * made.config.model.tokenizer_repeats + 2
    pooled = encoders[-1].get("projection_dim", clip.FREE["projection_dim"])
    states = _Blank(dict(zip(TEXT_STATES, ((rows, width), (pooled,)), strict=True)))

    def filled(dataset: Dataset) -> Dataset:
        options = made.config.data[dataset.name]
        return replace(
            dataset,
            moments=Memory() if options.cache_latents else None,
            text=states if options.cache_text else None,
        )

    return made._replace(
        datasets=[*map(filled, made.datasets)], held_out=[*map(filled, made.held_out)]
    )


class _Blank(Memory):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = shapes

    def __missing__(self, key: tuple[str, str]) -> np.ndarray:
        return np.zeros(self._shapes[key[1]], np.float32)


Stores = dict[str, Memory | Disk]
"""Of each data set."""

Folders = Mapping[str | None, Sequence[Dataset]]
"""Folder of a cache (None: in memory) -> the data sets that it is for."""


def _moments(made: Plan, by_folder: Folders, say: Any, stopped: Any) -> Stores:
    config, weights = made.model.parts["vae"]
    graphdef, _ = abstract(lambda: AutoencoderKL(config))
    mesh, workers = meshes.local(made.mesh), max(made.config.train.workers, 1)
    where = meshes.batch_sharding(mesh)
    on_devices = _when_needed(mesh, {"vae": weights}, np.float32)
    compute = jax.jit(lambda w, pixels: steps.encode_pixels(graphdef, w["vae"], pixels))
    depends = {
        "recipe": latents.RECIPE,
        "vae": params.digest({n: w for n, w in weights.items() if n.startswith(ENCODER)}),
        "config": _told(config, vae.FREE),
    }
    stores: Stores = {}
    for folder, datasets in by_folder.items():
        wanted = joined([dataset.wanted for dataset in datasets])
        for part in hosts.shares(wanted, kept_in_common=folder is not None):
            store = latents.cache(
                part,
                lambda pixels: np.asarray(compute(on_devices(), jax.device_put(pixels, where))),
                batch_size=mesh.size,
                workers=workers,
                store=_store(folder, "latents", depends, workers=workers, say=say),
                stopped=stopped,
            )
            stores |= {dataset.name: store for dataset in datasets}
    return stores


def _texts(made: Plan, by_folder: Folders, say: Any, stopped: Any) -> Stores:
    config, family = made.config, made.model.family
    parts = {name: made.model.parts[name] for name in family.text_encoders}
    dtype = np.dtype(plans.COMPUTE[config.mixed_precision])
    networks = {n: abstract(lambda n=n: family.networks[n](parts[n].config))[0] for n in parts}
    mesh, workers = meshes.local(made.mesh), max(config.train.workers, 1)
    where = meshes.batch_sharding(mesh)
    on_devices = _when_needed(mesh, {name: part.params for name, part in parts.items()}, dtype)
    clip_skip, final_norm = family.text_layer(config.model.clip_skip, config.model.clip_final_norm)
    depends = {
        "recipe": text_states.RECIPE,
        "text_encoders": {
            name: [params.digest(part.params), _told(part.config, clip.FREE)]
            for name, part in parts.items()
        },
        "clip_skip": clip_skip,
        "final_norm": final_norm,
        "dtype": dtype.name,
    }
    rows = made.words.rows  # none of them is trained where prompts are encoded beforehand
    depends |= {"words": params.digest(rows)} if rows else {}

    @jax.jit
    def compute(weights: Weights, ids: list[jax.Array]) -> Any:
        encoders = [params.bind(networks[name], weights[name]) for name in parts]
        options = {"clip_skip": clip_skip, "final_norm": final_norm}
        return conditioning.encode_text(
            encoders, ids, conditioning.stack(jax.device_put(rows)), **options
        )

    def encode(ids: list[np.ndarray]) -> dict[str, np.ndarray]:
        states = compute(on_devices(), jax.device_put(ids, where))
        return dict(zip(TEXT_STATES, map(np.asarray, states), strict=True))

    stores: Stores = {}
    for folder, datasets in by_folder.items():
        wanted = joined([dataset.wanted_texts for dataset in datasets])
        for part in hosts.shares(wanted, kept_in_common=folder is not None):
            store = text_states.cache(
                part,
                encode,
                names=datasets[0].text_names,
                batch_size=PROMPTS_AT_ONCE * mesh.size,
                store=_store(folder, "prompts", depends, workers=workers, say=say),
                stopped=stopped,
            )
            stores |= {dataset.name: store for dataset in datasets}
    return stores


def _when_needed(mesh: Mesh, weights: Weights, dtype: Any) -> Callable[[], Weights]:
    """Casts weights and puts them on the devices when they are asked for, once."""

    @functools.cache
    def put() -> Weights:
        cast = {name: params.cast(part, dtype) for name, part in weights.items()}
        return jax.device_put(cast, meshes.shardings(mesh, cast))

    return put


def _told(config: Mapping[str, Any], free: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `config.json` that change what its network computes."""
    return {name: config.get(name, default) for name, default in free.items()}


def _store(folder: str | None, kind: str, depends: Mapping[str, Any], **options: Any):
    return Disk(Path(folder).expanduser() / kind, depends, **options) if folder else Memory()
