"""The cache of VAE moments: every image is encoded once, before the first step."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxft.data.buckets import VAE_STRIDE
from jaxft.data.disk import Disk, Memory
from jaxft.data.images import View
from jaxft.data.source import Record, pixels
from jaxft.errors import UserError
from jaxft.hosts import progress

RECIPE = 1
"""To be raised when the way from a file to its moments changes: caches on disk outlive versions."""

Size = tuple[int, int]

Store = Memory | Disk
"""Mean and log variance of an image's latent, float32 [h, w, 8], by `key`."""


class Key(NamedTuple):
    """All that the moments of an image depend on, besides the VAE."""

    digest: str
    """SHA-256 of the file."""
    size: Size
    """Width and height that it is cropped to."""
    bg_color: tuple[int, int, int]
    scaled: bool
    view: View


def key(record: Record, size: Size) -> Key:
    """The key of a record's moments: what `source.pixels` reads of the record must be in it."""
    return Key(record.digest, size, record.bg_color, record.scaled, record.view)


def cache(
    wanted: Sequence[tuple[Record, Size]],
    encode: Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b h/8 w/8 8"]],
    *,
    batch_size: int,
    workers: int = 4,
    store: Store | None = None,
    stopped: Callable[[], object] = lambda: False,
) -> Store:
    """The store (a new one in memory) with the moments of every (image, size).

    What is there already, and what is wanted twice, is not encoded again. `encode` sees batches of
    exactly `batch_size` images, one size after the other, so that it compiles once a size. Images
    are decoded ahead in threads; a progress bar is shown. It ends early when `stopped()`.

    Raises:
        UserError: an image is gone or changed, or its moments are not finite.
    """
    store = Memory() if store is None else store
    missing = store.missing(key(*one) for one in wanted)
    groups: dict[Size, list[int]] = {}
    for place in missing:
        groups.setdefault(wanted[place][1], []).append(place)
    batches = (
        (size, [wanted[place][0] for place in group[start : start + batch_size]])
        for size, group in groups.items()
        for start in range(0, len(group), batch_size)
    )
    with (
        store,
        ThreadPoolExecutor(workers) as pool,
        progress(desc="encoding images", total=len(missing), unit="image") as bar,
    ):
        for (size, batch), images in _ahead(pool, batches):
            filled = images + [images[-1]] * (batch_size - len(images))
            moments = np.asarray(encode(np.stack(filled)), np.float32)
            assert moments.shape == (batch_size, size[1] // VAE_STRIDE, size[0] // VAE_STRIDE, 8)
            for record, entry in zip(batch, moments, strict=False):
                if not np.isfinite(entry).all():
                    raise UserError(f"{record.path}: the VAE's output for it is not finite")
                store[key(record, size)] = (
                    entry.copy()
                )  # no view: it would keep its whole batch alive
            bar.update(len(batch))
            if stopped():
                break
    return store


Group = tuple[Size, Sequence[Record]]


def _ahead(
    pool: ThreadPoolExecutor, batches: Iterable[Group]
) -> Iterator[tuple[Group, list[np.ndarray]]]:
    """Each batch with its decoded images; the next two are decoded meanwhile."""
    started: deque[tuple[Group, list[Future[np.ndarray]]]] = deque()
    for size, batch in batches:
        jobs = [pool.submit(pixels, record, size) for record in batch]
        started.append(((size, batch), jobs))
        if len(started) > 2:
            group, jobs = started.popleft()
            yield group, [job.result() for job in jobs]
    for group, jobs in started:
        yield group, [job.result() for job in jobs]
