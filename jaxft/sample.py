"""`python -m jaxft.sample`: images from text, or the merged model as a folder."""

import argparse
import functools
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxft import __version__, compat, compile_cache, controls, gallery, merging, params, pictures
from jaxft import config as configuration
from jaxft import mesh as meshes
from jaxft.cli import run
from jaxft.config import Config
from jaxft.data.prompt_weights import WeightedTokenizer
from jaxft.diffusion import conditioning, scheduler_config
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, embeddings, single_file
from jaxft.formats.diffusers_folder import Model
from jaxft.merging import MERGED, Addition
from jaxft.models.controlnet import ControlNetModel
from jaxft.sampling import Request, generate_images, make_table, prepare
from jaxft.shapes import NEGATIVE


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser("jaxft sample", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", "--cfg", required=True, help="YAML file, as configs/infer/…")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted.key=value")
    args = parser.parse_intermixed_args(argv)
    config, notices = configuration.load(args.config, args.overrides, "infer")
    for notice in notices:
        print(notice)
    make(config)
    return 0


def make(config: Config) -> None:
    """Writes the merged model if `save_model.path` is given, else images."""
    if config.save_model and config.save_model.path:
        save_model(config)
    else:
        sample(config)


def save_model(config: Config) -> None:
    """Writes the model with everything merged in as a diffusers folder."""
    folder = Path(config.save_model.path)
    if not config.save_model.to_safetensors:
        raise UserError("save_model.to_safetensors: only safetensors is written; leave it true")
    if folder.suffix in (".ckpt", ".safetensors"):
        raise UserError(
            f"save_model.path: {folder} is named like a file; save a folder, then run "
            f"`python -m jaxft.convert to-webui --model_path FOLDER --save_path {folder}`"
        )
    diffusers_folder.check_replaceable(folder)
    model = load_model(config)
    if config.controlnet:
        raise UserError("controlnet: is no part of a model that is saved; leave it out")
    if any(name.startswith(NEGATIVE) for name in model.parts):
        raise UserError(
            "save_model.path: a model has one set of weights, and LoRAs with a branch make two of "
            "them; leave branch out"
        )
    if config.new_components.scheduler:
        make_table(model, 1, config.new_components.scheduler)
    diffusers_folder.write(folder, model, config.save_model.dtype)
    print(f"wrote {folder}")


def sample(config: Config) -> None:
    """Writes num × bs images to `save.out_dir`."""
    compile_cache.enable(config.compile_cache)
    requests = make_requests(config)
    model = load_model(config)
    images = paint(requests, model, config)

    out_dir = Path(config.save.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    number = gallery.next_number(out_dir)
    for request, (pixels, finite) in zip(requests, images, strict=True):
        if not finite:
            remedy = "try dtype=bf16" if config.dtype == "fp16" else "are the weights damaged?"
            raise UserError(f"the image of seed {request.seed} is not made of numbers; {remedy}")
        write(out_dir, number, pixels, request, config, model)
        number += 1
    print(f"wrote {len(requests)} images to {out_dir}")


def make_requests(config: Config, seed: Any = None) -> list[Request]:
    """What to make, image by image; seeds are `seed`, else the configuration's, else drawn and
    printed.

    Raises:
        UserError: a list of another length than num × bs, or a seed out of range.
    """
    for key in ("num", "bs", "N_repeats"):
        if config[key] < 1:
            raise UserError(f"{key} must be at least 1, not {config[key]}")
    count = config.num * config.bs
    seed = config.seed if seed is None else seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**30)
        print(f"seed={seed}")
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    columns: dict[str, list[Any]] = {"seed": seeds}
    texts = {key: config[key] for key in ("prompt", "neg_prompt")}
    for key, value in {**texts, **pictures.keys(config)}.items():
        columns[key] = [value] * count if value is None or isinstance(value, str) else list(value)
    for key, column in columns.items():
        if len(column) != count:
            raise UserError(
                f"{key}: a list needs one entry for each of the num × bs = {count} images, "
                f"this has {len(column)}"
            )
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"seed: must lie between 0 and {2**32 - 1}")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [Request(row.pop("prompt"), row.pop("neg_prompt"), row.pop("seed"), row) for row in rows]


