"""Batches for the train step: the only user of grain.

An element of the pipeline is a whole batch, and batch n follows from n alone, so the position of
a run in its data is one number, the step.
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from jaxft.data import images, latents, prompts, records, source, text_states
from jaxft.data.batches import BatchPlan
from jaxft.data.buckets import Buckets
from jaxft.data.columns import Made, Texts
from jaxft.data.tokens import ROW, Tokenizer
from jaxft.shapes import NEGATIVE, TEXT_INPUTS, TEXT_STATES

Batch = dict[str, np.ndarray]
"""`input_ids` int32 [b, r, 77] (and `input_ids_2`) or `encoder_hidden_states` [b, 75r + 2, d] (and
`pooled_text_embeds` [b, p]), `weight` float32 [b] (0: fills up the batch), either `moments` float32
[b, h/8, w/8, 8] or `pixel_values` uint8 [b, h, w, 3], for Stable Diffusion XL `time_ids` float32
[b, 6], where images have masks `mask` float32 [b, h/8, w/8], for a ControlNet
`conditioning_pixel_values` uint8 [b, h, w, 3], for inpainting `inpaint_mask` uint8 [b, h, w] (1: to
be painted anew) and always `pixel_values`, and where words are pairs `negative_input_ids` (and
`negative_input_ids_2`)."""


Rows = slice | np.ndarray
"""Some rows of a batch."""

ALL = slice(None)


class Shape(NamedTuple):
    """A bucket: its size (width, height), and its images and batches in an epoch."""

    size: tuple[int, int]
    num_images: int
    num_batches: int


class Summary(NamedTuple):
    """What all records of a data set come to."""

    originals: Int[np.ndarray, "n 2"]
    """Width and height of each image."""
    num_flipped: int
    """Images that are mirrored half of the time."""
    num_random: int
    """Images of which another part is kept in every epoch."""
    num_kept: int
    """Images whose crop keeps what their mask shows."""
    num_masked: int
    """Images whose parts count as their masks say."""
    num_conditioned: int
    """Images with one beside them that a ControlNet sees."""
    num_with_holes: int
    """Images of which an inpainting model paints a part anew."""
    with_negatives: bool
    """Whether there are negative prompts."""


@dataclass(frozen=True)
class Dataset:
    """All that makes the batches of one data set; `plan` counts in `records` and `buckets`."""

    name: str
    records: Sequence[source.Record]
    buckets: Buckets
    plan: BatchPlan
    tokenizers: Sequence[Tokenizer]
    """Of each text encoder."""
    repeats: int = 1
    """Rows of 77 tokens for each prompt."""
    loss_weight: float = 1.0
    teacher: bool = False
    """Whether the target is what the model predicted before training."""
    moments: latents.Store | None = None
    """The cache; without it images are decoded anew for every batch."""
    text: text_states.Store | None = None
    """The cache of what the text encoders say; without it a batch holds token ids."""
    with_sizes: bool = False
    """Whether a batch says how its images were scaled and cropped, as Stable Diffusion XL asks."""

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return self.plan.num_batches

    @cached_property
    def summary(self) -> Summary:
        """What all records come to, gone through once."""
        sizes, negatives = array("i"), False
        flipped, drawn, kept, masked, conditioned, holes = 0, 0, 0, 0, 0, 0
        for record in self.records:
            sizes.extend(record.size)
            flipped += record.flip
            drawn += record.crop == "random"
            masked += record.mask is not None
            conditioned += record.cond is not None
            holes += record.hole is not None
            kept += record.mask is not None and record.crop == "mask"
            negatives |= record.recipe.opposites is not None
        originals = np.array(sizes, np.int64).reshape(-1, 2)
        return Summary(originals, flipped, drawn, kept, masked, conditioned, holes, negatives)

    @property
    def with_masks(self) -> bool:
        """Whether a batch says how much the parts of its images count."""
        return self.summary.num_masked > 0

    @property
    def with_conditions(self) -> bool:
        """Whether a batch has what a ControlNet sees: of all images, as `datasets` checks."""
        return self.summary.num_conditioned > 0

    @property
    def with_holes(self) -> bool:
        """Whether a batch says what of its images is painted anew: of all, as `datasets` checks."""
        return self.summary.num_with_holes > 0

    @property
    def shapes(self) -> list[Shape]:
        """What a step must be compiled for."""
        images = np.bincount(self.buckets.assignment, minlength=len(self.buckets.sizes))
        batches = self.plan.batches_of_bucket
        rows = zip(self.buckets.sizes, images.tolist(), batches, strict=True)
        return [Shape(*row) for row in rows if row[2]]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The size that each record is trained in."""
        return [self.buckets.sizes[bucket] for bucket in self.buckets.assignment.tolist()]

    @property
    def wanted(self) -> Sequence[tuple[source.Record, tuple[int, int]]]:
        """Every view of every image with its size, for `latents.cache`."""
        sizes, assignment = self.buckets.sizes, self.buckets.assignment
        counts = np.fromiter((1 + record.flip for record in self.records), np.int8)
        of = np.repeat(np.arange(len(counts)), counts)

        def view(place: int) -> tuple[source.Record, tuple[int, int]]:
            number = of[place]
            size = sizes[assignment[number]]
            is_second = int(place > 0 and of[place - 1] == number)
            return source.views(self.records[number], size)[is_second], size

        return Made(view, range(len(of)))

    @property
    def truncated(self) -> list[str]:
        """Names of the images whose prompt, as long as it can be, is cut off at the end."""
        tokenizer, room = self.tokenizers[0], (ROW - 2) * self.repeats
        recipes: dict[int, tuple[list[prompts.Recipe], float]] = {}
        names = []
        for record in records.once(self.records):
            how = record.recipe
            if id(how) not in recipes:  # one for each source
                sides = [prompts.with_longest_templates(s, tokenizer.length) for s in how.sides]
                # A token has a character at least, of plain text; so short captions need no look.
                plain = not tokenizer.with_words and not (how.before or how.after)
                longest = min(prompts.room(side, room) for side in sides) if plain else -1
                recipes[id(how)] = sides, longest
            sides, short = recipes[id(how)]
            if all(len(text) <= short and text.isascii() for text in record.captions):
                continue
            texts = [prompts.longest(record.captions, side, tokenizer.length) for side in sides]
            if not all(tokenizer.fits(text, self.repeats) for text in texts):
                names.append(record.path.name)
        return names

    def batch(self, n: int, rows: Rows = ALL) -> Batch:
        """Batch n, or some rows of it (the share of one process among several).

        Raises:
            UserError: an image is gone, or another than when it was indexed.
        """
        drawn = self.plan[n]
        numbers, size = drawn.images[rows].tolist(), self.buckets.sizes[drawn.bucket]
        records = [
            source.framed(self.records[n], size, self.plan.pick(drawn.epoch, n, "view"))
            for n in numbers
        ]
        batch = self.texts(records, [self.plan.pick(drawn.epoch, n) for n in numbers])
        batch["weight"] = drawn.weights[rows]
        if self.teacher:
            batch["teacher"] = np.ones_like(batch["weight"])
        if self.with_sizes:
            batch["time_ids"] = np.stack([time_ids(record, size) for record in records])
        if self.with_masks:
            batch["mask"] = np.stack([source.loss_weights(r, size) for r in records])
        if self.with_conditions:
            seen = [source.conditioning_pixels(record, size) for record in records]
            batch["conditioning_pixel_values"] = np.stack(seen)
        if self.with_holes:
            picks = [self.plan.pick(drawn.epoch, n, "hole") for n in numbers]
            own = [source.hole(r, size, pick) for r, pick in zip(records, picks, strict=True)]
            batch["inpaint_mask"] = np.stack(own)
        if self.moments is not None:
            entries = [self.moments[latents.key(record, size)] for record in records]
            batch["moments"] = np.stack(entries)
        if self.with_pixels:
            batch["pixel_values"] = np.stack([source.pixels(r, size) for r in records])
        return batch

    @property
    def with_pixels(self) -> bool:
        """Whether the VAE sees the images in each step."""
        return self.moments is None or self.with_holes

    @property
    def with_negatives(self) -> bool:
        """Whether a batch holds negative prompts too."""
        return self.summary.with_negatives

    def texts(self, records: Sequence[source.Record], picks: Sequence[int]) -> Batch:
        """Token ids of the prompts that numbers choose, or the states that are kept of them."""
        chosen = list(zip(records, picks, strict=True))
        texts = [source.prompt(*one) for one in chosen]
        if self.text is None:
            negatives = [source.negative(*one) for one in chosen] if self.with_negatives else []
            sides = (("", texts), (NEGATIVE, negatives))
            return {
                start + name: np.stack([tokenizer.encode(text, self.repeats) for text in side])
                for start, side in sides
                for name, tokenizer in zip(TEXT_INPUTS.values(), self.tokenizers, strict=False)
                if side
            }
        keys = [text_states.key(self.ids(text)) for text in texts]
        return {n: np.stack([self.text[key, n] for key in keys]) for n in self.text_names}

    def ids(self, prompt: str) -> list[np.ndarray]:
        """A prompt's token ids of each text encoder."""
        return [tokenizer.encode(prompt, self.repeats) for tokenizer in self.tokenizers]

    @property
    def text_names(self) -> Sequence[str]:
        """Names of what the text encoders give to the UNet."""
        return TEXT_STATES if self.with_sizes else TEXT_STATES[:1]

    @property
    def wanted_texts(self) -> Sequence[list[np.ndarray]]:
        """The token ids of every prompt that a batch can hold, for `text_states.cache`."""
        every = (prompts.every(record.captions, record.recipe) for record in self.records)
        texts = Texts(dict.fromkeys(text for several in every for text in several))
        return Made(lambda place: self.ids(texts[place]), range(len(texts)))


