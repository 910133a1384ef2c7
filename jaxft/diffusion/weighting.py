"""Loss weights and timesteps as tables over the timesteps: what training attends to.

A weighting is stated for a network that predicts noise. Noise's squared error is x0's times the
signal-to-noise ratio, and v's is x0's times (snr + 1) (Salimans and Ho 2022, appendix D): so one
weighting is one table for each kind of prediction.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.diffusion.schedule import NoiseSchedule
from jaxft.errors import UserError

Table = Float[np.ndarray, " T"]

MOST_SNR = 1000.0
"""Above it debiased weights are as at it, as in kohya's trainer."""

PER_PREDICTION: dict[str, Callable[[Table], Table]] = {
    "epsilon": lambda snr: np.ones_like(snr),
    "v_prediction": lambda snr: snr / (snr + 1),
    "sample": lambda snr: snr,
}
"""Squared error of the noise / squared error of what is predicted."""


def snr(schedule: NoiseSchedule) -> Table:
    """Signal-to-noise ratio alpha² / sigma² of each timestep, float64."""
    alphas_cumprod = np.asarray(schedule.alphas_cumprod, np.float64)
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr(ratio: Table, gamma: float = 1.0) -> Table:
    """Hang et al. 2023, eq. 7 (https://arxiv.org/abs/2303.09556): min(snr, γ) on x0's error."""
    return np.minimum(ratio, gamma) / ratio


def soft_min_snr(ratio: Table, gamma: float = 1.0) -> Table:
    """HCP-Diffusion's `SoftMinSNRLoss`: γ³ / (snr² + γ³)."""
    return gamma**3 / (ratio**2 + gamma**3)


def kdiff_min_snr(ratio: Table, gamma: float = 1.0) -> Table:
    """HCP-Diffusion's `KDiffMinSNRLoss`: 4 (γ snr)² / (snr² + γ²)²."""
    return 4 * (gamma * ratio) ** 2 / (ratio**2 + gamma**2) ** 2


def edm(ratio: Table, gamma: float = 1.0) -> Table:
    """Karras et al. 2022, table 1 (https://arxiv.org/abs/2206.00364), as HCP-Diffusion's `EDMLoss`:
    (σ² + γ²) / (snr (σ γ)²), σ² = 1 / (snr + 1)."""
    variance = 1 / (ratio + 1)
    return (variance + gamma**2) / (ratio * variance * gamma**2)


def debiased(ratio: Table) -> Table:
    """Yu et al. 2023 (https://arxiv.org/abs/2310.08442): 1 / √snr."""
    return 1 / np.sqrt(np.minimum(ratio, MOST_SNR))


def debiased_v(ratio: Table) -> Table:
    """What kohya's trainer takes for v's error: 1 / (snr + 1), not the same weighting."""
    return 1 / (np.minimum(ratio, MOST_SNR) + 1)


def p2(ratio: Table, gamma: float = 1.0, k: float = 1.0) -> Table:
    """Choi et al. 2022, eq. 8 (https://arxiv.org/abs/2204.00227): 1 / (k + snr)^γ."""
    return (k + ratio) ** -gamma


def of_x0(ratio: Table, weight: Table) -> Table:
    """A weight of x0's squared error as one of the noise's, σ² = 1 / snr times as large."""
    return weight / ratio


def x0_min_snr(ratio: Table, gamma: float = 1.0) -> Table:
    """`MinSNRWeight` of HCP-Diffusion's branch edm: min(1 / (σ √(1 + σ²)), γ) on x0's error."""
    sigma = np.sqrt(1 / ratio)
    return of_x0(ratio, np.minimum(1 / (sigma * np.sqrt(1 + sigma**2)), gamma))


def x0_soft_min_snr(ratio: Table, gamma: float = 1.0) -> Table:
    """`SoftMinSNRWeight` there: γ² / (σ² + γ²) on x0's error."""
    return of_x0(ratio, gamma**2 / (1 / ratio + gamma**2))


def x0_kdiff(ratio: Table, gamma: float = 1.0) -> Table:
    """`KDiffMinSNRWeight` there: (γ σ)² / (σ² + γ²)² on x0's error."""
    return of_x0(ratio, gamma**2 / ratio / (1 / ratio + gamma**2) ** 2)


def x0_edm(ratio: Table, gamma: float = 1.0) -> Table:
    """`EDMWeight` there: (σ² + γ²) / (σ γ)² on x0's error."""
    return of_x0(ratio, (1 / ratio + gamma**2) / (gamma**2 / ratio))


WEIGHTINGS: dict[str, Callable[..., Table]] = {
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "kdiff_min_snr": kdiff_min_snr,
    "edm": edm,
    "debiased": debiased,
    "p2": p2,
    "x0_min_snr": x0_min_snr,
    "x0_soft_min_snr": x0_soft_min_snr,
    "x0_kdiff": x0_kdiff,
    "x0_edm": x0_edm,
}
"""Name -> weights of the noise's squared error, from snr and options."""


