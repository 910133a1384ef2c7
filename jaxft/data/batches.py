"""Which images make up which batch."""

import hashlib
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt

from jaxft.data.buckets import Buckets
from jaxft.errors import UserError

Tail = Literal["pad", "resample", "drop"]


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
        spare = self.num_batches * batch_size - len(buckets.assignment)
        self.num_filled, self.num_dropped = max(spare, 0), max(-spare, 0)
        """Rows an epoch that are filled up, and images that it leaves out."""
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

    def pick(self, epoch: int, image: int, use: str = "prompt") -> int:
        """A number of 64 bits for this image in this epoch: of its prompt, or of another use."""
        return int(_raw(self.seed, self.name, epoch, f"{use} {image}", 1)[0])

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
