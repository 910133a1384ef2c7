"""Samplers: from noise to a clean latent in a few evaluations of the network.

Every sampler here is a table of numbers, computed before the first step in float64. Step n asks
the network about `input_scale * x`, makes a prediction of its output, and takes

    prediction_n = from_sample * x + from_output * output
    x            = keep * x + sum_k weights[k] * prediction_(n-k) + clipped * clamp(prediction_n)

so that one loop (`sample`) runs them all. The numbers agree with diffusers' schedulers of the same
names and options.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.diffusion.schedule import X0_FROM, NoiseSchedule
from jaxft.errors import UserError
from jaxft.shapes import Latents

Column = Any  # np.ndarray when built; jax.Array inside `sample`


class Steps(NamedTuple):
    """The table's rows; each field is [n], `weights` [n, k], float64 until `sample` rounds it."""

    timestep: Column
    """What the network is told; not always whole (Euler with Karras sigmas)."""
    input_scale: Column
    from_sample: Column
    from_output: Column
    keep: Column
    weights: Column
    """The latest prediction first."""
    clipped: Column


class Table(NamedTuple):
    """A sampler with its steps laid out; a pytree, so that it can be an argument of a jit."""

    steps: Steps
    init_noise_sigma: float
    """Standard deviation of the sample before the first step."""
    clip: float | None = None
    """Bound of the clamped prediction; None where nothing is clamped."""


