"""What a run needs of a device's memory, beside what is there, is told before the first step."""

import jax
import jax.numpy as jnp
import pytest

from jaxft import memory, train
from jaxft import mesh as meshes
from jaxft.errors import UserError
from tests.test_train import ONE_SHAPE, arguments, recipe

__all__ = ["recipe"]

GIB = 2**30


def test_too_much_is_refused_with_both_numbers_and_remedies():
    memory.check(3 * GIB, 3 * GIB, "steps")
    memory.check(3 * GIB, None, "steps")
    with pytest.raises(UserError, match=r"steps take 3\.00 of 2\.00 GiB.*batch_size.*mesh\.fsdp"):
        memory.check(3 * GIB, 2 * GIB, "steps")


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_bytes_on_a_device_are_those_that_lie_there(fsdp):
    mesh = meshes.make(-1, fsdp, jax.devices()[:4])
    tree = {
        "large": jnp.ones((64, 128)),
        "small": jnp.ones(7),
        "half": jnp.ones((128, 64), "bfloat16"),
    }
    placed = jax.device_put(tree, meshes.shardings(mesh, tree))
    (device, *_) = mesh.local_devices
    held = [
        shard.data.nbytes
        for leaf in jax.tree.leaves(placed)
        for shard in leaf.addressable_shards
        if shard.device == device
    ]
    assert meshes.bytes_on_a_device(placed) == sum(held)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    assert meshes.bytes_on_a_device(shapes) == sum(held)


def test_a_device_too_small_for_the_weights_is_named_before_anything_is_compiled(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "of_device", lambda: 2**16)
    with pytest.raises(UserError, match=r"memory: the weights, gradients and optimizer alone take"):
        train.main(arguments(recipe, tmp_path / "run", *ONE_SHAPE))
    assert "memory   " not in (tmp_path / "run" / "train.log").read_text()
