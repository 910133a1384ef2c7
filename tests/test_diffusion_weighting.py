"""Weights, timesteps and noise are what their papers and the trainers that have them state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from jaxft.diffusion import noise as noises
from jaxft.diffusion import schedule, weighting
from jaxft.errors import UserError

SD1 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
ZERO_SNR = SD1 | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def noising(prediction_type: str, **options) -> schedule.NoiseSchedule:
    return schedule.from_config(SD1 | {"prediction_type": prediction_type} | options)


EPSILON, VELOCITY = noising("epsilon"), noising("v_prediction")


def test_signal_to_noise_is_diffusers():
    theirs = compute_snr(DDPMScheduler(**SD1), torch.arange(1000))
    np.testing.assert_allclose(weighting.snr(EPSILON), theirs, rtol=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_each_weighting_is_its_formula(gamma):
    """As the papers and HCP-Diffusion's loss classes have it for noise."""
    alpha2 = EPSILON.alphas_cumprod.astype(np.float64)
    snr, sigma2 = alpha2 / (1 - alpha2), 1 - alpha2
    wanted = {
        "min_snr": np.minimum(gamma / snr, 1),
        "soft_min_snr": gamma**3 / (snr**2 + gamma**3),
        "kdiff_min_snr": 4 * (gamma * snr) ** 2 / (snr**2 + gamma**2) ** 2,
        "edm": (sigma2 + gamma**2) / (snr * sigma2 * gamma**2),
        "p2": 1 / (1 + snr) ** gamma,
    }
    for name, table in wanted.items():
        ours = weighting.weights(EPSILON, name, gamma=gamma)
        np.testing.assert_allclose(ours, table, rtol=1e-5, err_msg=name)
    debiased = weighting.weights(EPSILON, "debiased")
    np.testing.assert_allclose(debiased, 1 / np.sqrt(np.minimum(snr, 1000)), rtol=1e-5)


def test_min_snr_of_velocities_is_diffusers_training_scripts():
    snr = weighting.snr(VELOCITY)
    wanted = np.minimum(snr, 5.0) / (snr + 1)
    ours = weighting.weights(VELOCITY, "min_snr", gamma=5.0)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    wanted = 1 / (np.minimum(snr, 1000) + 1)  # kohya's trainer
    np.testing.assert_allclose(weighting.weights(VELOCITY, "debiased"), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in weighting.WEIGHTINGS if name != "debiased"])
def test_a_weighting_is_one_whatever_is_predicted(name, rng):
    """The same x0 predicted, as noise and as v: the same weighted error."""
    timesteps = jnp.arange(0, 1000, 37)
    shape = (len(timesteps), 2, 2, 4)
    latents, noise, wrong = (rng.standard_normal(shape, np.float32) for _ in range(3))
    losses = []
    for kind in (EPSILON, VELOCITY):
        alpha = np.sqrt(kind.alphas_cumprod[timesteps])[:, None, None, None]
        sigma = np.sqrt(1 - alpha**2)
        noisy = schedule.add_noise(kind, latents, noise, timesteps)
        p, q = schedule.X0_FROM[kind.prediction_type](alpha, sigma)
        predicted = (latents + 0.1 * wrong - p * noisy) / q  # that amounts to x0 + 0.1 wrong
        error = np.square(predicted - schedule.target(kind, latents, noise, timesteps))
        losses.append(weighting.weights(kind, name)[timesteps] * error.mean((1, 2, 3)))
    np.testing.assert_allclose(*losses, rtol=2e-2)  # float32 where alpha or sigma is nearly 0


def test_weights_are_finite_where_there_is_noise_alone():
    zero = schedule.from_config(ZERO_SNR)
    assert zero.alphas_cumprod[-1] == 0
    for name in weighting.WEIGHTINGS:
        assert np.isfinite(weighting.weights(zero, name)).all()


def test_weighting_a_prediction_of_samples_is_refused():
    with pytest.raises(UserError, match="min_snr has no meaning for a model that predicts samples"):
        weighting.weights(noising("sample"), "min_snr")


# -------------------------------------------------------------------------------------- timesteps

KEY = jax.random.key(0)


