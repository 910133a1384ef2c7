"""The cache of VAE moments, in memory: every image is encoded once, before the first step."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from jaxft.data.buckets import VAE_STRIDE
from jaxft.data.source import Record, pixels
from jaxft.errors import UserError

Size = tuple[int, int]
Key = tuple[str, Size, tuple[int, int, int], bool]
Store = Mapping[Key, Float[np.ndarray, "h w 8"]]
"""Mean and log variance of an image's latent by `key`."""


def key(record: Record, size: Size) -> Key:
    """What the moments depend on: the file's content, the size it is cropped to, the background,
    whether it is scaled."""
    return record.digest, size, record.bg_color, record.scaled


def cache(
    wanted: Iterable[tuple[Record, Size]],
    encode: Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b h/8 w/8 8"]],
    *,
    batch_size: int,
    workers: int = 4,
) -> Store:
    """Moments of every (image, size), each encoded once however often it is wanted.

    `encode` sees batches of exactly `batch_size` images, one size after the other, so that it
    compiles once a size. Images are decoded ahead in threads; a progress bar is shown.

    Raises:
        UserError: an image is gone or changed, or its moments are not finite.
    """
    groups: dict[Size, dict[Key, Record]] = {}
    for record, size in wanted:
        groups.setdefault(size, {}).setdefault(key(record, size), record)
    batches = [
        (size, list(group.items())[start : start + batch_size])
        for size, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]
    store: dict[Key, np.ndarray] = {}
    total = sum(len(group) for group in groups.values())
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(desc="encoding images", total=total, unit="image") as bar,
    ):
        for (size, batch), images in _ahead(pool, batches):
            filled = images + [images[-1]] * (batch_size - len(images))
            moments = np.asarray(encode(np.stack(filled)), np.float32)
            assert moments.shape == (batch_size, size[1] // VAE_STRIDE, size[0] // VAE_STRIDE, 8)
            for (name, record), entry in zip(batch, moments, strict=False):
                if not np.isfinite(entry).all():
                    raise UserError(f"{record.path}: the VAE's output for it is not finite")
                store[name] = entry.copy()  # no view: it would keep its whole batch alive
            bar.update(len(batch))
    return store


Group = tuple[Size, Sequence[tuple[Key, Record]]]


def _ahead(
    pool: ThreadPoolExecutor, batches: Sequence[Group]
) -> Iterator[tuple[Group, list[np.ndarray]]]:
    """Each batch with its decoded images; the next two are decoded meanwhile."""
    started: deque[tuple[Group, list[Future[np.ndarray]]]] = deque()
    for size, batch in batches:
        jobs = [pool.submit(pixels, record, size) for _, record in batch]
        started.append(((size, batch), jobs))
        if len(started) > 2:
            group, jobs = started.popleft()
            yield group, [job.result() for job in jobs]
    for group, jobs in started:
        yield group, [job.result() for job in jobs]
