"""The compiled programs of a run: one gradient for every shape of batch, and one update.

All are compiled before the first step, in threads; a call with another shape is an error, never a
new compilation in the middle of a run.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from jaxft import mesh as meshes
from jaxft import step as steps
from jaxft.diffusion import importance
from jaxft.diffusion.importance import Found
from jaxft.diffusion.losses import by_range
from jaxft.hosts import progress
from jaxft.prediction import Objective, Weights
from jaxft.step import Judged, TrainState
from jaxft.tuning import ema, groups
from jaxft.tuning.groups import Labels

Batch = Mapping[str, Any]
"""See `jaxft.step`."""

OPTIMIZATION = "xla_backend_optimization_level"

Signature = tuple[tuple[str, tuple[int, ...]], ...]


class Metrics(NamedTuple):
    """Numbers of one step, still on the device."""

    losses: Float[Array, "d p"]
    """Of each data set, one for each part of an accumulated step."""
    by_range: Float[Array, "d 2 r"]
    """Of each data set and range of timesteps, `losses.by_range` of all parts."""
    grad_norm: Float[Array, ""]
    """Before clipping; where it is not finite, nothing was updated."""
    grad_norms: dict[str, Float[Array, ""]]
    """Of each group."""
    update_ratios: dict[str, Float[Array, ""]]
    """Of each group: norm of what was added to its weights / norm of the weights."""


class Programs:
    """A training step for one objective, optimizer and mesh: `compile`, then `step`."""

    def __init__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        labels: Labels,
        mesh: Mesh,
        *,
        loss_weights: Sequence[float],
        accumulation: int,
        averages: bool = False,
        offloaded: Sequence[str] = (),
    ):
        """`offloaded`: fields of the state that lie in the host's memory. They are on the devices
        only in the program that changes them, which may bring all of a field there at once."""
        self._objective, self._optimizer, self._mesh = objective, optimizer, mesh
        self._labels, self._accumulation = labels, accumulation
        self._factors = [weight / accumulation for weight in loss_weights]
        self._averages, self._offloaded = averages, offloaded
        self._lanes = _lanes(mesh, len(loss_weights))
        self._adds_up = accumulation * len(self._lanes[0]) > 1
        self._threads = ThreadPoolExecutor(len(self._lanes))
        self._compiled: dict[Any, Any] = {}

    def _init(self, trainable: Weights) -> TrainState:
        state = steps.init(self._optimizer, trainable, averages=self._averages)
        how = self._objective.loss.importance
        if how is None:
            return state
        return state._replace(memory=importance.begin(how, len(self._factors)))

    def state(self, trainable: Weights) -> TrainState:
        """Shapes and shardings of the state for these weights (arrays or shapes)."""
        shapes = jax.eval_shape(self._init, trainable)
        where = meshes.shardings(self._mesh, shapes)
        moved = {
            field: meshes.in_host(getattr(shapes, field), getattr(where, field))
            for field in self._offloaded
        }
        return _placed(shapes, where._replace(**moved))

    def init(self, trainable: Weights) -> TrainState:
        """The state before the first step, where `state` says."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.state(trainable))
        return jax.jit(self._init, out_shardings=where)(trainable)

    def compile(
        self, state: TrainState, frozen: Weights, key: Array, batches: Sequence[Sequence[Batch]]
    ) -> int:
        """Compiles all programs of a run, with a progress bar; returns how many there are.

        Args:
            state: shapes and shardings, as from `state`.
            frozen: arrays on the devices.
            key: the run's key.
            batches: of each data set, one batch of every shape (arrays or shapes).
        """
        grads = jax.tree.map(_as_float32, state.trainable)
        total = grads if self._adds_up else None
        numbers = self._numbers(0, 0)
        average, state = state.average, state._replace(average={})
        where = jax.tree.map(lambda leaf: leaf.sharding, state)
        jobs: dict[Any, tuple[Any, tuple]] = {
            _signature(batch): (
                self._gradients(where.trainable),
                (
                    *(state.trainable, frozen, self._abstract(batch), *numbers, key),
                    *(state.step, state.memory, total),
                ),
            )
            for shapes in batches
            for batch in shapes
        }
        judged = [self._judged(shapes[0]) for shapes in batches]
        jobs["update"] = (self._update(where), (state, (grads,) * len(self._lanes), judged))
        if self._adds_up:
            zeros = functools.partial(jax.tree.map, jnp.zeros_like, grads)
            jobs["zeros"] = (jax.jit(zeros, out_shardings=where.trainable), ())
        if average:
            jobs["average"] = (self._average(average), (average, state.trainable, np.float32(0)))

        # Traced one after the other, in this thread: in threads the result is not the same every
        # time, which the cache of compiled programs would not survive.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = {
                name: pool.submit(function.lower(*args).compile, options(self._mesh))
                for name, (function, args) in jobs.items()
            }
            bar = progress(compiling.items(), "compiling", len(jobs), unit="program")
            self._compiled = {name: program.result() for name, program in bar}
        return len(jobs)

    def step(
        self, state: TrainState, frozen: Weights, key: Array, batches: Sequence[Sequence[Batch]]
    ) -> tuple[TrainState, Metrics]:
        """One update, not waited for. `batches`: of each data set, one for each part of the step.

        `state` is used up: its memory holds what is returned.
        """
        add_up = functools.partial(self._add_up, state, frozen, key, batches)
        totals, found = zip(*self._threads.map(add_up, self._lanes), strict=True)
        judged = [parts for lane in found for parts in lane]
        average = state.average  # is not the update's matter
        state, metrics = self._compiled["update"](state._replace(average={}), totals, judged)
        return state._replace(average=average), metrics

    def average(self, state: TrainState, share: float) -> TrainState:
        """The state with its average moved by `share` of its way to the weights; uses it up."""
        moved = self._compiled["average"](state.average, state.trainable, np.float32(share))
        return state._replace(average=moved)

    def _add_up(
        self,
        state: TrainState,
        frozen: Weights,
        key: Array,
        batches: Sequence[Sequence[Batch]],
        lane: Sequence[int],
    ) -> tuple[Any, list[list[Judged]]]:
        """The weighted sum of a lane's gradients, and each of its data sets' batches judged."""
        total = self._compiled["zeros"]() if self._adds_up else None
        judged: list[list[Judged]] = []
        for dataset in lane:
            judged.append([])
            for part, batch in enumerate(batches[dataset]):
                program, numbers = self._compiled[_signature(batch)], self._numbers(dataset, part)
                found, total = program(
                    state.trainable, frozen, batch, *numbers, key, state.step, state.memory, total
                )
                judged[-1].append(found)
        return total, judged

    def memory(self, state: TrainState, frozen: Weights) -> int:
        """Bytes on a device at the most: what is held, and what the program that needs most adds to
        it, its sums of gradients and temporaries. What is offloaded is a temporary of the programs
        that bring it; a CPU's find it where it is."""
        temporary = {
            name: program.memory_analysis().temp_size_in_bytes
            for name, program in self._compiled.items()
        }
        update = temporary.pop("update")
        most = max(update, self.side_by_side(max(temporary.values())))
        return self.held(state, frozen) + most

    def side_by_side(self, temporary: int) -> int:
        """Bytes of temporaries at one time, where those of one gradient are so many."""
        return temporary * len(self._lanes)

    def held(self, state: TrainState, frozen: Weights) -> int:
        """Bytes on a device of arrays, or shapes: the state, as far as it is not offloaded, frozen
        weights and gradients."""
        sums = [jax.tree.map(_as_float32, state.trainable)] * len(self._lanes)
        return meshes.bytes_on_a_device((state, frozen, sums))

    def in_host(self, state: TrainState) -> int:
        """Bytes that a device has in the host's memory."""
        return meshes.bytes_in_host(state)

    def brought(self, state: TrainState) -> int:
        """Bytes that the programs of what is offloaded bring to a device, each at its own time,
        when a gradient's temporaries are gone."""
        return max(map(meshes.bytes_in_host, (state.opt_state, state.average)))

    def _numbers(self, dataset: int, part: int) -> tuple[Any, Any, Any]:
        """What tells apart the data sets whose batches go through one program."""
        return np.int32(dataset), np.int32(part), np.float32(self._factors[dataset])

    def _gradients(self, where: Any) -> Callable:
        objective = self._objective
        gathered = functools.partial(meshes.gathered, self._mesh)

        def run(trainable, frozen, batch, dataset, part, factor, key, step, memory, total):
            key = steps.batch_key(key, step, dataset, part)
            own = jax.tree.map(lambda of_all: of_all[dataset], memory)
            return steps.gradients(
                objective, factor, trainable, frozen, batch, key, total, gathered, own
            )

        return jax.jit(run, donate_argnames="total", out_shardings=(self._where_judged(), where))

    def _update(self, where: TrainState) -> Callable:
        how, count = self._objective.loss.importance, len(self._objective.schedule.alphas_cumprod)

        def run(state, totals, judged):
            state = state._replace(opt_state=meshes.on_device(state.opt_state))
            grads = functools.reduce(functools.partial(jax.tree.map, jnp.add), totals)
            new, norm, updates = steps.update(self._optimizer, state, grads)
            joined = [jax.tree.map(lambda *each: jnp.hstack(each), *parts) for parts in judged]
            if how is not None:
                good = jnp.isfinite(norm)
                found = [Found(d.errors, d.timesteps, good & (d.weight > 0)) for d in joined]
                new = new._replace(memory=importance.remember(how, state.memory, found))
            of_each, moved, weights = (
                groups.norms(self._labels, tree) for tree in (grads, updates, state.trainable)
            )
            return new, Metrics(
                jnp.stack([d.loss for d in joined]),
                jnp.stack([by_range(d.errors, d.weight, d.timesteps, count) for d in joined]),
                norm,
                of_each,
                jax.tree.map(jnp.divide, moved, weights),
            )

        where_all = (where, meshes.replicated(self._mesh))
        return jax.jit(run, donate_argnums=0, out_shardings=where_all)

    def _average(self, average: Weights) -> Callable:
        where = jax.tree.map(lambda leaf: leaf.sharding, average)

        def run(average, trainable, share):
            return ema.averaged(meshes.on_device(average), trainable, share)

        return jax.jit(run, donate_argnums=0, out_shardings=where)

    def _where_judged(self) -> Judged:
        """What is said of images stays where they are."""
        whole: Any = meshes.replicated(self._mesh)
        rows: Any = meshes.batch_sharding(self._mesh)
        return Judged(whole, rows, rows, rows)

    def _judged(self, batch: Batch) -> list[Any]:
        """Shapes and shardings of what is said of a data set's batches, of each part of a step."""

        def shape(sizes: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype)

        one, each = shape((), np.float32), shape(batch["weight"].shape, np.float32)
        judged = Judged(one, each, each, shape(each.shape, np.int32))
        return [_placed(judged, self._where_judged())] * self._accumulation

    def _abstract(self, batch: Batch) -> Any:
        where = meshes.batch_sharding(self._mesh)
        return _placed(dict(batch), jax.tree.map(lambda _: where, dict(batch)))


def options(mesh: Mesh) -> dict[str, Any] | None:
    """What XLA is told of the programs, where its flags do not say it already.

    A CPU's are compiled in five sixths of the time by fewer of LLVM's passes, and are as fast.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    is_told = OPTIMIZATION in os.environ.get("XLA_FLAGS", "")
    return {OPTIMIZATION: 1} if on_cpu and not is_told else None


def _lanes(mesh: Mesh, num_datasets: int) -> list[list[int]]:
    """Data sets whose gradients are added up one after the other, in a thread for each lane.

    Cores that share an operation wait for each other: on a CPU, two data sets side by side take
    little more than half the time, and their sums twice the memory. Elsewhere there is one lane.
    """
    one_cpu = mesh.size == 1 and mesh.devices.item().platform == "cpu"
    return [[dataset] for dataset in range(num_datasets)] if one_cpu else [[*range(num_datasets)]]


def _as_float32(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


def _placed(shapes: Any, where: Any) -> Any:
    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, where)


def _signature(batch: Batch) -> Signature:
    return tuple(sorted((name, tuple(value.shape)) for name, value in batch.items()))
