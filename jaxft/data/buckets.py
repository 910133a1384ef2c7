"""Buckets: images of like shape share one size; and which images make up which batch.

Sizes are (width, height) in pixels.
"""

import hashlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from jaxft.errors import UserError

VAE_STRIDE = 8
"""Pixels to one latent, each way: sizes are multiples of it."""

Tail = Literal["pad", "resample", "drop"]


class Buckets(NamedTuple):
    """Sizes, and the index of each image's size."""

    sizes: list[tuple[int, int]]
    assignment: Int[np.ndarray, " n"]


def ratio_buckets_from_files(
    sizes: Sequence[tuple[int, int]],
    *,
    target_area: float = 640 * 640,
    step_size: int = 64,
    num_bucket: int = 10,
) -> Buckets:
    """At most `num_bucket` sizes of about `target_area` pixels, fitted to the images' ratios.

    HCP-Diffusion's clustering: KMeans on log2(width / height), then each centre's size rounded to
    multiples of `step_size` (there 8, here 64: fewer shapes, and levels of the UNet that halve
    evenly). Centres that round to the same size are one bucket.

    Raises:
        UserError: more buckets than images, or options that give no usable size.
    """
    if not 1 <= num_bucket <= len(sizes):
        raise UserError(
            f"num_bucket: {num_bucket} buckets for {len(sizes)} images; choose 1 to {len(sizes)}"
        )
    if step_size < VAE_STRIDE or step_size % VAE_STRIDE:
        raise UserError(f"step_size: {step_size} must be a multiple of {VAE_STRIDE}")
    if not 32 * 32 <= target_area <= 4096 * 4096:
        raise UserError(f"target_area: {target_area} must be a number of pixels, such as 512*512")
    ratios = np.log2([width / height for width, height in sizes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer ratios than buckets
        clusters = KMeans(num_bucket, random_state=3407, tol=1e-3).fit(ratios[:, None])
    centres = 2.0 ** clusters.cluster_centers_[:, 0]
    rounded = [_rounded(ratio, target_area, step_size) for ratio in centres]
    labels: list[int] = np.asarray(clusters.labels_).tolist()
    kept = sorted({rounded[label] for label in labels})
    assignment = np.array([kept.index(rounded[label]) for label in labels])
    for bucket, size in enumerate(kept):
        if min(size) < step_size:
            members: list[int] = np.flatnonzero(assignment == bucket).tolist()
            width, height = sizes[max(members, key=lambda image: abs(ratios[image]))]
            raise UserError(
                f"target_area: {target_area} pixels leave nothing of an image of {width}x{height} "
                f"(step_size {step_size}): crop that image or raise target_area"
            )
    return Buckets(kept, assignment)


def _rounded(ratio: float, area: float, step: int) -> tuple[int, int]:
    """Width and height of a ratio, each to the nearest multiple of the step (half to even)."""
    height = (area / ratio) ** 0.5
    return round(height * ratio / step) * step, round(height / step) * step


def fixed_bucket(
    sizes: Sequence[tuple[int, int]], *, target_size: int | Sequence[int] = 512
) -> Buckets:
    """One size, a side or (width, height), for all images.

    Raises:
        UserError: not one or two multiples of 8 from 8 to 8192.
    """
    pair = [target_size] * 2 if isinstance(target_size, int) else list(target_size)
    if len(pair) != 2 or any(side not in range(VAE_STRIDE, 8193, VAE_STRIDE) for side in pair):
        raise UserError(
            f"target_size: {target_size} must be a side or [width, height], multiples of "
            f"{VAE_STRIDE} up to 8192"
        )
    return Buckets([(int(pair[0]), int(pair[1]))], np.zeros(len(sizes), dtype=int))


# Batches ----------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The images of one batch; all have the size of one bucket."""

    epoch: int
    bucket: int
    images: Int[np.ndarray, " b"]
    weights: Float[np.ndarray, " b"]
    """1, or 0 for an image that fills up the last batch of its bucket."""


class BatchPlan:
    """Which images make up batch n: a pure function of n, the seed and the data set's name.

    Each image comes once an epoch. What is left of a bucket in its last batch is filled up with
    images of weight 0 (`pad`), filled up with images drawn again (`resample`, as HCP-Diffusion
    does) or left out of this epoch (`drop`). The order within a bucket does not depend on the
    batch size.
    """

    def __init__(
        self, buckets: Buckets, batch_size: int, *, seed: int, name: str, tail: Tail = "pad"
    ):
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} must be at least 1")
        if tail not in ("pad", "resample", "drop"):
            raise UserError(f"tail: {tail!r} is not one of pad, resample, drop")
        self.batch_size, self.seed, self.name, self.tail = batch_size, seed, name, tail
        self._members = [
            np.flatnonzero(buckets.assignment == bucket) for bucket in range(len(buckets.sizes))
        ]
        counts = [
            len(members) // batch_size if tail == "drop" else -(-len(members) // batch_size)
            for members in self._members
        ]
        self.batches_of_bucket: tuple[int, ...] = tuple(counts)
        """Batches an epoch, for each bucket."""
        self._ends = np.cumsum(counts)  # slots of an epoch: the batches of bucket 0, of 1, …
        self.num_batches = int(self._ends[-1])
        """Batches an epoch."""
        if not self.num_batches:
            raise UserError(
                f"batch_size: {batch_size} is more than any bucket's images, and tail: drop "
                "leaves nothing; choose a smaller batch or tail: pad"
            )
        # Neighbouring batches ask for the same epoch, from several threads.
        self._epoch = lru_cache(maxsize=4)(self._shuffled)

    def __getitem__(self, n: int) -> Batch:
        epoch, index = divmod(n, self.num_batches)
        slots, orders = self._epoch(epoch)
        slot = slots[index]
        bucket = int(np.searchsorted(self._ends, slot, side="right"))
        part = slot - self._ends[bucket] + self.batches_of_bucket[bucket]
        order, size = orders[bucket], self.batch_size
        images = order[part * size : (part + 1) * size]
        weights = np.ones(size, np.float32)
        missing = size - len(images)
        if missing:
            draws = _raw(self.seed, self.name, epoch, f"tail {bucket}", missing)
            images = np.concatenate([images, order[draws % len(order)]])
            weights[size - missing :] = self.tail == "resample"
        return Batch(epoch, bucket, images, weights)

    def pick(self, epoch: int, image: int) -> int:
        """A number for this image in this epoch: which line of its prompt template to take."""
        return int(_raw(self.seed, self.name, epoch, f"prompt {image}", 1)[0])

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The order of the epoch's batches, and of each bucket's images."""
        slots = _permutation(self.seed, self.name, epoch, "batches", self.num_batches)
        return slots, [
            members[_permutation(self.seed, self.name, epoch, f"bucket {i}", len(members))]
            for i, members in enumerate(self._members)
        ]


def _raw(seed: int, name: str, epoch: int, use: str, count: int) -> UInt[np.ndarray, " count"]:
    """Random 64-bit numbers, the same for ever: NumPy fixes bit generators, not its shuffles."""
    digest = hashlib.sha256(f"{seed}\n{name}\n{epoch}\n{use}".encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8")).random_raw(count)


def _permutation(seed: int, name: str, epoch: int, use: str, count: int) -> np.ndarray:
    return np.argsort(_raw(seed, name, epoch, use, count), kind="stable")