@pytest.mark.parametrize("low_discrepancy", [False, True])
@pytest.mark.parametrize("name", list(weighting.TIMESTEPS))
def test_timesteps_are_drawn_with_their_chances(name, low_discrepancy):
    chances = weighting.TIMESTEPS[name](100)
    draw = jax.jit(
        lambda key: weighting.draw(key, 40_000, chances, low_discrepancy=low_discrepancy)
    )
    drawn = np.bincount(draw(KEY), minlength=100) / 40_000
    most = 1.01 / 40_000 if low_discrepancy else 6 * np.sqrt(chances.max() / 40_000)
    assert np.abs(drawn - chances).max() < most


def test_logit_normal_timesteps_are_sigmoids_of_normal_numbers():
    shares = 1 / (1 + np.exp(-(0.5 + 0.8 * np.random.default_rng(0).standard_normal(200_000))))
    wanted = np.histogram(shares, 50, (0, 1))[0] / 200_000
    ours = weighting.logit_normal(1000, 0.5, 0.8).reshape(50, 20).sum(1)
    np.testing.assert_allclose(ours, wanted, atol=2e-3)


def test_cosine_map_is_its_definition():
    """t = 1 - 1 / (tan(π u / 2) + 1) of uniform u."""
    u = (np.arange(100_000) + 0.5) / 100_000
    shares = 1 - 1 / (np.tan(np.pi * u / 2) + 1)
    wanted = np.histogram(shares, 50, (0, 1))[0] / 100_000
    ours = weighting.cosine_map(1000).reshape(50, 20).sum(1)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_a_range_of_timesteps_is_kept():
    drawn = weighting.draw(KEY, 5000, weighting.uniform(1000, 200, 299))
    assert (drawn.min(), drawn.max()) == (200, 299)


def test_a_low_discrepancy_batch_covers_the_range_evenly():
    drawn = np.asarray(weighting.draw(KEY, 10, weighting.uniform(1000), low_discrepancy=True))
    assert sorted(drawn // 100) == list(range(10))
    assert list(drawn) != sorted(drawn)


# ------------------------------------------------------------------------------------------ noise


def test_offsets_are_a_number_for_each_channel_of_some_images():
    recipe = noises.Recipe(offset=0.1, offset_probability=0.3)
    channels = noises.draw(KEY, (5000, 1, 1, 4), recipe).channels
    assert channels is not None
    offset = np.asarray(noises.offset(channels, jnp.zeros((5000, 1, 1, 4)), recipe))
    has = np.any(offset != 0, axis=(1, 2, 3))
    assert has.mean() == pytest.approx(0.3, abs=0.03)
    assert np.all(offset[has] != 0)
    assert np.std(offset[has]) == pytest.approx(0.1, rel=0.03)
    without = noises.draw(KEY, (2, 4, 5, 4))
    np.testing.assert_array_equal(noises.draw(KEY, (2, 4, 5, 4), recipe).asked, without.asked)
    assert without.channels is None


def test_upscaling_is_pytorchs(rng):
    for size, small in ((16, 5), (16, 16), (9, 1), (10, 3)):
        values = rng.standard_normal(size).astype(np.float32)
        ours = noises._upscale(size, jnp.float32(small)) @ values
        theirs = torch.nn.functional.interpolate(
            torch.tensor(values[None, None, :small]), size=size, mode="linear"
        )
        np.testing.assert_allclose(ours, theirs[0, 0], atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (4, 16)])
def test_pyramid_noise_has_variance_one_for_each_image(size):
    noise = jax.random.normal(KEY, (6, *size, 4))
    pyramid = jax.jit(noises.pyramid)(jax.random.key(1), noise)
    np.testing.assert_allclose(np.std(pyramid, axis=(1, 2, 3)), 1, rtol=1e-5)
    alone = noises.pyramid(jax.random.key(1), noise.at[1:].set(0))
    np.testing.assert_allclose(alone[0], pyramid[0], atol=1e-5)  # an image knows no other


def test_pyramid_noise_is_correlated_over_space():
    noise = jax.random.normal(KEY, (200, 16, 16, 4))
    plain, pyramid = np.asarray(noise), np.asarray(noises.pyramid(KEY, noise))
    near = [np.mean(n[:, 1:] * n[:, :-1]) for n in (plain, pyramid)]
    assert abs(near[0]) < 0.02
    assert near[1] > 0.3
    same = noises.pyramid(KEY, noise, level=1)  # nothing added
    np.testing.assert_allclose(same, plain / plain.std((1, 2, 3), keepdims=True), atol=1e-5)
