"""Batches for the train step: the only user of grain.

An element of the pipeline is a whole batch, and batch n follows from n alone, so the position of
a run in its data is one number, the step.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from jaxft.data import captions, latents, source
from jaxft.data.buckets import BatchPlan, Buckets
from jaxft.data.tokens import Tokenizer

Batch = dict[str, np.ndarray]
"""`input_ids` int32 [b, r, 77], `weight` float32 [b] (0: fills up the batch), and either
`moments` float32 [b, h/8, w/8, 8] or `pixel_values` uint8 [b, h, w, 3]."""


class Shape(NamedTuple):
    """A bucket: its size (width, height), and its images and batches in an epoch."""

    size: tuple[int, int]
    num_images: int
    num_batches: int


@dataclass(frozen=True)
class Dataset:
    """All that makes the batches of one data set; `plan` counts in `records` and `buckets`."""

    name: str
    records: Sequence[source.Record]
    buckets: Buckets
    plan: BatchPlan
    tokenizer: Tokenizer
    repeats: int = 1
    """Rows of 77 tokens for each prompt."""
    loss_weight: float = 1.0
    moments: latents.Store | None = None
    """The cache; without it images are decoded anew for every batch."""

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return self.plan.num_batches

    @property
    def shapes(self) -> list[Shape]:
        """What a step must be compiled for."""
        images = np.bincount(self.buckets.assignment, minlength=len(self.buckets.sizes))
        batches = self.plan.batches_of_bucket
        rows = zip(self.buckets.sizes, images.tolist(), batches, strict=True)
        return [Shape(*row) for row in rows if row[2]]

    @property
    def wanted(self) -> list[tuple[source.Record, tuple[int, int]]]:
        """Every image with its size, for `latents.cache`."""
        sizes = [self.buckets.sizes[bucket] for bucket in self.buckets.assignment]
        return list(zip(self.records, sizes, strict=True))

    @property
    def truncated(self) -> list[str]:
        """Names of the images whose prompt, in its longest template, is cut off at the end."""
        prompts = {
            record.path.name: captions.fill(
                max(record.templates, key=len), record.word_names, record.caption
            )
            for record in self.records
        }
        return [n for n, text in prompts.items() if not self.tokenizer.fits(text, self.repeats)]

    def batch(self, n: int, rows: slice = slice(None)) -> Batch:
        """Batch n, or some rows of it (the share of one process among several).

        Raises:
            UserError: an image is gone, or another than when it was indexed.
        """
        drawn = self.plan[n]
        images = drawn.images[rows].tolist()
        records = [self.records[image] for image in images]
        prompts = [
            source.prompt(record, self.plan.pick(drawn.epoch, image))
            for record, image in zip(records, images, strict=True)
        ]
        size = self.buckets.sizes[drawn.bucket]
        batch = {
            "input_ids": np.stack([self.tokenizer.encode(text, self.repeats) for text in prompts]),
            "weight": drawn.weights[rows],
        }
        if self.moments is not None:
            entries = [self.moments[latents.key(record, size)] for record in records]
            return batch | {"moments": np.stack(entries)}
        return batch | {"pixel_values": np.stack([source.pixels(r, size) for r in records])}


@dataclass(frozen=True)
class _Endless:
    """The batches of a data set, epoch after epoch, as grain asks for them."""

    dataset: Dataset
    rows: slice

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        return self.dataset.batch(int(index), self.rows)


def open(
    dataset: Dataset, start: int = 0, *, workers: int = 4, rows: slice = slice(None)
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
