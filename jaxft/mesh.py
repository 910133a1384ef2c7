"""Devices: one mesh with the axes `data` and `fsdp`, and one rule that says what lies where.

A batch is split over both axes; weights, moments and gradients are split over `fsdp`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError

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


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf (anything with a shape) of a tree of weights or moments."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf.shape, fsdp)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches: the first axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())
