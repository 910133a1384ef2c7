"""What the host does for a step of SDXL, apart from data: `scripts/bench.py --mode dispatch`."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import random_model
from flax import nnx

from jaxft import collector, params, step
from jaxft import mesh as meshes
from jaxft.compiled import Programs
from jaxft.diffusion import schedule
from jaxft.formats import published
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import optimizers

RATE = 1e-5


class Sum(UNet2DConditionModel):
    """A network whose weights are only added up: a step is nearly nothing but its dispatch."""

    def __call__(self, sample: jax.Array, *_: Any) -> jax.Array:
        """The sample, times that sum."""
        return sample * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))


def measure(steps: int, warmup: int, accumulation: int) -> dict[str, Any]:
    """Milliseconds that `Programs.step` takes to return, with SDXL's weights in name and number.

    Each has two scalars, so that computing them takes little, which on a CPU is in the figures. A
    moment is apart, or packed with others, as it is in truth.
    """
    graphdef, shapes = params.abstract(lambda: Sum(published.SDXL.parts["unet"]))
    trainable: Any = {"unet": {name: np.full(2, 1e-3, np.float32) for name in shapes}}
    labels = {"unet": dict.fromkeys(shapes, "all")}
    kinds = {"large": optax.adamw(RATE), "small": optimizers.adamw(RATE)}

    def kind(name: str, _: Any) -> str:
        return "large" if shapes[name].size > optimizers.SMALL else "small"

    programs = Programs(
        step.Objective(
            {"unet": graphdef}, schedule.from_config(random_model.SCHEDULER), 1.0, jnp.float32
        ),
        optimizers.grouped(labels, {"all": optimizers.split(kinds, kind)}, 1.0),
        labels,
        mesh := meshes.make(devices=jax.devices()[:1]),
        loss_weights=[1.0],
        accumulation=accumulation,
    )
    batch = {
        "encoder_hidden_states": np.zeros((1, 77, 8), np.float32),
        "weight": np.ones(1, np.float32),
        "moments": np.ones((1, 2, 2, 8), np.float32),
    }
    key, frozen, state = jax.random.key(0), {"unet": {}}, programs.init(trainable)
    programs.compile(state, frozen, key, [[batch]])
    batches, taken = [[meshes.put_batch(mesh, batch, 1)] * accumulation], []
    with collector.spared():
        for _ in range(warmup + steps):
            started = time.perf_counter()
            state, _ = programs.step(state, frozen, key, batches)
            taken.append(1e3 * (time.perf_counter() - started))
            jax.block_until_ready(state)
    return {
        "weights": len(shapes),
        "arrays": len(jax.tree.leaves(state)),
        "ms": round(float(np.median(taken[warmup:])), 2),
        "best_ms": round(min(taken[warmup:]), 2),
    }