def weights(
    schedule: NoiseSchedule, name: str, *, target: str | None = None, **options: Any
) -> Table:
    """Weight of each timestep on the squared error of `target`, float32; of what the network
    predicts, where there is none.

    Raises:
        UserError: the target is x0 itself.
    """
    target = target or schedule.prediction_type
    if target == "sample":
        raise UserError(
            f"{name} has no meaning for a model that predicts samples, or where they are "
            "train.loss.target: leave it out"
        )
    ratio = _known(snr(schedule))
    if name == "debiased" and target == "v_prediction":
        return debiased_v(ratio).astype(np.float32)
    return (WEIGHTINGS[name](ratio, **options) * PER_PREDICTION[target](ratio)).astype(np.float32)


def _known(ratio: Table) -> Table:
    """At snr 0 noise's error says nothing: the limit of the product is what counts."""
    known = ratio > 0
    return np.where(known, ratio, np.min(ratio[known]) * 1e-6)


def units(schedule: NoiseSchedule, target: str) -> Table | None:
    """Difference of what the network predicts / difference of `target`; None: they are the same.

    Prediction and truth are of one noisy latent, so that their differences are multiples of each
    other: no conversion is needed.
    """
    if target == schedule.prediction_type:
        return None
    ratio = _known(snr(schedule))
    predicted, wanted = (PER_PREDICTION[name](ratio) for name in (schedule.prediction_type, target))
    return np.sqrt(wanted / predicted).astype(np.float32)


WIDTHS: dict[str, Callable[[NoiseSchedule, float], Table]] = {
    "exponential": lambda schedule, least: (
        least ** (np.arange(len(schedule.alphas_cumprod)) / len(schedule.alphas_cumprod))
    ),
    "snr": lambda schedule, least: (1 - least) / (1 + snr(schedule) ** -0.5) ** 2 + least,
}
"""Width of an error at each timestep, from 1 to `least`, as in kohya's trainer; Khrapov et al. 2024
(https://arxiv.org/abs/2403.16728)."""


# -------------------------------------------------------------------------------------- timesteps


def uniform(num_timesteps: int, first: int = 0, last: int | None = None) -> Table:
    """Chances of timesteps, all those from `first` to `last` alike; float64."""
    end = num_timesteps - 1 if last is None else last
    if not 0 <= first <= end < num_timesteps:
        raise UserError(f"first {first} and last {end} are no range of 0 to {num_timesteps - 1}")
    chances = np.zeros(num_timesteps)
    chances[first : end + 1] = 1
    return chances / chances.sum()


def logit_normal(num_timesteps: int, mean: float = 0.0, std: float = 1.0) -> Table:
    """Chances of timesteps whose share of all is the sigmoid of a normal number.

    Esser et al. 2024, eq. 19 (https://arxiv.org/abs/2403.03206).
    """
    share = (np.arange(num_timesteps) + 0.5) / num_timesteps
    logit = np.log(share) - np.log1p(-share)
    chances = np.exp(-0.5 * ((logit - mean) / std) ** 2) / (share * (1 - share))
    return chances / chances.sum()


def cosine_map(num_timesteps: int) -> Table:
    """Chances of timesteps mapped by a cosine: 2 / (π (1 - 2t + 2t²)).

    Esser et al. 2024, eq. 21 (https://arxiv.org/abs/2403.03206).
    """
    share = (np.arange(num_timesteps) + 0.5) / num_timesteps
    chances = 1 / (1 - 2 * share + 2 * share**2)
    return chances / chances.sum()


TIMESTEPS: dict[str, Callable[..., Table]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "cosine_map": cosine_map,
}
"""Name -> chances of the timesteps, from their number and options."""


def draw(
    key: Array, count: int, chances: Table | Array, *, low_discrepancy: bool = False
) -> Int[Array, " b"]:
    """Timesteps with these chances.

    Args:
        key: of the draw.
        count: b.
        chances: of each timestep, adding up to 1.
        low_discrepancy: whether a batch is spread evenly over the chances, in random order;
            Kingma et al. 2021, appendix I.1 (https://arxiv.org/abs/2107.00630).
    """
    is_known = isinstance(chances, np.ndarray)  # before the program is compiled
    ends = jnp.asarray(np.cumsum(chances) if is_known else jnp.cumsum(chances), jnp.float32)
    shift_key, order_key = jax.random.split(key)
    if low_discrepancy:
        places = (jnp.arange(count) + jax.random.uniform(shift_key)) / count
        places = jax.random.permutation(order_key, places)
    else:
        places = jax.random.uniform(shift_key, (count,))
    drawn = jnp.searchsorted(ends, places, side="right")
    last = jnp.max(jnp.where(chances > 0, jnp.arange(len(chances)), 0))  # ends may lie below 1
    return jnp.minimum(drawn, last).astype(jnp.int32)
