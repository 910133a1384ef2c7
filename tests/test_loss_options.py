"""Losses, weightings and noise that a configuration can ask for, and what it must not."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from ml_collections import FrozenConfigDict

from jaxft import compat, config, loss_options, plan
from jaxft.diffusion import losses, noise, schedule, weighting
from jaxft.errors import UserError

SD1: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def asked(*overrides: str, **scheduler: Any) -> losses.Loss:
    """The loss of the shipped fine-tuning with these overrides."""
    found, _ = config.load("configs/train/examples/fine-tuning.yaml", overrides)
    return loss_options.from_config(found.train, schedule.from_config(SD1 | scheduler))


def test_by_default_it_is_the_mean_squared_error_at_uniform_timesteps():
    assert asked() == losses.Loss()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MSELoss", {}),
        ("L1Loss", {}),
        ("HuberLoss", {"delta": 0.3}),
        ("SmoothL1Loss", {"beta": 0.3}),
    ],
)
def test_errors_are_pytorchs(name, options, rng):
    node = {"_target_": f"torch.nn.{name}", "reduction": "none", **options}
    error = compat.build(node, "criterion", "train.loss.criterion").error
    predicted, wanted = (rng.standard_normal((2, 3, 4, 4), np.float32) for _ in range(2))
    ours = losses.image_errors(predicted, wanted, error=error).mean()
    theirs = getattr(torch.nn, name)(**options)(torch.tensor(predicted), torch.tensor(wanted))
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_hcp_diffusions_weighted_losses_are_weightings():
    found = asked("train.loss.criterion={_target_: hcpdiff.loss.MinSNRLoss, gamma: 2.0}")
    noising = schedule.from_config(SD1)
    np.testing.assert_array_equal(found.weights, weighting.weights(noising, "min_snr", gamma=2.0))
    same = asked("train.loss.weighting=min_snr", "train.loss.weighting_kwargs={gamma: 2.0}")
    np.testing.assert_array_equal(found.weights, same.weights)


def test_the_guides_branch_writes_the_plain_loss_in_its_own_way():
    inner = "{_target_: torch.nn.MSELoss, reduction: none}"
    node = f"[{{_target_: hcpdiff.loss.WeightedLoss, _partial_: true, loss: {inner}}}]"
    assert asked(f"train.loss.criterion={node}") == losses.Loss()


def test_an_image_is_scaled_by_the_weight_of_its_timestep(rng):
    predicted, wanted = (rng.standard_normal((3, 2, 2, 4), np.float32) for _ in range(2))
    counts, scale = jnp.array([1.0, 1.0, 0.0]), jnp.array([0.5, 2.0, 7.0])
    ours = losses.mean(losses.image_errors(predicted, wanted, scale=scale), counts)
    each = np.mean(np.square(predicted - wanted), axis=(1, 2, 3))
    assert ours == pytest.approx((0.5 * each[0] + 2.0 * each[1]) / 2, rel=1e-6)


ERRORS = ("MSELoss", "L1Loss", "HuberLoss", "SmoothL1Loss")
NOISES = (
    {"offset": 0.1},
    {"adaptive_noise_scale": 0.1},
    {"perturbation": 0.1},
    {"pyramid": {"level": 3}},
    None,
)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_combination_is_built(kind):
    base = config.load("configs/train/examples/fine-tuning.yaml")[0].train.to_dict()
    noising = schedule.from_config(SD1 | {"prediction_type": kind})
    for error, weights, times, more in itertools.product(
        ERRORS, [None, *weighting.WEIGHTINGS], weighting.TIMESTEPS, NOISES
    ):
        loss = base["loss"] | {
            "criterion": {"_target_": f"torch.nn.{error}"},
            "weighting": weights,
            "timesteps": times,
            "low_discrepancy": more is None,
        }
        train = base | {"loss": loss, "noise": base["noise"] | (more or {})}
        found = loss_options.from_config(FrozenConfigDict(train), noising)
        assert (found.weights is None) == (weights is None)
        assert found.chances is None or found.chances.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.loss.weighting=minsnr"], "train.loss.weighting: 'minsnr' is not one of min_snr"),
        (["train.loss.weighting_kwargs={gamma: 2}"], "there is no train.loss.weighting"),
        (
            ["train.loss.weighting=debiased", "train.loss.weighting_kwargs={gamma: 2}"],
            "train.loss.weighting_kwargs: debiased does not take gamma",
        ),
        (["train.loss.timesteps=normal"], "train.loss.timesteps: 'normal' is not one of uniform"),
        (
            ["train.loss.timesteps_kwargs={first: 900, last: 100}"],
            "train.loss.timesteps: first 900 and last 100 are no range of 0 to 999",
        ),
        (
            [
                "train.loss.criterion={_target_: hcpdiff.loss.MinSNRLoss}",
                "train.loss.weighting=p2",
            ],
            "train.loss.weighting: p2, and train.loss.criterion is weighted by min_snr; keep one",
        ),
        (["train.loss.criterion={_target_: torch.nn.MSE}"], "is no criterion of jaxft"),
        (
            ["train.noise.offset_probability=0.5"],
            "train.noise.offset_probability: there is no offset; set train.noise.offset",
        ),
        (
            ["train.noise.offset=0.1", "train.noise.offset_probability=0"],
            "train.noise.offset_probability: 0 must be above 0, up to 1",
        ),
        (
            ["train.noise.adaptive_noise_scale=-0.1"],
            "train.noise.adaptive_noise_scale: -0.1 makes train.noise.offset weaker, which is 0",
        ),
        (["train.noise.pyramid={levels: 3}"], "train.noise.pyramid: levels unknown; known: level"),
    ],
)
def test_mistakes_are_named(overrides, words):
    with pytest.raises(UserError) as error:
        asked(*overrides)
    assert words in str(error.value)


def test_noise_alone_cannot_be_predicted():
    with pytest.raises(UserError, match=r"ends in noise alone .* needs prediction_type: v_predict"):
        asked(rescale_betas_zero_snr=True)
    asked(rescale_betas_zero_snr=True, prediction_type="v_prediction")


def test_a_models_schedule_is_stretched_as_diffusers_does_it(nano_model, tmp_path):
    def begun(folder: Path) -> dict[str, Any]:
        own = [f"model.pretrained_model_name_or_path={folder}", "model.zero_terminal_snr=true"]
        found, _ = config.load("configs/train/examples/fine-tuning.yaml", own)
        return plan._begin(found)[0].model.scheduler

    with pytest.raises(
        UserError, match=r"^model\.zero_terminal_snr: .* epsilon, .* set it to false"
    ):
        begun(nano_model)
    shutil.copytree(nano_model, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    options = json.loads(file.read_text()) | {"prediction_type": "v_prediction"}
    file.write_text(json.dumps(options))
    made = begun(tmp_path / "v")
    theirs: Any = DDIMScheduler.from_config(options, rescale_betas_zero_snr=True)
    ours = schedule.from_config(made).alphas_cumprod
    # torch's vectorised float32 square root is not correctly rounded, numpy's is.
    np.testing.assert_allclose(ours, theirs.alphas_cumprod, rtol=1e-5)
    assert ours[-1] == 0
    exported: Any = DDIMScheduler.from_config(made)
    np.testing.assert_array_equal(exported.alphas_cumprod, theirs.alphas_cumprod)
    exported.set_timesteps(10)
    assert exported.timesteps[0] == 999  # where there is noise alone


def test_perturbed_noise_is_seen_and_not_asked_for():
    shape, key = (4, 8, 8, 4), jax.random.key(0)
    plain, same, _ = noise.draw(key, shape)
    np.testing.assert_array_equal(plain, same)
    wanted, seen, _ = noise.draw(key, shape, noise.Recipe(perturbation=0.1))
    np.testing.assert_array_equal(wanted, plain)
    assert np.std(np.asarray(seen - wanted)) == pytest.approx(0.1, rel=0.1)