def paint(
    requests: Sequence[Request], model: Model, config: Config
) -> Iterator[tuple[np.ndarray, bool]]:
    """Each request's image [h, w, 3] uint8, and whether all of its numbers were finite. A device
    makes up to `bs` at a time. A progress bar is shown. What can be wrong is found before all.

    Raises:
        UserError: a prompt, the sampler, the size or a tokenizer is not usable.
    """
    tokenizers = make_tokenizers(model)
    if config.emb_dir:
        model = add_words(model, tokenizers, Path(config.emb_dir))
    mesh = meshes.make(devices=jax.devices()[: len(requests)])
    work = prepare(requests, model, config, tokenizers, mesh.size)
    held = {name: part.params for name, part in model.parts.items()}
    if not config.amp:
        dtype = params.DTYPES[config.dtype]
        held = {n: own if n == "vae" else params.cast(own, dtype) for n, own in held.items()}

    def structure(name: str) -> Any:
        classes = {**model.family.networks, controls.PART: ControlNetModel}
        network = classes[name.removeprefix(NEGATIVE)]
        return params.abstract(lambda: network(model.parts[name].config))[0]

    networks = {name: structure(name) for name in held}
    weights = jax.device_put(held, meshes.replicated(mesh))
    images = generate_images(work, model, networks, weights, config, mesh)
    images = itertools.islice(images, len(requests))  # others fill up the last batch
    # The first image waits for the compiler: the bar stands at 0 meanwhile.
    return iter(tqdm(images, total=len(requests), unit="image", desc="sampling"))


def load_model(config: Config) -> Model:
    """The model named in the configuration with parts merged and components replaced.

    Raises:
        UserError: a file of model, parts or components is missing or does not fit.
    """
    _check_paths(config)
    model, told = single_file.open_model(
        config.pretrained_model, revision=config.revision, variant=config.variant
    )
    print("\n".join(told), end="\n" if told else "")
    whole = _merged(model, config, "p")
    for group in _groups(config):
        if any(item.branch for item in group.lora.values()):
            other = _merged(model, config, "n").parts
            own = {f"{NEGATIVE}{n}": other[n] for n in MERGED[group.type] if n in other}
            whole = whole.replace(**own)
    if config.controlnet:
        whole = controls.read(config.controlnet, whole, "controlnet")
    return replace_components(whole, config.new_components)


def _merged(model: Model, config: Config, branch: str) -> Model:
    """The model with what `merge` puts into the networks that answer prompts (`p`), or negative
    prompts (`n`)."""
    average = config.merge.load_ema
    for group in _groups(config):
        networks = MERGED[group.type]
        parts = [Addition(item.path, item.alpha, item.layers) for item in group.part.values()]
        loras = [
            Addition(item.path, item.alpha, item.layers)
            for item in group.lora.values()
            if item.branch in (None, branch)
        ]
        model = merging.merge_parts(
            model,
            parts,
            base_model_alpha=group.base_model_alpha,
            networks=networks,
            average=average,
        )
        model = merging.merge_loras(model, loras, networks=networks, average=average)
    return model


def _groups(config: Config) -> list[Config]:
    """The groups of `merge`, in their order."""
    return [group for name, group in config.merge.items() if name != "load_ema"]


def _check_paths(config: Config) -> None:
    """Raises UserError where a file is given to a configuration that does not merge it."""
    for kind in ("part", "lora"):
        path = config[f"{kind}_path"]
        merged = {item.path for group in _groups(config) for item in group[kind].values()}
        if path and path not in merged:
            raise UserError(
                f"{kind}_path: this configuration merges no {kind}; use --config "
                f"configs/infer/t2i_{kind}.yaml"
            )