def time_ids(record: source.Record, size: tuple[int, int]) -> np.ndarray:
    """What Stable Diffusion XL is told of a record's view at `size`, float32 [6], in pixels.

    Original height and width; top and left of the crop in the image, scaled and mirrored as it is
    shown; height and width of the crop. Podell et al. 2023, section 2.2
    (https://arxiv.org/abs/2307.01952); the order of steps is that of diffusers' training script.
    """
    left, top = images.corner(record.size, size, record.view, scaled=record.scaled)
    return np.array([*record.size[::-1], top, left, *size[::-1]], np.float32)


@dataclass(frozen=True)
class _Endless:
    """The batches of a data set, epoch after epoch, as grain asks for them."""

    dataset: Dataset
    rows: Rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        return self.dataset.batch(int(index), self.rows)


def open(
    dataset: Dataset, start: int = 0, *, workers: int = 4, rows: Rows = ALL
) -> grain.DatasetIterator[Batch]:
    """Batches start, start + 1, … without end, made ahead in `workers` threads (0: none).

    The batches are the same for any number of workers. `get_state` and `set_state` of the
    iterator hold the position alone; `close` it to end its threads.
    """
    batches = grain.MapDataset.source(_Endless(dataset, rows))
    ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    iterator = iter(batches.to_iter_dataset(ahead))
    iterator.set_state({"next_index": start})
    return iterator
