"""The data sets of a configuration: indexed, sorted into buckets, and checked whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import compat, report, words
from jaxft import config as configs
from jaxft.config import Config
from jaxft.data import bucket_table, captions, prompts, source
from jaxft.data.batches import BatchPlan, Tail
from jaxft.data.buckets import Buckets, Originals, Size
from jaxft.data.loader import Dataset
from jaxft.data.records import Columns, Records
from jaxft.data.tokens import Tokenizer
from jaxft.diffusion.losses import Loss
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder
from jaxft.shapes import TEXT_INPUTS
from jaxft.tuning.groups import Labels
from jaxft.words import Words

MAX_PROMPTS = 100
"""Of an image, where they are encoded before the first step."""


def read(
    config: Config, model: diffusers_folder.Model, vocabulary: Words, num_devices: int
) -> tuple[list[Dataset], list[Dataset], list[str]]:
    """The data sets of a model, in the order of the configuration, what is held out of them, and
    what is to be told.

    Raises:
        UserError: images, captions or options that cannot be used.
    """
    trained, held, notices = [], [], []
    resumed, kept = config.train.resume, config.index_cache and Path(config.index_cache)
    tables = bucket_table.read(Path(resumed) / bucket_table.FILE) if resumed else {}
    tokenizers = [Tokenizer(folder) for folder in model.tokenizers.values()]
    words.teach(tokenizers, model, vocabulary.rows)
    for name, options in config.data.items():
        columns: list[Columns] = []
        if not options.source:
            raise UserError(f"data.{name}.source: there is none; name one, with its img_root")
        for key, where in options.source.items():
            try:
                found = source.index(**_source_options(where), kept=kept)
            except UserError as error:
                raise UserError(f"data.{name}.source.{key}: {error}") from None
            columns += found.records.parts
            notices += found.notices
        _check_alike(name, columns)
        used, spared = _held_out(name, Records(columns), options.held_out)
        known: Sequence[Size] = ()
        roles: list[tuple[Records, list[Dataset], int, Tail]] = [
            (used, trained, config.seed, options.tail),
            (spared, held, 0, "pad"),  # of any run the same prompts
        ]
        for records, into, seed, tail in roles:
            if not records:
                continue
            saved = tables.get(name) if into is trained else None
            buckets, new = _buckets(name, options.bucket, records.sizes, saved, known)
            known = buckets.sizes  # what is held out is seen in the sizes that are trained
            rows = options.batch_size * num_devices
            try:
                plan = BatchPlan(buckets, rows, seed=seed, name=name, tail=tail)
            except UserError as error:
                raise UserError(f"data.{name}: {error}") from None
            into.append(
                Dataset(
                    name,
                    records.scaled(buckets.scaled),
                    buckets,
                    plan,
                    tokenizers,
                    config.model.tokenizer_repeats,
                    options.loss_weight,
                    options.teacher,
                    with_sizes=model.family.is_xl,
                )
            )
            notices += new + _truncated(into[-1]) + report.warnings(into[-1])
    if not trained:
        raise UserError("data: everything is held out; set held_out of a data set below 1")
    return trained, held, notices


def _check_alike(name: str, columns: Sequence[Columns]) -> None:
    """Of a data set, all images have a conditioning image or none, and so with what is painted
    anew: its batches are of one kind."""
    firsts = [own[0] for own in columns]
    for key, values in (
        ("cond_dir", [record.cond for record in firsts]),
        ("inpaint_mask", [record.hole for record in firsts]),
    ):
        if None in values and any(values):
            raise UserError(
                f"data.{name}: some of its sources have {key} and some have not; give it to all, "
                "or make two datasets of them"
            )


def check_holes(model: diffusers_folder.Model, datasets: Sequence[Dataset]) -> None:
    """Raises UserError unless images have holes just where the model is one of inpainting."""
    paints = diffusers_folder.is_inpainting(model)
    for dataset in datasets:
        if paints and not dataset.with_holes:
            raise UserError(
                f"data.{dataset.name}: {model.folder} is an inpainting model (its UNet takes 9 "
                "channels), which must be told what to paint anew; set inpaint_mask, to random or "
                "to a folder of masks, in each source"
            )
        if dataset.with_holes and not paints:
            raise UserError(
                f"data.{dataset.name}: inpaint_mask has no effect: {model.folder} is no inpainting "
                "model (its UNet takes only latents); leave it out"
            )


def _held_out(name: str, records: Records, share: float) -> tuple[Records, Records]:
    """The records to train on, and those held out, each once and as it is.

    An image is held out or not by its own content alone, whatever others there are; if none would
    be, the nearest to it is.
    """
    if not 0 <= share <= 1:
        raise UserError(f"data.{name}.held_out: {share:g} must be a share, from 0 to 1")
    if not share:
        return records, Records()
    places = records.places
    spared = places < share
    spared = spared if spared.any() else places == places.min()
    if spared.all() and share < 1:
        raise UserError(
            f"data.{name}.held_out: {share:g} leaves none of its {len(np.unique(places))} images "
            "to train on; give more images, or a smaller share"
        )
    return records.where(~spared), records.where(spared).judged()


def _buckets(
    name: str,
    options: Config,
    sizes: Originals,
    saved: bucket_table.Saved | None,
    known: Sequence[Size],
) -> tuple[Buckets, list[str]]:
    """A dataset's buckets: those of the run that goes on, unless other options are asked for;
    else known ones, or new ones."""
    key, node = f"data.{name}.bucket", options.to_dict()
    kept = saved if saved and bucket_table.matches(saved, node) else None
    buckets = compat.build(node, "bucket", key, sizes=sizes, known=kept.sizes if kept else known)
    if not kept:
        return buckets, []
    buckets, added = bucket_table.restore(kept, sizes, buckets)
    if not added:
        return buckets, []
    return buckets, [f"data.{name}: {added} images are new, and go to sizes that the run has"]


def _source_options(options: Config) -> dict[str, Any]:
    template, where = options.prompt_template, options.to_dict()
    where["prompt_template"] = configs.find_shipped(template) if template else None
    if isinstance(where["caption_file"], dict):
        where["caption_file"] = compat.build(
            where["caption_file"], "caption loader", "caption_file"
        )
    where["text_transforms"] = [
        compat.build(node, "text transform", f"text_transforms.{name}")
        for name, node in where["text_transforms"].items()
    ]
    return where


def _truncated(dataset: Dataset) -> list[str]:
    names = dataset.truncated
    if not names:
        return []
    return [
        f"data.{dataset.name}: the prompts of {len(names)} images are cut at {75 * dataset.repeats}"
        f" tokens ({captions.shown(names[0])} …); raise model.tokenizer_repeats"
    ]


def check_loss(loss: Loss, datasets: Sequence[Dataset]) -> None:
    """Guidance needs negative prompts, and these need guidance; masks are normalised if there are
    some."""
    if loss.normalise_mask and not any(dataset.with_masks for dataset in datasets):
        raise UserError("train.loss.normalise_mask: no source has an att_mask; leave it out")
    pairs = [dataset.name for dataset in datasets if dataset.with_negatives]
    if pairs and loss.guidance is None:
        raise UserError(
            f"data.{pairs[0]}: word_names has pairs [positive, negative], which only guidance "
            "gives a meaning; set train.cfg_scale, to '3.0' for instance"
        )
    if not pairs and loss.guidance is not None:
        raise UserError(
            "train.cfg_scale: there are no negative prompts; give word_names a pair "
            "[positive, negative], such as pt1: [pt-cat1, pt-cat1-neg], or set it to '1.0'"
        )


def check_latent_caches(config: Config, datasets: Sequence[Dataset]) -> None:
    """Latents can be encoded before the first step if all views of the images are known."""
    for dataset in datasets:
        drawn = dataset.summary.num_random
        if drawn and config.data[dataset.name].cache_latents:
            raise UserError(
                f"data.{dataset.name}.cache_latents: crop: random shows another part of an image "
                "in every epoch, which is not known before; use cache_latents: false, or center"
            )


def check_text_caches(config: Config, labels: Labels, datasets: Sequence[Dataset]) -> None:
    """Prompts can be encoded before the first step if encoders stay as they are, and all prompts
    are known."""
    for dataset in datasets:
        if not config.data[dataset.name].cache_text:
            continue
        key = f"data.{dataset.name}.cache_text"
        if any(own for name, own in labels.items() if name.removeprefix("lora_") in TEXT_INPUTS):
            raise UserError(f"{key}: a text encoder is trained, so it must be false")
        if words.PART in labels:
            raise UserError(f"{key}: words are trained, so it must be false")
        if dataset.with_negatives:
            raise UserError(f"{key}: there are negative prompts too, so it must be false")
        for record in dataset.records:
            if record.recipe.draws:
                raise UserError(
                    f"{key}: the text_transforms of {record.path.name} make other prompts in every "
                    "epoch, which are not known before; use false"
                )
            if (count := len(prompts.every(record.captions, record.recipe))) > MAX_PROMPTS:
                raise UserError(
                    f"{key}: {record.path.name} has {count} prompts, more than the {MAX_PROMPTS} "
                    "that can be kept; use a prompt_template of fewer lines, or set it to false"
                )
