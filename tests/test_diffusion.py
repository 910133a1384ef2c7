"""Schedules, losses and samplers against diffusers' schedulers and the laws they obey."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from jaxft.diffusion import losses, samplers, schedule, scheduler_config
from jaxft.errors import UserError

SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIRS = {
    "DDIMScheduler": DDIMScheduler,
    "PNDMScheduler": PNDMScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
}
SHAPE = (2, 3, 5, 4)  # b h w c
MIX = 0.5 * np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


def draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.mark.parametrize(
    "config",
    [
        {},
        SD1,
        {**SD1, "beta_schedule": "linear", "num_train_timesteps": 100},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.01, 0.02, 0.3]},
    ],
)
def test_schedule_is_diffusers_bit_for_bit(config):
    theirs = DDPMScheduler(**config).alphas_cumprod.numpy()
    ours = schedule.from_config(config).alphas_cumprod
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


def test_rescaled_schedule_is_diffusers_and_ends_in_noise_alone():
    config = {**SD1, "rescale_betas_zero_snr": True}
    theirs = DDPMScheduler(**config).alphas_cumprod.numpy()
    ours = schedule.from_config(config).alphas_cumprod
    # torch's vectorised float32 square root is not correctly rounded, numpy's is.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[-1] == 0


def test_noise_and_velocity_are_diffusers():
    theirs = DDPMScheduler(**SD1)
    ours = schedule.from_config({**SD1, "prediction_type": "v_prediction"})
    x0, noise, timesteps = draw(1), draw(2), np.array([3, 999])
    steps: Any = torch.from_numpy(timesteps)
    noisy = theirs.add_noise(nchw(x0), nchw(noise), steps)
    velocity = theirs.get_velocity(nchw(x0), nchw(noise), steps)
    # One rounding of float32 in another place.
    args = (jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(timesteps))
    np.testing.assert_allclose(schedule.add_noise(ours, *args), nhwc(noisy), atol=1e-6)
    np.testing.assert_allclose(schedule.target(ours, *args), nhwc(velocity), atol=1e-6)


@pytest.mark.parametrize("prediction_type", schedule.TARGETS)
def test_a_perfect_prediction_recovers_x0(prediction_type):
    ours = schedule.from_config({**SD1, "prediction_type": prediction_type})
    x0, noise, timesteps = jnp.asarray(draw(1)), jnp.asarray(draw(2)), jnp.array([3, 700])
    noisy = schedule.add_noise(ours, x0, noise, timesteps)
    perfect = schedule.target(ours, x0, noise, timesteps)
    alpha = np.sqrt(ours.alphas_cumprod[timesteps])[:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    recovered = schedule.to_x0(prediction_type, perfect, noisy, alpha, sigma)
    np.testing.assert_allclose(recovered, x0, atol=1e-5)  # float32, divided by alpha = 0.3


def diffusers_sample(scheduler, noise: np.ndarray, count: int) -> np.ndarray:
    """StableDiffusionPipeline's loop around a network that looks at sample and timestep."""
    scheduler.set_timesteps(count)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it starts at the second of two equal timesteps
    x = nchw(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = torch.tanh(torch.einsum("oc,bchw->bohw", torch.from_numpy(MIX), scaled) + t / 1000)
        x = scheduler.step(output, t, x).prev_sample
    return nhwc(x)


@jax.jit
def run(noise: jax.Array, table: samplers.Table) -> jax.Array:
    def network(x, t):
        return jnp.tanh(jnp.einsum("oc,bhwc->bhwo", MIX, x) + t / 1000)

    return samplers.sample(network, noise, table)


def jaxft_sample(config: dict, noise: np.ndarray, count: int) -> np.ndarray:
    return np.asarray(run(jnp.asarray(noise), scheduler_config.table(config, count, strict=True)))


SPACINGS = [{"timestep_spacing": s} for s in ("leading", "linspace", "trailing")]
OFFSET = {"timestep_spacing": "leading", "steps_offset": 1}
KARRAS = {"use_karras_sigmas": True}
ENDS_ABOVE_0 = {"final_sigmas_type": "sigma_min"}
OPTIONS: dict[str, list[dict]] = {
    "DDIMScheduler": [
        *({"clip_sample": False, **spacing} for spacing in SPACINGS),
        {"clip_sample": True, "set_alpha_to_one": False, **OFFSET},
        {"clip_sample_range": 0.5},
    ],
    "PNDMScheduler": [
        *({"skip_prk_steps": True, **spacing} for spacing in SPACINGS),
        {"skip_prk_steps": True, "set_alpha_to_one": True, **OFFSET},
    ],
    "EulerDiscreteScheduler": [
        *SPACINGS,
        *({**KARRAS, **spacing} for spacing in SPACINGS),
        {**KARRAS, "sigma_min": 0.1, "sigma_max": 9.0},
        {"interpolation_type": "log_linear", **OFFSET},
        ENDS_ABOVE_0,
    ],
    "DPMSolverMultistepScheduler": [
        *SPACINGS,
        *({**KARRAS, **spacing} for spacing in SPACINGS),
        {**KARRAS, "beta_schedule": "squaredcos_cap_v2"},
        {"lower_order_final": False, **OFFSET},
        ENDS_ABOVE_0,
        {**ENDS_ABOVE_0, **KARRAS, "euler_at_final": True},
        {"solver_order": 1},
    ],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_samplers_are_diffusers(name, options, prediction_type):
    if name == "PNDMScheduler" and prediction_type == "sample":
        pytest.skip("diffusers' PNDM has no such prediction")
    config = {**SD1, **options, "prediction_type": prediction_type}
    for count in (1, 2, 7, 20, 50):
        noise = draw(count)
        theirs = diffusers_sample(THEIRS[name](**config), noise, count)
        ours = jaxft_sample({"_class_name": name, **config}, noise, count)
        # float32 steps in another order of operations, each carried on by the network.
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr(name):
    config = {
        **SD1,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    theirs = diffusers_sample(THEIRS[name](**config), draw(0), 10)
    ours = jaxft_sample({"_class_name": name, **config}, draw(0), 10)
    # Euler starts at sigma 4096, where float32 keeps 5e-4 of a unit.
    tolerance = 2e-3 if name == "EulerDiscreteScheduler" else 1e-4
    np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("name", scheduler_config.SAMPLERS)
def test_every_sampler_returns_x0_from_perfect_predictions(name):
    x0, noise = draw(1), draw(2)
    config = {"_class_name": name, **SD1, "clip_sample": False, "skip_prk_steps": True}
    table = scheduler_config.table({**config, "set_alpha_to_one": True}, 12)
    known = schedule.from_config(config).alphas_cumprod

    def perfect(x, t):
        squared = jnp.interp(t, jnp.arange(1000), known)
        return (x - jnp.sqrt(squared) * x0) / jnp.sqrt(1 - squared)

    # Started from the noisy version of x0 that this sampler expects.
    first = np.interp(table.steps.timestep[0], np.arange(1000), known)
    start = (np.sqrt(first) * x0 + np.sqrt(1 - first) * noise) / table.steps.input_scale[0]
    end = samplers.sample(perfect, jnp.asarray(start / table.init_noise_sigma), table)
    np.testing.assert_allclose(end, x0, atol=1e-3)  # noise of float32, divided by alpha = 0.07


def test_a_files_foreign_options_are_ignored_a_users_are_not():
    stable_diffusion_1_5 = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        **SD1,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert len(scheduler_config.table(stable_diffusion_1_5, 50).steps.timestep) == 51
    with pytest.raises(UserError, match="clip_sample"):
        scheduler_config.table(stable_diffusion_1_5, 50, strict=True)


@pytest.mark.parametrize("name", scheduler_config.SAMPLERS)
def test_all_options_that_diffusers_saves_are_known(name):
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    config = dict(THEIRS[name](**SD1, **options).config)
    del config["_use_default_values"]
    table = scheduler_config.table({"_class_name": name, **config}, 10, strict=True)
    assert len(table.steps.timestep) >= 10


@pytest.mark.parametrize(
    ("config", "count", "words"),
    [
        ({"_class_name": "LCMScheduler"}, 10, ["LCMScheduler", "EulerDiscreteScheduler"]),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, 10, ["thresholding", "False"]),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "log"}, 10, ["log", "trailing"]),
        ({"_class_name": "DDIMScheduler", "beta_schedul": "linear"}, 10, ["beta_schedule"]),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}, 10, ["scaled_linear"]),
        ({"_class_name": "DDIMScheduler", "beta_start": "x"}, 10, ["beta_start", "number"]),
        ({"_class_name": "DDIMScheduler", "beta_end": 7}, 10, ["beta_end"]),
        ({"_class_name": "DDIMScheduler", "clip_sample": "yes"}, 10, ["clip_sample", "true"]),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow"}, 10, ["v_prediction"]),
        ({"_class_name": "DDIMScheduler", "steps_offset": 1}, 1000, ["steps_offset", "999"]),
        ({"_class_name": "DDIMScheduler"}, 0, ["num_inference_steps"]),
        ({"_class_name": "DDIMScheduler"}, 1001, ["num_inference_steps", "1000"]),
        ({"_class_name": "PNDMScheduler"}, 10, ["skip_prk_steps", "True"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, 10, ["solver_order"]),
        (
            {
                "_class_name": "DDIMScheduler",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            10,
            ["rescale_betas_zero_snr", "v_prediction"],
        ),
    ],
)
def test_what_is_not_supported_is_named(config, count, words):
    with pytest.raises(UserError) as error:
        scheduler_config.table(config, count, strict=True)
    assert all(word in str(error.value) for word in words)


def test_loss_is_the_mean_over_images_that_count():
    predicted, wanted = jnp.asarray(draw(1)), jnp.asarray(draw(2))

    def loss(predicted, wanted, weight):
        return losses.mean(losses.image_errors(predicted, wanted), weight)

    whole = torch.nn.functional.mse_loss(torch.tensor(draw(1)), torch.tensor(draw(2)))
    np.testing.assert_allclose(loss(predicted, wanted, jnp.ones(2)), whole, rtol=1e-6)
    first = loss(predicted[:1], wanted[:1], jnp.ones(1))
    np.testing.assert_allclose(loss(predicted, wanted, jnp.array([1.0, 0.0])), first, rtol=1e-6)
    gradient = jax.grad(loss)(predicted, wanted, jnp.zeros(2))
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE))
