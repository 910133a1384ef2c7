"""From prompts and seeds to images: what `jaxft sample` and previews have in common."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import mesh as meshes
from jaxft import params
from jaxft.config import Config
from jaxft.data.prompt_weights import WeightedText, WeightedTokenizer, parse
from jaxft.diffusion import generate, scheduler_config
from jaxft.diffusion.generate import Networks, Prompts
from jaxft.diffusion.samplers import Table
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder
from jaxft.formats.diffusers_folder import Model
from jaxft.models import vae
from jaxft.shapes import Latents


class Request(NamedTuple):
    """One image to make."""

    prompt: str
    negative_prompt: str
    seed: int


class Work(NamedTuple):
    """What is to be sampled, as numbers."""

    table: Table
    batches: list[tuple[Prompts, Prompts, Latents]]
    """Prompts, negative prompts and noise of `bs` images at a time."""


def prepare(
    requests: Sequence[Request],
    model: Model,
    config: Config,
    tokenizers: Sequence[WeightedTokenizer],
) -> Work:
    """Requests as numbers.

    Raises:
        UserError: a prompt, the sampler or the size is not usable.
    """
    texts = [(parse(r.prompt), parse(r.negative_prompt)) for r in requests]
    steps = config.infer_args.num_inference_steps
    table = make_table(model, steps, config.new_components.scheduler)
    noise = make_noise(config, model, [request.seed for request in requests])
    _warn_of_cut(tokenizers[0], texts, config.N_repeats)
    return Work(table, list(make_batches(texts, noise, config, tokenizers)))


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
    channels = model.parts["unet"].config.get("in_channels", 4)
    diffusers_folder.check_text_to_image(model)
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
    config: Config,
    tokenizers: Sequence[WeightedTokenizer],
) -> Iterator[tuple[Prompts, Prompts, Latents]]:
    """Arguments of the program, `bs` images at a time: prompts, negative prompts, noise."""
    is_weighted = any(weight != 1 for pair in texts for side in pair for weight in side.weights)

    def encode(side: Sequence[WeightedText]) -> Prompts:
        def rows(tokenizer: WeightedTokenizer) -> list[np.ndarray]:
            pairs = (tokenizer.encode_weighted(text, config.N_repeats) for text in side)
            return [np.stack(column) for column in zip(*pairs, strict=True)]

        input_ids, weights = zip(*map(rows, tokenizers), strict=True)
        # The weights are of the words: for every tokenizer the same.
        return Prompts(tuple(input_ids), weights[0] if is_weighted else None)

    for start in range(0, len(texts), config.bs):
        part = slice(start, start + config.bs)
        positive, negative = zip(*texts[part], strict=True)
        yield encode(positive), encode(negative), noise[part]


def generate_images(
    work: Work,
    model: Model,
    networks: Mapping[str, Any],
    weights: Mapping[str, Any],
    config: Config,
) -> Iterator[tuple[np.ndarray, bool]]:
    """Each image [h, w, 3] uint8, and whether all of its numbers were finite.

    Args:
        work: what to sample.
        model: whose images they are.
        networks: network -> its structure (`nnx.GraphDef`).
        weights: network -> its weights on the devices.
        config: of sampling.
    """
    family = model.family
    encoders = family.text_encoders
    clip_skip, final_norm = family.text_layer(config.clip_skip, config.clip_final_norm)
    structures, held = (
        Networks(of["unet"], of["vae"], tuple(of[name] for name in encoders))
        for of in (networks, weights)
    )
    program = generate.program(
        structures,
        scaling_factor=model.parts["vae"].config.get("scaling_factor", 0.18215),
        clip_skip=clip_skip,
        final_norm=final_norm,
        dtype=params.DTYPES[config.dtype],
    )
    scale = float(config.infer_args.guidance_scale)
    for positive, negative, noise in work.batches:
        prompts = generate.guided_by(scale, negative, positive)
        pixels, finite = meshes.fetch(program(held, prompts, scale, noise, work.table))
        yield from zip(pixels, finite.tolist(), strict=True)
