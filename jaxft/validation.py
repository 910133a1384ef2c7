"""The loss on images that are held out: always at the same noise and the same timesteps.

Each image is judged at every timestep of a grid, with noise that its content and the timestep
choose. So two losses differ by the weights alone, and an image's own does not depend on the others,
on the run's seed or on how many are judged at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft import charts, gallery, hosts
from jaxft import mesh as meshes
from jaxft import step as steps
from jaxft.assembly import Run
from jaxft.data.loader import Dataset
from jaxft.diffusion import losses
from jaxft.diffusion import noise as noises
from jaxft.log import RunLog
from jaxft.prediction import Objective, Weights
from jaxft.step import Draws, TrainState

SEED = "seed"
"""In a batch, what an image's noise is drawn from, uint32 [b]."""


class Validation:
    """Judges the weights of a run from time to time; `folder` gets the curves as pictures."""

    def __init__(self, run: Run, folder: Path, log: RunLog):
        options, plan = run.plan.config.train.validation, run.plan
        self._run, self._folder, self._log, self._every = run, folder, log, options.every
        self.timesteps = grid(len(plan.noising.alphas_cumprod), options.timesteps)

        def compute(trainable: Weights, frozen: Weights, batch: dict[str, Array]) -> Array:
            return curve(run.objective, trainable, frozen, batch, self.timesteps)

        self._compute = jax.jit(compute, out_shardings=meshes.replicated(plan.mesh))

    def is_due(self, step: int) -> bool:
        """Whether the weights are to be judged after this step."""
        plan = self._run.plan
        return bool(plan.held_out) and (step % self._every == 0 or step == plan.total_steps)

    def __call__(self, step: int, state: TrainState) -> None:
        """Logs the losses of the weights, and of their average if there is one."""
        plan = self._run.plan
        if not plan.held_out:
            return
        chosen = {"trained": steps.result(state)} | (
            {"average": meshes.on_device(state.average)} if state.average else {}
        )
        losses = {
            dataset.name: {which: self.judge(dataset, own) for which, own in chosen.items()}
            for dataset in plan.held_out
        }
        told = {
            n: {which: curve.tolist() for which, curve in own.items()} for n, own in losses.items()
        }
        self._log.judge(step, told, self.timesteps.tolist())
        if hosts.is_first():
            self._draw(step, told)

    def judge(self, dataset: Dataset, trainable: Weights) -> Float[np.ndarray, " n"]:
        """The mean loss of a data set's images at each timestep."""
        total, count, mesh = np.zeros(len(self.timesteps)), 0.0, self._run.plan.mesh
        size = dataset.plan.batch_size
        for number in range(dataset.num_batches):
            rows = meshes.own_rows(mesh, size)
            drawn = dataset.plan[number]
            own = [dataset.records[image].digest for image in drawn.images[rows].tolist()]
            batch = dataset.batch(number, rows)
            batch[SEED] = np.array([int(digest[:8], 16) for digest in own], np.uint32)
            placed = meshes.put_batch(mesh, batch, size)
            losses = self._compute(trainable, self._run.frozen, placed)
            images = float(np.sum(drawn.weights))
            total += images * np.asarray(losses, np.float64)
            count += images
        return total / count

    def _draw(self, step: int, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        target = self._folder / "validation"
        target.mkdir(exist_ok=True)
        for name, curves in losses.items():
            pixels = charts.draw(
                f"{name}: loss by timestep, step {step}", self.timesteps.tolist(), curves
            )
            gallery.write_image(target / f"{name}-{step}.png", pixels, {}, 100)
            self._log.picture(step, f"validation/{name}", pixels)


def grid(num_timesteps: int, count: int) -> Int[np.ndarray, " n"]:
    """`count` timesteps, no more than there are, each in the middle of an equal share of all."""
    count = min(count, num_timesteps)
    return ((np.arange(count) + 0.5) * num_timesteps / count).astype(np.int32)


def curve(
    objective: Objective,
    trainable: Weights,
    frozen: Weights,
    batch: dict[str, Array],
    timesteps: Int[np.ndarray, " n"],
) -> Float[Array, " n"]:
    """The mean loss of a batch's images at each timestep, float32."""
    batch = dict(batch)
    seeds = batch.pop(SEED)
    batch = steps.encoded(objective, frozen, batch)
    _, *shape = steps.latent_shape(batch["moments"])

    def draw(seed: Array, timestep: Array) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), timestep)
        latent_key, noise_key = jax.random.split(key)
        noise = noises.draw(noise_key, (1, *shape), objective.loss.noise)
        return jax.random.normal(latent_key, tuple(shape)), jax.tree.map(lambda x: x[0], noise)

    def at(timestep: Array) -> Array:
        latent_noise, noise = jax.vmap(lambda seed: draw(seed, timestep))(seeds)
        times = jnp.full(len(seeds), timestep)
        draws = Draws(latent_noise, noise, times, jax.random.key(0))  # nothing is dropped
        if "masked_moments" in batch:
            draws = draws._replace(masked_noise=latent_noise)
        return losses.mean(
            steps.errors(objective, trainable, frozen, batch, draws), batch["weight"]
        )

    return jax.lax.map(at, jnp.asarray(timesteps))
