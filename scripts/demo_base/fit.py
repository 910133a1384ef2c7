"""A training loop that goes on where it was stopped: jaxft's update, any loss."""

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from jaxft import step
from jaxft.checkpoint import Checkpoints
from jaxft.log import RunLog
from jaxft.tuning.muon import muon
from jaxft.tuning.schedules import Rate

Loss = Callable[[step.Weights, Any, jax.Array], jax.Array]
MakeBatch = Callable[[int], Any]


LOG_EVERY, SAVE_EVERY = 50, 500
"""Steps."""


class Record(NamedTuple):
    """Numbers of one step, still on the device."""

    loss: jax.Array
    grad_norm: jax.Array
    images: jax.Array


class Recipe(NamedTuple):
    """How long and how fast a stage learns."""

    steps: int
    batch: int
    lr: float
    """Between warm-up and decay."""
    parts: int = 1
    """Of a batch, each the work of a thread: on a CPU, cores that share an operation wait for each
    other, and what one part needs stays in the cache."""
    warmup: int = 200
    decay: float = 1.0
    """Last share of the steps, in which the rate falls to 0 along a half cosine."""
    before: "Recipe | None" = None
    """What it goes on from: the steps of that recipe are the first of `steps`."""

    @property
    def cycles(self) -> tuple["Recipe", ...]:
        """This recipe and those before it, the first one first."""
        return (*(self.before.cycles if self.before else ()), self)

    def rate(self) -> Rate:
        """The learning rate of each step."""
        if self.before is None:
            return self._cycle(self.steps)
        done = self.before.steps
        return optax.join_schedules([self.before.rate(), self._cycle(self.steps - done)], [done])

    def _cycle(self, length: int) -> Rate:
        start = max(self.warmup, round((1 - self.decay) * length))
        parts = [
            optax.linear_schedule(0, self.lr, self.warmup),
            optax.constant_schedule(self.lr),
            optax.cosine_decay_schedule(self.lr, length - start),
        ]
        return optax.join_schedules(parts, [self.warmup, start])


def fit(
    folder: Path, recipe: Recipe, weights: step.Weights, loss: Loss, batch: MakeBatch, seed: int
) -> step.Weights:
    """Trains and returns the weights; goes on from the last state in `folder`.

    Args:
        folder: of states and logs.
        recipe: steps and rate.
        weights: to begin with, float32.
        loss: of (weights, batch, key).
        batch: the batch of a step, a function of its number alone.
        seed: of the noise.
    """
    rate = recipe.rate()
    clipping = optax.clip_by_global_norm(1.0)
    optimizer = optax.chain(clipping, muon(rate, weight_decay=0.0))
    gradients = jax.jit(jax.value_and_grad(loss))
    update = jax.jit(functools.partial(_update, optimizer), donate_argnums=0)
    key = jax.random.key(seed)
    state = step.init(optimizer, jax.tree.map(jnp.asarray, weights))
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(min(recipe.parts, os.cpu_count() or 1)))

        def run(state: step.TrainState, batch: Any) -> tuple[step.TrainState, Record]:
            keys = jax.random.split(jax.random.fold_in(key, state.step), recipe.parts)
            parts = _split(batch, recipe.parts)
            work = functools.partial(_finished, gradients, state.trainable)
            values, grads = zip(*workers.map(work, parts, keys), strict=True)
            state, norm = update(state, grads)
            return state, Record(jnp.stack(values).mean(), norm, jnp.int32(recipe.batch))

        saved = stack.enter_context(contextlib.closing(Checkpoints(folder / "state", keep=1)))
        start = saved.latest() or 0
        if start:
            state, _ = saved.restore(start, _abstract(state))
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        log = stack.enter_context(RunLog(folder, recipe.steps, start))
        following = ahead.submit(batch, start)
        records: list[Record] = []
        for done in range(start + 1, recipe.steps + 1):
            current, following = following.result(), ahead.submit(batch, done)
            state, record = run(state, current)
            records.append(record)
            log.advance(done)
            if done % LOG_EVERY == 0 or done == recipe.steps:
                _log(log, done, folder.name, float(rate(done - 1)), jax.device_get(records))
                records.clear()
            if done % SAVE_EVERY == 0 or done == recipe.steps:
                saved.save(done, state, {})
    return jax.device_get(state.trainable)


def _split(batch: Any, parts: int) -> list[Any]:
    """The batch's parts, of equal size."""
    leaves, structure = jax.tree.flatten(batch)
    pieces = zip(*(np.split(leaf, parts) for leaf in leaves), strict=True)
    return [structure.unflatten(piece) for piece in pieces]


def _finished(function: Callable, *args: Any) -> Any:
    """The function's result once it is computed: the thread waits, not the next caller."""
    return jax.block_until_ready(function(*args))


def _update(
    optimizer: optax.GradientTransformation, state: step.TrainState, grads: tuple[step.Weights, ...]
) -> tuple[step.TrainState, jax.Array]:
    """`step.update` with the mean of the parts' gradients."""
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *grads)
    state, norm, _ = step.update(optimizer, state, mean)
    return state, norm


def _log(log: RunLog, done: int, name: str, rate: float, records: list[Record]) -> None:
    mean = float(np.mean([record.loss for record in records]))
    log.count(int(sum(record.images for record in records)))
    log.record(
        done,
        epoch=0,
        total=mean,
        loss={name: mean},
        lr={name: rate},
        grad_norm=float(records[-1].grad_norm),
    )


def _abstract(state: Any) -> Any:
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state
    )
