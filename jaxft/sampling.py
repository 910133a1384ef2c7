"""From prompts and seeds to images: what `jaxft sample` and previews have in common."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft import controls, params, pictures
from jaxft import mesh as meshes
from jaxft.config import Config
from jaxft.data.prompt_weights import WeightedText, WeightedTokenizer, parse
from jaxft.diffusion import generate, scheduler_config
from jaxft.diffusion.generate import Networks, Prompts, Seen, Side
from jaxft.diffusion.samplers import Table
from jaxft.errors import UserError
from jaxft.formats.diffusers_folder import Model
from jaxft.models import vae
from jaxft.shapes import NEGATIVE, Latents


class Request(NamedTuple):
    """One image to make."""

    prompt: str
    negative_prompt: str
    seed: int
    files: Mapping[str, str | None] = {}
    """The pictures that it is made by, as `pictures.keys`."""


class Work(NamedTuple):
    """What is to be sampled, as numbers."""

    table: Table
    batches: list[tuple[Prompts, Prompts, Latents, Seen]]
    """Prompts, negative prompts, noise and pictures of some images at a time."""


def prepare(
    requests: Sequence[Request],
    model: Model,
    config: Config,
    tokenizers: Sequence[WeightedTokenizer],
    num_devices: int = 1,
) -> Work:
    """Requests as numbers, for each device up to `bs` of a batch.

    The last request is repeated as often as fills up the last batch of several devices.

    Raises:
        UserError: a prompt, the sampler, the size or a picture is not usable.
    """
    pictures.check(config, model)
    texts = [(parse(r.prompt), parse(r.negative_prompt)) for r in requests]
    steps = config.infer_args.num_inference_steps
    table = make_table(model, steps, config.new_components.scheduler)
    seeds, size = [request.seed for request in requests], config.infer_args
    noise = make_noise(config, model, seeds)
    files = [request.files for request in requests]
    seen = pictures.read(files, (size.width, size.height), seeds, noise)
    _warn_of_cut(tokenizers[0], texts, config.N_repeats)
    each = min(config.bs, -(-len(texts) // num_devices))  # images of a device
    batches = make_batches(texts, noise, seen, config, tokenizers, each * num_devices)
    return Work(table, list(batches))


def make_table(model: Model, steps: int, replaced: Any) -> Table:
    """The sampler's table; a user's options are checked more strictly than a file's."""
    where = "new_components.scheduler" if replaced else str(model.folder / "scheduler")
    return scheduler_config.table(model.scheduler, steps, where=where, strict=bool(replaced))


def make_noise(config: Config, model: Model, seeds: Sequence[int]) -> Latents:
    """Initial noise of unit variance for every image, [n, h, w, 4].

    Raises:
        UserError: a size that the VAE cannot make, or a file of latents that does not fit.
    """
    scale = vae.downsampling(model.parts["vae"].config)
    width, height = config.infer_args.width, config.infer_args.height
    for key, size in (("width", width), ("height", height)):
        if size < scale or size % scale:
            raise UserError(f"infer_args.{key} must be a multiple of {scale}, not {size}")
    channels = model.parts["vae"].config.get("latent_channels", 4)
    if not config.infer_args.latents:
        return generate.initial_noise(seeds, height // scale, width // scale, channels)
    path, shape = config.infer_args.latents, (len(seeds), channels, height // scale, width // scale)
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"infer_args.latents: {path} is no readable .npy file: {error}") from None
    if not isinstance(noise, np.ndarray) or noise.shape != shape:
        found = getattr(noise, "shape", "several arrays")
        raise UserError(f"infer_args.latents: {path} is {found}, needed is {shape}")
    return jax.numpy.asarray(np.moveaxis(noise, 1, -1), jax.numpy.float32)


def _warn_of_cut(
    tokenizer: WeightedTokenizer, texts: Sequence[tuple[WeightedText, WeightedText]], repeats: int
) -> None:
    for text in dict.fromkeys(side.text for pair in texts for side in pair):
        if not tokenizer.fits(text, repeats):
            print(f"cut after {75 * repeats} tokens (raise N_repeats to keep all): {text!r}")


def make_batches(
    texts: Sequence[tuple[WeightedText, WeightedText]],
    noise: Latents,
    seen: Seen,
    config: Config,
    tokenizers: Sequence[WeightedTokenizer],
    size: int,
) -> Iterator[tuple[Prompts, Prompts, Latents, Seen]]:
    """Arguments of the program, `size` images at a time: prompts, negative prompts, noise and
    pictures."""
    is_weighted = any(weight != 1 for pair in texts for side in pair for weight in side.weights)

    def encode(side: Sequence[WeightedText]) -> Prompts:
        def rows(tokenizer: WeightedTokenizer) -> list[np.ndarray]:
            pairs = (tokenizer.encode_weighted(text, config.N_repeats) for text in side)
            return [np.stack(column) for column in zip(*pairs, strict=True)]

        input_ids, weights = zip(*map(rows, tokenizers), strict=True)
        # The weights are of the words: for every tokenizer the same.
        return Prompts(tuple(input_ids), weights[0] if is_weighted else None)

    for start in range(0, len(texts), size):
        rows = np.minimum(np.arange(start, start + size), len(texts) - 1)
        positive, negative = zip(*(texts[row] for row in rows), strict=True)
        own = jax.tree.map(lambda of_all, rows=rows: of_all[rows], (noise, seen))
        yield encode(positive), encode(negative), *own


def generate_images(
    work: Work,
    model: Model,
    networks: Mapping[str, Any],
    weights: Mapping[str, Any],
    config: Config,
    mesh: Mesh | None = None,
) -> Iterator[tuple[np.ndarray, bool]]:
    """Each image [h, w, 3] uint8, and whether all of its numbers were finite.

    Args:
        work: what to sample.
        model: whose images they are.
        networks: network -> its structure (`nnx.GraphDef`); `negative_unet`, … where there are
            others for negative prompts.
        weights: the same networks -> their weights on the devices.
        config: of sampling.
        mesh: devices that share each batch, which they divide; None: all compute the whole.
    """
    family, scale = model.family, float(config.infer_args.guidance_scale)
    clip_skip, final_norm = family.text_layer(config.clip_skip, config.clip_final_norm)
    structures, held = (_grouped(of, model, scale) for of in (networks, weights))
    program = generate.program(
        structures,
        scaling_factor=model.parts["vae"].config.get("scaling_factor", 0.18215),
        clip_skip=clip_skip,
        final_norm=final_norm,
        dtype=params.DTYPES[config.dtype],
    )
    strength = float(config.infer_args.controlnet_conditioning_scale)
    for positive, negative, noise, seen in work.batches:
        rows = generate.guided_by(scale, negative, positive), noise, seen
        if mesh is not None:
            rows = jax.device_put(rows, meshes.batch_sharding(mesh))
        prompts, noise, seen = rows
        made = program(held, prompts, scale, noise, work.table, seen, strength)
        pixels, finite = meshes.fetch(made)
        yield from zip(pixels, finite.tolist(), strict=True)


def _grouped(of: Mapping[str, Any], model: Model, scale: float) -> Networks:
    """Structures or weights as the program takes them, of the prompts that guidance asks about."""

    def side(start: str) -> Side:
        unet, *encoders = (
            of.get(f"{start}{name}", of[name]) for name in ("unet", *model.family.text_encoders)
        )
        return Side(unet, tuple(encoders))

    own = any(name.startswith(NEGATIVE) for name in of)
    sides = generate.guided_by(scale, side(NEGATIVE), side("")) if own else [side("")]
    return Networks(tuple(sides), of["vae"], of.get(controls.PART))
