"""Timesteps drawn by their losses, beside improved diffusion's resampler as numpy states it."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import mesh as meshes
from jaxft import plan, step
from jaxft.compiled import Programs
from jaxft.diffusion import importance, weighting
from jaxft.errors import UserError
from jaxft.tuning import optimizers
from tests.test_loss_options import asked
from tests.test_option_matrix import Case
from tests.test_step import one_device

T = 12


class Resampler:
    """`LossSecondMomentResampler`, whose timesteps are here those of one range."""

    def __init__(self, count: int, history: int, uniform: float):
        self.history, self.uniform = history, uniform
        self.losses, self.counts = np.zeros((count, history)), np.zeros(count, int)

    def weights(self) -> np.ndarray:
        if not (self.counts == self.history).all():
            return np.ones(len(self.losses)) / len(self.losses)
        weights = np.sqrt(np.mean(self.losses**2, axis=-1))
        weights /= np.sum(weights)
        weights *= 1 - self.uniform
        return weights + self.uniform / len(weights)

    def update(self, places: Any, losses: Any) -> None:
        for place, loss in zip(places, losses, strict=True):
            if self.counts[place] == self.history:
                self.losses[place, :-1] = self.losses[place, 1:]
                self.losses[place, -1] = loss
            else:
                self.losses[place, self.counts[place]] = loss
                self.counts[place] += 1


@pytest.mark.parametrize(("ranges", "size"), [(T, 10), (3, 4), (3, 40)])
def test_chances_are_improved_diffusions(ranges, size, rng):
    """With a range for each timestep; with fewer, each range's chance is shared by its timesteps.
    In the last case a batch has more losses of a range than are remembered."""
    how = importance.recipe(T, ranges, history=3, uniform=0.01)
    ours, theirs = importance.begin(how, 1), Resampler(ranges, 3, 0.01)
    remember = jax.jit(lambda memory, found: importance.remember(how, memory, [found]))
    warm = 0
    for number in range(40):
        chances = importance.chances(how, jax.tree.map(lambda x: x[0], ours))
        wanted = np.repeat(theirs.weights(), T // ranges) / (T // ranges)
        np.testing.assert_allclose(chances, wanted, rtol=1e-5, err_msg=str(number))
        warm += np.ptp(wanted) > 0
        times = rng.integers(0, T, size).astype(np.int32)
        losses = rng.exponential(1 + times).astype(np.float32)
        counted = rng.random(size) < 0.8
        ours = remember(ours, importance.Found(losses, times, counted))
        theirs.update(times[counted] * ranges // T, losses[counted])
    assert warm > 10


def test_chances_that_are_computed_are_drawn_with_and_give_the_mean_of_all():
    chances = jnp.asarray(0.9 * weighting.logit_normal(100) + 0.001, jnp.float32)
    key = jax.random.key(0)
    draw = jax.jit(lambda key, table: weighting.draw(key, 40_000, table, low_discrepancy=True))
    drawn = np.asarray(draw(key, chances))
    assert np.abs(np.bincount(drawn, minlength=100) / 40_000 - chances).max() < 1.1 / 40_000
    values = np.arange(100) ** 2
    weighed = np.mean(values[drawn] / (100 * np.asarray(chances)[drawn]))
    assert weighed == pytest.approx(values.mean(), rel=1e-2)


ROW = {"mode": "unet", "error": "mse", "target": "epsilon", "kind": "epsilon", "mask": "none"}
PARTS, HISTORY, UNIFORM = 2, 2, 0.1


def drawing_by_losses() -> Any:
    made = Case(ROW)
    how = importance.recipe(1000, 2, HISTORY, UNIFORM)
    made.objective = made.objective._replace(loss=made.objective.loss._replace(importance=how))
    return made


def trainer(case: Any, mesh: Any) -> Callable[..., tuple[list[Any], list[Any]]]:
    """What makes steps of two data sets, in two parts, of 4 images: from the state before one, or
    the beginning, the state after each and its numbers."""
    labels = {part: dict.fromkeys(own, "all") for part, own in case.trainable.items()}
    optimizer = optimizers.grouped(labels, {"all": optimizers.adamw(1e-2)}, None)
    options: Any = {"loss_weights": (1.0, 0.5), "accumulation": PARTS}
    programs = Programs(case.objective, optimizer, labels, mesh, **options)
    frozen, key = jax.device_put((case.frozen, case.key), meshes.replicated(mesh))
    shapes = programs.state(case.trainable)
    programs.compile(shapes, frozen, key, [[batch(case, 0)]] * 2)

    def run(first: int, last: int, state: Any = None) -> tuple[list[Any], list[Any]]:
        where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        begun = programs.init(jax.tree.map(jnp.array, case.trainable))
        state = begun if state is None else jax.device_put(state, where)
        states, numbers = [jax.device_get(state)], []
        for number in range(first, last):
            batches = [
                [meshes.put_batch(mesh, batch(case, number, d, p), 4) for p in range(PARTS)]
                for d in range(2)
            ]
            state, metrics = programs.step(state, frozen, key, batches)
            states.append(jax.device_get(state))
            numbers.append(jax.device_get(metrics))
        return states, numbers

    return run


def batch(case: Any, *number: int) -> dict[str, np.ndarray]:
    """Four images, of which the last does not count."""
    two = [case.batch(sum(x * 10**n for n, x in enumerate(number)) + 1000 * k) for k in range(2)]
    made = {name: np.concatenate([one[name] for one in two]) for name in two[0]}
    made["weight"][-1] = 0
    return made


def test_a_run_draws_by_its_losses_on_any_devices_and_resumes():
    case = drawing_by_losses()
    run = trainer(case, one_device())
    states, numbers = run(0, 6)
    resamplers = [Resampler(2, HISTORY, UNIFORM) for _ in range(2)]
    judge = jax.jit(
        lambda trained, batch, key, memory: step.judged(
            case.objective, trained, case.frozen, batch, key, memory
        )
    )
    warm = 0
    for number, (state, told) in enumerate(zip(states, numbers, strict=False)):
        for dataset, resampler in enumerate(resamplers):
            chances = np.repeat(resampler.weights(), 500) / 500
            warm += np.ptp(chances) > 0
            places, errors = [], []
            for part in range(PARTS):
                key = step.batch_key(case.key, number, dataset, part)
                memory = jax.tree.map(lambda x, d=dataset: x[d], state.memory)
                one = judge(state.trainable, batch(case, number, dataset, part), key, memory)
                counts = 1 / (1000 * chances[one.timesteps])
                loss = np.mean((np.asarray(one.errors) * counts)[:3])
                assert told.losses[dataset, part] == pytest.approx(loss, rel=1e-4)
                places += (np.asarray(one.timesteps[:3]) // 500).tolist()
                errors += np.asarray(one.errors[:3]).tolist()
            resampler.update(places, errors)
    assert warm > 6
    kept = np.sort(states[-1].memory.losses, axis=-1)
    np.testing.assert_allclose(kept, np.sort([r.losses for r in resamplers], axis=-1), rtol=1e-4)

    resumed, _ = run(3, 6, states[3])
    jax.tree.map(np.testing.assert_array_equal, resumed[-1], states[-1])
    spread, _ = trainer(case, meshes.make(2, 2, jax.devices()[:4]))(0, 6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), spread[-1], states[-1]
    )


def test_its_options_are_checked():
    found = asked("train.loss.timesteps=importance", "train.loss.timesteps_kwargs={ranges: 5}")
    assert (found.importance, found.chances) == (importance.recipe(1000, 5, 10, 0.001), None)
    for options, words in (
        (
            "{ranges: 1001}",
            "train.loss.timesteps: ranges: 1001 must be a whole number from 1 to 1000",
        ),
        ("{history: 0}", "train.loss.timesteps: history: 0 must be a whole number from 1"),
        ("{uniform: 0}", "train.loss.timesteps: uniform: 0 must be above 0"),
        ("{mean: 1}", "train.loss.timesteps_kwargs: importance does not take mean"),
    ):
        with pytest.raises(UserError) as error:
            asked("train.loss.timesteps=importance", f"train.loss.timesteps_kwargs={options}")
        assert str(error.value).startswith(words)


def test_a_run_that_is_too_short_for_it_is_told_so():
    found = asked("train.loss.timesteps=importance")
    dataset: Any = types.SimpleNamespace(name="cats", plan=types.SimpleNamespace(batch_size=4))
    assert plan._alike(found, 50, [dataset]) == []  # 10 for each of 20 ranges, if they come so
    (notice,) = plan._alike(found, 49, [dataset])
    assert "no effect on cats: of its 196 images too few" in notice
