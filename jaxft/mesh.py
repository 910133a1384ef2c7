"""Devices: one mesh with the axes `data` and `fsdp`, and one rule that says what lies where.

A batch is split over both axes; weights, moments and gradients are split over `fsdp`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError

HOST = "pinned_host"
"""What JAX calls the host's memory that a device reads and writes."""

SMALLEST_SHARDED = 2**12
"""Arrays of fewer scalars are whole on every device: splitting them saves nothing."""


def make(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data × fsdp devices; -1 stands for all that the other axis leaves.

    Raises:
        UserError: the two do not multiply to the number of devices.
    """
    devices = list(devices or jax.devices())
    sizes = {"data": data, "fsdp": fsdp}
    given = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) == 1 and given > 0 and len(devices) % given == 0:
        sizes[free[0]] = len(devices) // given
    if sizes["data"] * sizes["fsdp"] != len(devices) or min(sizes.values()) < 1:
        raise UserError(
            f"mesh: data {data} × fsdp {fsdp} is not the number of devices, {len(devices)}; "
            "one of the two may be -1: all that is left"
        )
    shape = (sizes["data"], sizes["fsdp"])
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices)


def spec(shape: tuple[int, ...], fsdp: int) -> P:
    """How an array of weights is split: over its largest axis that `fsdp` divides, if large."""
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(shape) < SMALLEST_SHARDED:
        return P()
    split = max(axes, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == split else None for axis in range(split + 1)))


def shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """The sharding of every leaf (anything with a shape) of a tree of weights or moments."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf.shape, fsdp)), tree)


def share(mesh: Mesh | AbstractMesh, weights: Any) -> float:
    """What one device holds of a tree of weights (anything with a shape); 1: all of it."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(weights)]
    held = [
        where.shard_shape(shape)
        for where, shape in zip(jax.tree.leaves(shardings(mesh, weights)), shapes, strict=True)
    ]
    return float(sum(map(np.prod, held)) / sum(map(np.prod, shapes)))


def gathered(mesh: Mesh, weights: Any) -> Any:
    """Weights as a step computes with them: those that are split are put together on every device.

    Without this the compiler splits activations as it finds the weights, and exchanges them at
    every layer. Of the gradient, each device then adds up the part that it keeps.
    """
    fsdp, whole = mesh.shape["fsdp"], replicated(mesh)

    def gather(leaf: jax.Array) -> jax.Array:
        if spec(leaf.shape, fsdp) == P():
            return leaf
        return jax.lax.with_sharding_constraint(leaf, whole)

    return jax.tree.map(gather, weights)


def in_host(tree: Any, where: Any) -> Any:
    """The shardings `where` of a tree, in the host's memory: there is each device's part.

    Arrays of a few scalars, as counts, stay on the devices: moving them saves nothing.
    """

    def move(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        small = np.prod(leaf.shape) < SMALLEST_SHARDED
        return sharding if small else sharding.with_memory_kind(HOST)

    return jax.tree.map(move, tree, where)


def on_device(tree: Any) -> Any:
    """Arrays to compute with, inside a program or outside: those in the host's memory are moved."""

    def bring(leaf: Any) -> Any:
        is_there = jax.typeof(leaf).memory_space == jax.memory.Space.Host
        return jax.device_put(leaf, jax.memory.Space.Device) if is_there else leaf

    return jax.tree.map(bring, tree)


def has_host_memory(mesh: Mesh) -> bool:
    """Whether programs of these devices can use the host's memory; CPUs' do from jax 0.10.2 on."""
    try:
        where = replicated(mesh).with_memory_kind(HOST)
        jax.jit(lambda: jnp.zeros(1), out_shardings=where).lower().compile()
    except (ValueError, jax.errors.JaxRuntimeError):
        return False
    return True


def bytes_on_a_device(tree: Any) -> int:
    """Of arrays, or of shapes with shardings, what one device holds in its own memory."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree) if not _is_in_host(leaf))


def bytes_in_host(tree: Any) -> int:
    """Of arrays, or of shapes with shardings, what one device has in the host's memory."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree) if _is_in_host(leaf))


def _bytes(leaf: Any) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _is_in_host(leaf: Any) -> bool:
    return leaf.sharding.memory_kind == HOST


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches: the first axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def own_rows(mesh: Mesh, rows: int) -> slice | np.ndarray:
    """The rows of a batch of so many that lie on this process' devices; ascending."""
    if jax.process_count() == 1:
        return slice(None)
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[place] for place in places]))


def put_batch(mesh: Mesh, own: dict[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
    """A batch of so many rows on the devices; each process gives its `own_rows`."""
    where = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(where, value, (rows, *value.shape[1:]))
        for name, value in own.items()
    }


def put(tree: Any, where: Any) -> Any:
    """Arrays that every process has whole, on the devices; `where` is a tree of shardings."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, where)


def fetch(tree: Any) -> Any:
    """Arrays on the host, whole in every process; all of a run's must ask together."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(on_device(leaf), tiled=True)

    return jax.tree.map(whole, tree)


def most_held(mesh: Mesh) -> float | None:
    """The most that one of this process' devices has held so far, in GiB; None where that is not
    known, as on a CPU."""
    told = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [own["peak_bytes_in_use"] for own in told if "peak_bytes_in_use" in own]
    return max(peaks) / 2**30 if peaks else None


def local(mesh: Mesh) -> Mesh:
    """The mesh; of several processes, one of this process' devices alone."""
    return mesh if jax.process_count() == 1 else make(devices=mesh.local_devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())
