"""The forward process: how much signal and how much noise a latent holds at each timestep.

Variance preserving (Ho et al. 2020, https://arxiv.org/abs/2006.11239): a noisy latent is
`alpha * x0 + sigma * noise`, with `alpha = sqrt(alphas_cumprod[t])` and `alpha² + sigma² = 1`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.shapes import Latents, Timesteps


class NoiseSchedule(NamedTuple):
    """What a `scheduler_config.json` says about training."""

    alphas_cumprod: np.ndarray
    """[T] float32, falling with the timestep; bit for bit what diffusers computes."""
    prediction_type: str
    """What the network predicts: a key of `TARGETS`."""


TARGETS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    # Salimans and Ho 2022, https://arxiv.org/abs/2202.00512
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "sample": lambda x0, noise, alpha, sigma: x0,
}
"""What a network of each prediction type should return, from (x0, noise, alpha, sigma)."""


X0_FROM: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (0.0, 1.0),
}
"""The clean latent is `p * noisy + q * prediction`: (p, q) from (alpha, sigma)."""

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}
"""The keys of a scheduler's configuration that `from_config` reads, with diffusers' defaults."""


def from_config(config: Mapping[str, Any], where: str = "scheduler_config.json") -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler, whatever its class.

    A missing key has its value in `DEFAULTS`; keys that are not there are sampling's and ignored.

    Raises:
        UserError: a value of the wrong type, an unknown beta schedule or prediction type, or betas
            outside (0, 1); the message starts with `where`.
    """
    options = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    check_types(options, DEFAULTS, where)
    if options["prediction_type"] not in TARGETS:
        raise UserError(
            f"{where}: prediction_type {options['prediction_type']!r} is not supported; "
            f"choose one of {', '.join(TARGETS)}"
        )
    betas = _betas(options, where)
    if options["rescale_betas_zero_snr"]:
        betas = _rescale_to_zero_snr(betas)
    return NoiseSchedule(_cumulative_product(np.float32(1) - betas), options["prediction_type"])


def check_types(options: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Compares each option's type with that of its default (any, where that is null).

    Raises:
        UserError: naming the first option of another type.
    """
    for key, default in defaults.items():
        number = isinstance(default, int | float) and not isinstance(default, bool)
        expected = int | float if number else type(default)
        value = options[key]
        fits = isinstance(value, expected) and (not number or not isinstance(value, bool))
        if default is not None and not fits:
            name = {bool: "true or false", str: "a word"}.get(type(default), "a number")
            raise UserError(f"{where}: {key} must be {name}, not {value!r}")


def add_noise(
    schedule: NoiseSchedule, latents: Latents, noise: Latents, timesteps: Timesteps
) -> Latents:
    """Noisy latents, `alpha * latents + sigma * noise`, float32."""
    alpha, sigma = _alpha_and_sigma(schedule, timesteps)
    return alpha * latents.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def target(
    schedule: NoiseSchedule, latents: Latents, noise: Latents, timesteps: Timesteps
) -> Latents:
    """What the network should return for `add_noise` of the same arguments, float32."""
    alpha, sigma = _alpha_and_sigma(schedule, timesteps)
    return TARGETS[schedule.prediction_type](
        latents.astype(jnp.float32), noise.astype(jnp.float32), alpha, sigma
    )


def to_x0(
    prediction_type: str, prediction: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """The clean latent that a prediction about the noisy `x` amounts to.

    Undefined for epsilon where alpha is 0: such an `x` holds no trace of it.
    """
    from_noisy, from_prediction = X0_FROM[prediction_type](alpha, sigma)
    return from_noisy * x + from_prediction * prediction


def clean(
    schedule: NoiseSchedule, prediction: Latents, noisy: Latents, timesteps: Timesteps
) -> Latents:
    """The clean latents that predictions about noisy ones amount to, float32."""
    alpha, sigma = _alpha_and_sigma(schedule, timesteps)
    found = prediction.astype(jnp.float32), noisy.astype(jnp.float32)
    return to_x0(schedule.prediction_type, *found, alpha, sigma)


def _alpha_and_sigma(schedule: NoiseSchedule, timesteps: Timesteps) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma of each timestep, [b, 1, 1, 1] float32."""
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)[timesteps][:, None, None, None]
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)


def _betas(options: Mapping[str, Any], where: str) -> np.ndarray:
    """The variance of the noise that each step of the forward process adds, [T] float32."""
    kind, count = options["beta_schedule"], options["num_train_timesteps"]
    start, end = options["beta_start"], options["beta_end"]
    schedules: dict[str, Callable[[], np.ndarray]] = {
        "linear": lambda: _linspace(start, end, count),
        "scaled_linear": lambda: _linspace(start**0.5, end**0.5, count) ** 2,
        "squaredcos_cap_v2": lambda: np.array(
            [min(1 - _cosine((i + 1) / count) / _cosine(i / count), 0.999) for i in range(count)],
            np.float32,
        ),
    }
    if options["trained_betas"] is not None:
        betas = np.asarray(options["trained_betas"], np.float32)
    elif kind in schedules:
        betas = schedules[kind]()
    else:
        raise UserError(
            f"{where}: beta_schedule {kind!r} is not supported; "
            f"choose one of {', '.join(schedules)}"
        )
    if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas < 1)):
        raise UserError(
            f"{where}: beta_start, beta_end or trained_betas: all betas must lie in (0, 1)"
        )
    return betas


def _cosine(t: float) -> float:
    """Cumulative alpha of Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """`torch.linspace` in float32, bit for bit: fused steps counted from the nearer end."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    upward, downward = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, upward, downward).astype(np.float32)


def _cumulative_product(factors: np.ndarray) -> np.ndarray:
    """`torch.cumprod` in float32 on CPU: accumulated in float64, each term rounded."""
    return np.cumprod(np.asarray(factors, np.float64)).astype(np.float32)


def _rescale_to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last step leaves no signal; Lin et al. 2023, algorithm 1.

    https://arxiv.org/abs/2305.08891
    """
    root = np.sqrt(_cumulative_product(np.float32(1) - betas))
    first = root[0]
    shifted = root - root[-1]
    cumulative = (shifted * (first / (first - root[-1]))) ** 2
    alphas = np.concatenate([cumulative[:1], cumulative[1:] / cumulative[:-1]])
    return np.float32(1) - alphas
