"""The cache of text encoder outputs: every prompt is encoded once, before the first step."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from jaxft.data.disk import Disk, Memory
from jaxft.hosts import progress
from jaxft.shapes import TEXT_STATES

RECIPE = 1
"""To be raised when the way from token ids to states changes: caches on disk outlive versions."""

Ids = Sequence[Int[np.ndarray, "r 77"]]
"""A prompt's token ids, of each text encoder."""

Store = Memory | Disk
"""Of each prompt and each name of `TEXT_STATES` an array, by (`key(ids)`, name)."""


def key(ids: Ids) -> str:
    """SHA-256 of a prompt's token ids: all that its states depend on, besides the encoders."""
    digest = hashlib.sha256()
    for rows in ids:
        digest.update(f"{rows.shape} ".encode() + rows.astype("<i4").tobytes())
    return digest.hexdigest()


def cache(
    wanted: Sequence[Ids],
    encode: Callable[[list[np.ndarray]], dict[str, np.ndarray]],
    *,
    names: Sequence[str] = TEXT_STATES,
    batch_size: int,
    store: Store | None = None,
    stopped: Callable[[], object] = lambda: False,
) -> Store:
    """The store (a new one in memory) with the states of every prompt.

    `encode` gets the token ids [b, r, 77] of each text encoder, of exactly `batch_size` prompts,
    and gives an array [b, …] for each of `names`. What is there already is not encoded again. It
    ends early when `stopped()`.
    """
    store = Memory() if store is None else store
    digests = (key(ids) for ids in wanted)
    lacking = store.missing((digest, name) for digest in digests for name in names)
    places = list(dict.fromkeys(place // len(names) for place in lacking))
    with store, progress(desc="encoding prompts", total=len(places), unit="prompt") as bar:
        for start in range(0, len(places), batch_size):
            batch = [wanted[place] for place in places[start : start + batch_size]]
            filled = batch + [batch[-1]] * (batch_size - len(batch))
            states = encode([np.stack(rows) for rows in zip(*filled, strict=True)])
            for name in names:
                for ids, entry in zip(batch, states[name], strict=False):
                    store[key(ids), name] = entry.copy()  # no view: it would keep its batch alive
            bar.update(len(batch))
            if stopped():
                break
    return store