def sample(
    denoise: Callable[[Latents, jax.Array], jax.Array], noise: Latents, table: Table
) -> Latents:
    """Clean latents from noise of unit variance: one `lax.scan` over the table, float32.

    `denoise` gets the scaled latents and one timestep (a float32 scalar) and returns the network's
    output, guidance applied, in any floating dtype.
    """
    steps = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), table.steps)
    start = noise.astype(jnp.float32) * table.init_noise_sigma
    history = jnp.zeros((steps.weights.shape[1], *start.shape), jnp.float32)

    def step(
        carry: tuple[jax.Array, jax.Array], row: Steps
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, history = carry
        output = denoise(row.input_scale * x, row.timestep).astype(jnp.float32)
        prediction = row.from_sample * x + row.from_output * output
        history = jnp.concatenate([prediction[None], history[:-1]])
        # An explicit sum: a dot product would run in reduced precision on accelerators.
        x = row.keep * x + jnp.sum(row.weights[:, None, None, None, None] * history, axis=0)
        if table.clip is not None:
            x = x + row.clipped * jnp.clip(prediction, -table.clip, table.clip)
        return (x, history), None

    return jax.lax.scan(step, (start, history), steps)[0][0]


def ddim(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
    set_alpha_to_one: bool = True,
    steps_offset: int = 0,
    timestep_spacing: str = "leading",
) -> Table:
    """DDIM without noise (eta 0); Song et al. 2020, https://arxiv.org/abs/2010.02502.

    With `clip_sample` the predicted clean latent is clamped, the predicted noise is left as it is.
    """
    total = len(schedule.alphas_cumprod)
    timesteps = np.rint(_spaced(timestep_spacing, total, num_inference_steps, steps_offset))
    previous = timesteps - total // num_inference_steps
    alpha, sigma = _alpha_and_sigma(schedule, timesteps, set_alpha_to_one)
    alpha_next, sigma_next = _alpha_and_sigma(schedule, previous, set_alpha_to_one)
    _check_signal(schedule, alpha)
    from_noise = -alpha * sigma_next / sigma
    unclipped = np.zeros_like(alpha) if clip_sample else alpha_next
    steps = _steps(
        timesteps,
        x0_from=X0_FROM[schedule.prediction_type](alpha, sigma),
        keep=sigma_next / sigma,
        weights=(from_noise + unclipped)[:, None],
        clipped=alpha_next - unclipped,
    )
    return Table(steps, init_noise_sigma=1.0, clip=clip_sample_range if clip_sample else None)


def plms(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    set_alpha_to_one: bool = False,
    steps_offset: int = 0,
    timestep_spacing: str = "leading",
) -> Table:
    """PNDM without Runge-Kutta steps; Liu et al. 2022, https://arxiv.org/abs/2202.09778.

    The second step starts again from the first one's sample, so the network runs
    `num_inference_steps + 1` times. That sample is recovered from what the first step made of it.
    """
    total = len(schedule.alphas_cumprod)
    ratio = total // num_inference_steps
    timesteps = np.rint(_spaced(timestep_spacing, total, num_inference_steps, steps_offset))
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    start = timesteps + ratio * (np.arange(len(timesteps)) == 1)
    alpha, sigma = _alpha_and_sigma(schedule, start, set_alpha_to_one)
    alpha_next, sigma_next = _alpha_and_sigma(schedule, start - ratio, set_alpha_to_one)
    _check_signal(schedule, alpha)
    # Formula 9 of the paper: DDIM's step, in terms of the noise.
    noise_weight = sigma_next - alpha_next * sigma / alpha
    x0_sample, x0_output = X0_FROM[schedule.prediction_type](alpha, sigma)
    keep = alpha_next / alpha + noise_weight * (1 - alpha * x0_sample) / sigma
    gain = noise_weight * (-alpha * x0_output) / sigma
    weights = gain[:, None] * _adams_bashforth(len(timesteps))
    if len(timesteps) > 1:
        weights[1, 1] -= keep[1] * gain[0] / keep[0]
        keep[1] /= keep[0]
    steps = _steps(timesteps, x0_from=(0.0, 1.0), keep=keep, weights=weights)
    return Table(steps, init_noise_sigma=1.0)


def euler(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    interpolation_type: str = "linear",
    use_karras_sigmas: bool | None = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    final_sigmas_type: str = "zero",
) -> Table:
    """Euler's method on dx/dsigma; Karras et al. 2022, https://arxiv.org/abs/2206.00364.

    Its sample is `x0 + sigma * noise`, divided by sqrt(sigma² + 1) for the network.
    """
    known = _known_sigmas(schedule)
    timesteps = _spaced(timestep_spacing, len(known), num_inference_steps, steps_offset)
    timesteps = timesteps.astype(np.float32)
    if interpolation_type == "log_linear":
        # One more than there are timesteps: the extra one is where the last step ends.
        exponents = np.linspace(np.log(known[-1]), np.log(known[0]), num_inference_steps + 1)
        sigmas = np.exp(exponents)
    else:
        sigmas = np.interp(timesteps, np.arange(len(known)), known)
    if use_karras_sigmas:
        lowest = float(sigmas[-1]) if sigma_min is None else sigma_min
        highest = float(sigmas[0]) if sigma_max is None else sigma_max
        sigmas = _karras(lowest, highest, num_inference_steps)
        timesteps = _to_timesteps(sigmas, known)
    last = {"zero": 0.0, "sigma_min": float(known[0])}[final_sigmas_type]
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    sigma, sigma_next = sigmas[: len(timesteps)], sigmas[1 : len(timesteps) + 1]
    alpha = 1 / np.sqrt(sigma**2 + 1)
    x0_sample, x0_output = X0_FROM[schedule.prediction_type](alpha, sigma * alpha)
    steps = _steps(
        timesteps,
        input_scale=alpha,
        x0_from=(x0_sample * alpha, x0_output),
        keep=sigma_next / sigma,
        weights=(1 - sigma_next / sigma)[:, None],
    )
    largest = float(sigmas.max())
    leading = timestep_spacing == "leading"
    return Table(steps, init_noise_sigma=math.hypot(largest, 1) if leading else largest)


def dpm_solver_plus_plus(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    solver_order: int = 2,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    use_karras_sigmas: bool | None = False,
    final_sigmas_type: str = "zero",
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    beta_schedule: str = "linear",
) -> Table:
    """DPM-Solver++ (2M, midpoint); Lu et al. 2022, https://arxiv.org/abs/2211.01095.

    Of order 1 it is DDIM on other timesteps.
    """
    known = _known_sigmas(schedule)
    timesteps = _spaced(timestep_spacing, len(known), num_inference_steps, steps_offset, ends=True)
    if use_karras_sigmas:
        sigmas = _karras(float(known[0]), float(known[-1]), num_inference_steps)
        timesteps = _to_timesteps(sigmas, known)
        # A quirk of diffusers: on this schedule the fraction is cut off.
        timesteps = np.floor(timesteps) if beta_schedule == "squaredcos_cap_v2" else timesteps
        timesteps = np.rint(timesteps)
    else:
        timesteps = np.rint(timesteps)
        sigmas = known[timesteps.astype(np.int64)].astype(np.float64)
    last = {"zero": 0.0, "sigma_min": float(known[0])}[final_sigmas_type]
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    count, sigma, sigma_next = len(timesteps), sigmas[:-1], sigmas[1:]
    alpha, alpha_next = 1 / np.sqrt(sigma**2 + 1), 1 / np.sqrt(sigma_next**2 + 1)
    gain = alpha_next * (1 - sigma_next / sigma)
    simple_end = final_sigmas_type == "zero" or euler_at_final or (lower_order_final and count < 15)
    at = np.arange(1, count - simple_end) if solver_order == 2 else np.arange(0)
    second = np.zeros(count)  # weight of the difference to the prediction before
    ratio = np.log(sigma[at] / sigma_next[at]) / np.log(sigma[at - 1] / sigma[at])
    second[at] = 0.5 * gain[at] * ratio
    steps = _steps(
        timesteps,
        x0_from=X0_FROM[schedule.prediction_type](alpha, sigma * alpha),
        keep=(sigma_next * alpha_next) / (sigma * alpha),
        weights=np.stack([gain + second, -second], axis=1),
    )
    return Table(steps, init_noise_sigma=1.0)


def _steps(
    timesteps: np.ndarray,
    *,
    x0_from: tuple[Any, Any],
    keep: np.ndarray,
    weights: np.ndarray,
    input_scale: np.ndarray | float = 1.0,
    clipped: np.ndarray | float = 0.0,
) -> Steps:
    """Rows from columns, constants spread out."""
    count = len(timesteps)
    spread = [
        np.broadcast_to(np.asarray(column, np.float64), count)
        for column in (timesteps, input_scale, *x0_from, keep, clipped)
    ]
    return Steps(*spread[:5], weights=weights, clipped=spread[5])


def _spaced(spacing: str, total: int, count: int, offset: int, *, ends: bool = False) -> np.ndarray:
    """Timesteps to visit, falling, [count] float64, whole but for "linspace".

    Table 2 of Lin et al. 2023 (https://arxiv.org/abs/2305.08891). With `ends` the lowest
    timestep is where the last step ends, not where it starts.

    Raises:
        UserError: fewer than one step, or more than the model was trained with.
    """
    if not 1 <= count <= total - ends:
        raise UserError(
            f"infer_args.num_inference_steps must lie between 1 and {total - ends}, not {count}"
        )
    spacings = {
        "linspace": lambda n: np.linspace(0, total - 1, n)[::-1],
        "leading": lambda n: np.arange(n, dtype=np.float64)[::-1] * (total // n) + offset,
        "trailing": lambda n: np.rint(np.arange(total, 0, -total / n)) - 1,
    }
    if ends and spacing != "trailing":
        return spacings[spacing](count + 1)[:-1]
    return spacings[spacing](count)


def _alpha_and_sigma(
    schedule: NoiseSchedule, timesteps: np.ndarray, set_alpha_to_one: bool
) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma at whole timesteps, [n] float64; a negative one is the end of sampling.

    Raises:
        UserError: a timestep beyond the schedule's last.
    """
    alphas_cumprod = schedule.alphas_cumprod.astype(np.float64)
    index = timesteps.astype(np.int64)
    if index.max() >= len(alphas_cumprod):
        raise UserError(
            f"steps_offset with this num_inference_steps asks for timestep {index.max()}; "
            f"the model knows 0 to {len(alphas_cumprod) - 1}"
        )
    end = 1.0 if set_alpha_to_one else alphas_cumprod[0]
    squared = np.where(index >= 0, alphas_cumprod[np.maximum(index, 0)], end)
    return np.sqrt(squared), np.sqrt(1 - squared)


def _check_signal(schedule: NoiseSchedule, alpha: np.ndarray) -> None:
    if schedule.prediction_type == "epsilon" and not np.all(alpha > 0):
        raise UserError(
            "rescale_betas_zero_snr: a model that predicts epsilon cannot start from noise alone; "
            "use timestep_spacing: leading, or prediction_type: v_prediction if it was trained so"
        )


def _known_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """sigma / alpha at every timestep, [T] float32, rising; finite where no signal is left."""
    alphas_cumprod = np.where(schedule.alphas_cumprod > 0, schedule.alphas_cumprod, 2.0**-24)
    alphas_cumprod = alphas_cumprod.astype(np.float32)
    return np.sqrt((np.float32(1) - alphas_cumprod) / alphas_cumprod)


def _karras(lowest: float, highest: float, count: int) -> np.ndarray:
    """Falling sigmas, equally spaced in sigma^(1/7); Karras et al. 2022, equation 5."""
    return np.linspace(highest ** (1 / 7), lowest ** (1 / 7), count) ** 7


def _to_timesteps(sigmas: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Timesteps, not whole, at which the schedule reaches `sigmas`: linear in log sigma."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(known), np.arange(len(known)))


def _adams_bashforth(count: int) -> np.ndarray:
    """PLMS: weights of the latest five outputs in each step's noise, [count, 5].

    The order grows from 1 to 4. The second step averages two outputs; its own, at a timestep
    asked twice, has weight 0 ever after.
    """
    rows = np.zeros((max(count, 5), 5))
    rows[0, 0] = 1
    rows[1, :2] = 1 / 2, 1 / 2
    rows[2, :3] = 3 / 2, 0, -1 / 2
    rows[3, :4] = 23 / 12, -16 / 12, 0, 5 / 12
    rows[4] = 55 / 24, -59 / 24, 37 / 24, 0, -9 / 24
    rows[5:, :4] = 55 / 24, -59 / 24, 37 / 24, -9 / 24
    return rows[:count]