def replace_components(model: Model, new: Config) -> Model:
    """The model with the VAE and the sampler of `new_components`.

    A sampler's options that are not given have its class's defaults, as in diffusers; but the
    prediction type is then the model's own, which no choice of sampler changes.
    """
    if new.vae:
        model = model.replace(vae=compat.build(new.vae, "vae", "new_components.vae"))
    if new.scheduler:
        made = compat.build(new.scheduler, "sampler", "new_components.scheduler")
        own = {"prediction_type": model.scheduler.get("prediction_type", "epsilon")}
        model = model._replace(scheduler=own | made)
    return model


def make_tokenizers(model: Model) -> list[WeightedTokenizer]:
    """The tokenizers of the model's text encoders.

    Raises:
        UserError: one is unreadable, or has more tokens than its text encoder.
    """
    tokenizers = []
    for part, folder in model.tokenizers.items():
        tokenizer = WeightedTokenizer(folder)
        weights = model.parts[part].params
        size = len(weights[conditioning.TOKEN_TABLE])
        if tokenizer.vocab_size > size:
            raise UserError(
                f"{folder}: has {tokenizer.vocab_size} tokens, the text encoder knows {size}; "
                "they are of different models"
            )
        tokenizers.append(tokenizer)
    return tokenizers


def add_words(model: Model, tokenizers: Sequence[WeightedTokenizer], folder: Path) -> Model:
    """The model with the words of a folder of embeddings; its tokenizers learn them too.

    Raises:
        UserError: the folder has no embeddings, one does not fit the model, or a word is taken.
    """
    widths = embeddings.widths(model.configs)
    words = embeddings.read_folder(folder, widths)
    counts = {word: len(rows) for word, rows in words.items()}
    columns = embeddings.split(np.concatenate([*words.values()]), widths)
    for part, tokenizer, rows in zip(model.tokenizers, tokenizers, columns, strict=True):
        tokenizer.add_words(counts, first=len(model.parts[part].params[conditioning.TOKEN_TABLE]))
        for name in {part, f"{NEGATIVE}{part}"} & model.parts.keys():
            component = model.parts[name]
            weights = conditioning.add_rows(component.params, rows)
            model = model.replace(**{name: component._replace(params=weights)})
    print(f"words of {folder}: {', '.join(counts)}")
    return model


def write(
    folder: Path,
    number: int,
    pixels: np.ndarray,
    request: Request,
    config: Config,
    model: Model,
) -> None:
    """Writes an image with its settings in it, and beside it with `save.save_cfg`."""
    tree = config.to_dict()
    tree |= {"prompt": request.prompt, "neg_prompt": request.negative_prompt}
    tree |= {"seed": request.seed, "num": 1, "bs": 1}
    for key, file in request.files.items():
        if file is not None:
            *parents, last = key.split(".")
            functools.reduce(dict.__getitem__, parents, tree)[last] = file
    settings = {
        "Steps": config.infer_args.num_inference_steps,
        "Sampler": scheduler_config.display_name(model.scheduler),
        "CFG scale": config.infer_args.guidance_scale,
        "Seed": request.seed,
        "Size": f"{config.infer_args.width}x{config.infer_args.height}",
        "Model": Path(config.pretrained_model).name,
        "Version": f"jaxft {__version__}",
    }
    texts = {
        "parameters": gallery.parameters(request.prompt, request.negative_prompt, settings),
        "jaxft": json.dumps(tree),
    }
    name = gallery.image_name(number, request.seed, request.prompt, config.save.image_type)
    if config.save.save_cfg:
        text = configuration.to_yaml(tree)
        gallery.write_text(folder / f"{number}-{request.seed}-info.yaml", text)
    gallery.write_image(folder / name, pixels, texts, config.save.quality)


if __name__ == "__main__":
    run(main)
