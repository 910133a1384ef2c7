"""Devices in a grid, and which array lies how on them."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxft import mesh as meshes
from jaxft import params, step
from jaxft.errors import UserError
from jaxft.formats import published
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import optimizers


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({}, (4, 1)),
        ({"data": 2, "fsdp": 2}, (2, 2)),
        ({"data": -1, "fsdp": 2}, (2, 2)),
        ({"data": 1, "fsdp": -1}, (1, 4)),
    ],
)
def test_axes_multiply_to_all_devices(sizes, wanted):
    mesh = meshes.make(**sizes, devices=jax.devices()[:4])
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == wanted


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (2, 4), (-1, -1), (0, -1), (4, 0)])
def test_other_grids_are_refused(data, fsdp):
    with pytest.raises(UserError, match=f"mesh: data {data} × fsdp {fsdp} .*devices, 4; .*-1"):
        meshes.make(data, fsdp, jax.devices()[:4])


@given(st.lists(st.integers(1, 300), max_size=4).map(tuple), st.sampled_from([1, 2, 4, 8]))
def test_a_split_array_is_whole_parts_of_its_largest_axis_that_fits(shape, fsdp):
    spec = meshes.spec(shape, fsdp)
    axes = [axis for axis, name in enumerate(spec) if name == "fsdp"]
    fitting = [size for size in shape if size % fsdp == 0]
    large = np.prod(shape) >= meshes.SMALLEST_SHARDED
    assert bool(axes) == bool(fsdp > 1 and fitting and large)
    if axes:
        assert [shape[axis] for axis in axes] == [max(fitting)]


def test_batches_are_split_over_both_axes_and_weights_over_one(rng):
    mesh = meshes.make(2, 2, jax.devices()[:4])
    batch = rng.standard_normal((8, 3)).astype(np.float32)
    placed = jax.device_put(batch, meshes.batch_sharding(mesh))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    weights = {"large": np.zeros((64, 128), np.float32), "small": np.zeros(64, np.float32)}
    spread = jax.device_put(weights, meshes.shardings(mesh, weights))
    assert spread["large"].sharding.spec == P(None, "fsdp")
    assert spread["small"].sharding.is_fully_replicated


@pytest.mark.parametrize("configs", [published.SD15, published.SDXL], ids=["sd15", "sdxl"])
def test_devices_share_out_weights_moments_and_average(configs):
    """All of Stable Diffusion but biases and norms and their average, 0.05 % of the state."""
    _, shapes = params.abstract(lambda: UNet2DConditionModel(configs.parts["unet"]))
    state = jax.eval_shape(
        lambda weights: step.init(optimizers.adamw(1e-5), weights, averages=True), {"unet": shapes}
    )
    leaves = jax.tree.leaves(state)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    small = [leaf for leaf in leaves if leaf.size < meshes.SMALLEST_SHARDED]
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in small)
    assert kept < 5e-4 * whole
    for fsdp in (2, 4, 8, 64):
        mesh = AbstractMesh((1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        placed = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            state,
            meshes.shardings(mesh, state),
        )
        assert meshes.bytes_on_a_device(placed) == (whole - kept) / fsdp + kept


def test_the_share_of_a_device_tells_of_widths_that_cannot_be_divided():
    """Seven is in none of 320, 640, 1280, 768 and 4."""
    _, shapes = params.abstract(lambda: UNet2DConditionModel(published.SD15.parts["unet"]))
    for fsdp, share in {1: 1, 2: 1 / 2, 4: 1 / 4, 7: 1}.items():
        mesh = AbstractMesh((1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        assert meshes.share(mesh, shapes) == pytest.approx(share, abs=1e-3)
