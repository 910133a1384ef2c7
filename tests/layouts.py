"""Trains one tiny model in every layout of up to eight devices; writes what came out as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.layouts FOLDER

A program of its own, run by `test_layouts`: the number of devices is fixed when a process starts.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft import mesh as meshes
from jaxft import params, step
from jaxft.checkpoint import Checkpoints
from jaxft.compiled import Programs
from jaxft.diffusion import schedule
from jaxft.models.unet import UNet2DConditionModel
from jaxft.step import TrainState
from jaxft.tuning import optimizers

STEPS, IMAGES = 30, 8
LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (8, 1), (1, 8), (2, 4)]
"""(data, fsdp); the first is one device."""

UNET: dict[str, Any] = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
COLLECTIVES = (
    r"= \(?([^=()]*)\)? "
    r"(all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\("
)


def batch(n: int) -> dict[str, np.ndarray]:
    """A whole batch, the same for every layout."""
    rng = np.random.default_rng(n)
    return {
        "encoder_hidden_states": rng.standard_normal((IMAGES, 77, 16)).astype(np.float32),
        "weight": np.ones(IMAGES, np.float32),
        "moments": rng.standard_normal((IMAGES, 4, 6, 8)).astype(np.float32),
    }


class Training:
    """The same training, on any mesh."""

    def __init__(self):
        graphdef, shapes = params.abstract(lambda: UNet2DConditionModel(UNET))
        rng = np.random.default_rng(0)
        self.trainable = {
            "unet": {
                name: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
                for name, leaf in shapes.items()
            }
        }
        noising = schedule.from_config({"beta_schedule": "scaled_linear"})
        self.objective = step.Objective({"unet": graphdef}, noising, 0.18215, jnp.float32)
        self.labels = {"unet": dict.fromkeys(self.trainable["unet"], "all")}
        self.optimizer = optimizers.grouped(self.labels, {"all": optimizers.adamw(2e-4)}, 1.0)

    def programs(self, mesh: Mesh) -> Programs:
        """Not compiled yet."""
        return Programs(
            self.objective,
            self.optimizer,
            self.labels,
            mesh,
            loss_weights=[1.0],
            accumulation=1,
            averages=True,
        )

    def run(self, mesh: Mesh) -> tuple[list[float], TrainState, list[tuple[str, int]]]:
        """Losses, the last state, and the communication of a gradient: its kind and numbers."""
        programs, frozen = self.programs(mesh), {"unet": {}}
        key = jax.device_put(jax.random.key(7), meshes.replicated(mesh))
        state = programs.init(jax.tree.map(jnp.array, self.trainable))
        programs.compile(programs.state(self.trainable), frozen, key, [[batch(0)]])
        losses = []
        for n in range(STEPS):
            placed = meshes.put_batch(mesh, batch(n), IMAGES)
            state, metrics = programs.step(state, frozen, key, [[placed]])
            state = programs.average(state, 0.1)
            losses.append(float(metrics.losses[0][0]))
        (text,) = (p.as_text() for name, p in programs._compiled.items() if name not in NAMES)
        return losses, state, communication(text)


NAMES = ("update", "average")


def communication(program: str) -> list[tuple[str, int]]:
    """Of each array that a compiled program exchanges, how, and how many numbers come out."""
    return [
        (kind, int(np.prod([int(size) for size in shape.split(",") if size])))
        for shapes, kind in re.findall(COLLECTIVES, re.sub(r"/\*.*?\*/", "", program))
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


def is_split(leaf: Any) -> bool:
    """Whether it is large, and some axis has whole parts for eight devices."""
    return leaf.size >= meshes.SMALLEST_SHARDED and any(size % 8 == 0 for size in leaf.shape)


def bytes_on_a_device(tree: Any) -> int:
    """The most of any device."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def same_bits(tree: Any, other: Any) -> bool:
    """Whether all arrays are equal."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(one), np.asarray(two)) for one, two in pairs)


def main(folder: Path) -> None:
    training, found, states = Training(), {}, {}
    checkpoints = Checkpoints(folder / "state", keep=len(LAYOUTS))
    meshes_of = {
        f"{data}x{fsdp}": meshes.make(data, fsdp, jax.devices()[: data * fsdp])
        for data, fsdp in LAYOUTS
    }
    for number, (name, mesh) in enumerate(meshes_of.items()):
        losses, state, said = training.run(mesh)
        large = [leaf for leaf in jax.tree.leaves(state) if is_split(leaf)]
        drawn = step.draw(jax.random.key(1), (IMAGES, 4, 6, 4), 1000)
        where = meshes.batch_sharding(mesh)
        noise = jax.jit(
            lambda key: step.draw(key, (IMAGES, 4, 6, 4), 1000).noise.asked, out_shardings=where
        )(jax.random.key(1))
        found[name] = {
            "losses": losses,
            "bytes": bytes_on_a_device(large),
            "whole": sum(leaf.nbytes for leaf in large),
            "collectives": said,
            "same_noise": same_bits(noise, drawn.noise.asked),
        }
        checkpoints.save(number, state, {})
        states[number] = state
    checkpoints.wait()
    split = {fsdp: number for number, (_, fsdp) in enumerate(LAYOUTS)}  # each with most copies
    for own, (name, mesh) in enumerate(meshes_of.items()):
        target = training.programs(mesh).state(training.trainable)
        found[name]["restores"] = all(
            same_bits(checkpoints.restore(number, target)[0], states[number])
            for number in {own, *split.values()}
        )
    checkpoints.close()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
