"""Losses beside statements of their formulas: NumPy's, PyTorch's, scikit-image's."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from jaxft import compat
from jaxft.diffusion import losses, schedule, ssim, weighting
from jaxft.errors import UserError
from tests.test_loss_options import SD1, asked

KINDS = ("epsilon", "v_prediction", "sample")
TIMES = np.array([3, 400, 950])


def noised(kind: str, rng) -> tuple[Any, ...]:
    """The schedule, alpha and sigma [b, 1, 1, 1], latents, noise, and a prediction of that kind."""
    noising = schedule.from_config(SD1 | {"prediction_type": kind})
    share = np.asarray(noising.alphas_cumprod, np.float64)[TIMES][:, None, None, None]
    latents, noise, predicted = (rng.standard_normal((3, 4, 6, 4)) for _ in range(3))
    return noising, np.sqrt(share), np.sqrt(1 - share), latents, noise, predicted


def as_kind(kind: str, x0: Any, noise: Any, alpha: Any, sigma: Any) -> Any:
    v = alpha * noise - sigma * x0
    return {"epsilon": noise, "v_prediction": v, "sample": x0}[kind]


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_compared_as_the_target(kind, target, rng):
    noising, alpha, sigma, latents, noise, predicted = noised(kind, rng)
    x_t = alpha * latents + sigma * noise
    x0 = {
        "epsilon": (x_t - sigma * predicted) / alpha,
        "v_prediction": alpha * x_t - sigma * predicted,
        "sample": predicted,
    }[kind]
    found = as_kind(target, x0, (x_t - alpha * x0) / sigma, alpha, sigma)
    wanted = np.abs(found - as_kind(target, latents, noise, alpha, sigma)).mean()
    units = weighting.units(noising, target)
    assert (units is None) == (kind == target)
    ours = losses.image_errors(
        jnp.asarray(predicted),
        jnp.asarray(as_kind(kind, latents, noise, alpha, sigma)),
        error=jnp.abs,
        unit=None if units is None else jnp.asarray(units)[TIMES],
    )
    assert float(ours.mean()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["exponential", "snr"])
@pytest.mark.parametrize("kind", ["HuberLoss", "SmoothL1Loss"])
def test_widths_that_fall_are_kohyas_under_pytorchs_error(name, kind, rng):
    option = "delta" if kind == "HuberLoss" else "beta"
    node = f"{{_target_: torch.nn.{kind}, {option}: 0.2, schedule: {name}}}"
    how = asked(f"train.loss.criterion={node}")
    predicted, wanted = (rng.standard_normal((3, 4, 6, 4), np.float32) for _ in range(2))
    share = np.asarray(schedule.from_config(SD1).alphas_cumprod, np.float64)[TIMES]
    if name == "exponential":
        widths = np.exp(np.log(0.2) / 1000 * TIMES)
    else:
        widths = 0.8 / (1 + np.sqrt((1 - share) / share)) ** 2 + 0.2
    theirs = [
        float(getattr(torch.nn, kind)(**{option: w})(torch.tensor(p), torch.tensor(q)))
        for w, p, q in zip(widths, predicted, wanted, strict=True)
    ]
    ours = losses.image_errors(
        jnp.asarray(predicted),
        jnp.asarray(wanted),
        error=how.error,
        scale=jnp.asarray(how.weights)[TIMES],
        unit=jnp.asarray(how.units)[TIMES],
    )
    assert float(ours.mean()) == pytest.approx(np.mean(theirs), rel=1e-5)


def test_dissimilarity_is_scikit_images(rng):
    x = rng.standard_normal((2, 16, 20, 4)).astype(np.float32)
    y = x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    ours = ssim.dissimilarity(jnp.asarray(x), jnp.asarray(y))
    assert ours.shape == (2, 6, 10, 4)
    for n in range(2):
        found: Any = structural_similarity(
            (x[n].astype(np.float64) + 1) / 2,
            (y[n].astype(np.float64) + 1) / 2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
            full=True,
        )
        np.testing.assert_allclose(ours[n], 1 - found[1][5:-5, 5:-5], atol=1e-5)
    assert float(jnp.max(jnp.abs(ssim.dissimilarity(jnp.asarray(x), jnp.asarray(x))))) < 1e-5
    mask = rng.random((2, 16, 20)).astype(np.float32)
    np.testing.assert_array_equal(ssim.inner(jnp.asarray(mask)), mask[:, 5:-5, 5:-5])
    small = ssim.dissimilarity(jnp.asarray(x[:, :8]), jnp.asarray(y[:, :8]))
    assert small.shape == (2, 8, 10, 4)


def test_an_image_may_be_divided_by_the_mean_of_its_mask(rng):
    errors, mask = rng.random((3, 2, 2, 4)), rng.random((3, 2, 2))
    mask[2] = 0
    found = losses.of_each(jnp.asarray(errors), jnp.asarray(mask), normalise_mask=True)
    shares = [np.average(e.mean(-1), weights=m) for e, m in zip(errors[:2], mask[:2], strict=True)]
    np.testing.assert_allclose(found, [*shares, 0], rtol=1e-5)


EDM = {
    "MinSNRWeight": lambda s, g: np.minimum(1 / (s * np.sqrt(1 + s**2)), g),
    "SoftMinSNRWeight": lambda s, g: g**2 / (s**2 + g**2),
    "KDiffMinSNRWeight": lambda s, g: (g * s) ** 2 / (s**2 + g**2) ** 2,
    "EDMWeight": lambda s, g: (s**2 + g**2) / (s * g) ** 2,
}


@pytest.mark.parametrize("name", EDM)
def test_weights_of_the_branch_edm_are_its_formulas_on_x0(name):
    """An error of the noise is one of x0 divided by σ."""
    inner = "{_target_: torch.nn.MSELoss, reduction: none}"
    found: Any = asked(
        f"train.loss.criterion={{_target_: hcpdiff.loss.{name}, gamma: 2.0, loss: {inner}}}"
    ).weights
    share = np.asarray(schedule.from_config(SD1).alphas_cumprod, np.float64)
    sigma = np.sqrt((1 - share) / share)
    np.testing.assert_allclose(found, EDM[name](sigma, 2.0) * sigma**2, rtol=1e-4)


def test_hcp_diffusions_sum_of_an_error_and_ssim_is_read():
    inner = "{_target_: torch.nn.MSELoss, reduction: none}"
    weighted = f"{{_target_: hcpdiff.loss.WeightedLoss, _partial_: true, loss: {inner}}}"
    similar = "{_target_: hcpdiff.loss.SSIMLoss, weight: 0.5}"
    assert asked(f"train.loss.criterion=[{weighted}, {similar}]") == losses.Loss(ssim=0.5)
    assert asked("train.loss.criterion.ssim=0.5") == losses.Loss(ssim=0.5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.loss.criterion={_target_: torch.nn.HuberLoss, schedule: cosine}"],
            "train.loss.criterion.schedule: 'cosine' is not one of constant, exponential, snr",
        ),
        (
            ["train.loss.criterion={_target_: torch.nn.HuberLoss, schedule: snr}"],
            "train.loss.criterion: 1 must lie between 0 and 1",
        ),
        (
            ["train.loss.target=sample", "train.loss.weighting=min_snr"],
            "train.loss.weighting: min_snr has no meaning for a model that",
        ),
        (["train.loss.criterion.delta=0.1"], "train.loss.criterion: delta: unknown option"),
        (["train.loss.criterion.ssim=-1.0"], "train.loss.criterion: ssim: -1 must be at least 0"),
    ],
)
def test_mistakes_are_named(overrides, words):
    with pytest.raises(UserError) as error:
        asked(*overrides)
    assert words in str(error.value)


def test_the_error_of_a_criterion_is_pytorchs(rng):
    node = {"_target_": "torch.nn.HuberLoss", "delta": 0.3}
    error = compat.build(node, "criterion", "train.loss.criterion").error
    x = rng.standard_normal(20).astype(np.float32)
    theirs = torch.nn.HuberLoss(delta=0.3, reduction="none")(torch.tensor(x), torch.zeros(20))
    np.testing.assert_allclose(error(jnp.asarray(x)), theirs.numpy(), rtol=1e-6)
