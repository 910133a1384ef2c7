"""Moving averages: the formula of HCP-Diffusion, at every update or at every k-th."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft import compat, config
from jaxft.errors import UserError
from jaxft.tuning import ema


def hcps(update: int, decay_max: float, inv_gamma: float, power: float, start: int) -> float:
    """The decay at an update, counted from 1, as HCP-Diffusion's source states it."""
    return np.clip(1 - (1 + (start + update) / inv_gamma) ** -power, 0.0, decay_max)


RULES = st.tuples(
    st.floats(0.1, 0.9999), st.floats(0.1, 100), st.floats(0.1, 2), st.integers(0, 1000)
)


@given(rule=RULES, updates=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_every_update_is_hcps_average(rule, updates, seed):
    made, rng = ema.average(*rule), np.random.default_rng(seed)
    ours = theirs = rng.standard_normal(3)
    for n in range(1, updates + 1):
        weights, decay = rng.standard_normal(3), hcps(n, *rule)
        theirs = decay * theirs + (1 - decay) * weights
        ours = ours + made.share(n) * (weights - ours)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@given(rule=RULES, every=st.integers(1, 10), times=st.integers(1, 5))
def test_what_was_there_fades_alike_however_rarely_the_average_moves(rule, every, times):
    often, rarely = ema.average(*rule), ema.average(*rule, every=every)
    left = np.prod([1 - rarely.share(every * n) for n in range(1, times + 1)])
    wanted = np.prod([1 - often.share(n) for n in range(1, every * times + 1)])
    assert left == pytest.approx(wanted, rel=1e-9, abs=1e-12)  # 1 - (1 - tiny)


def test_a_fixed_decay_needs_no_power():
    made = ema.average(0.9, power=None, every=2)
    assert [made.share(n) for n in (2, 4, 1000)] == pytest.approx([1 - 0.9**2] * 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("decay_max: 1.5", "model.ema: decay_max: 1.5 must be between 0 and 1"),
        ("power: 0", "model.ema: power: 0 must be more than 0, or null"),
        ("every: 0", "model.ema: every: 0 must be at least 1"),
        ("decay: 0.9", "model.ema.decay: unknown option; did you mean decay_max?"),
    ],
)
def test_options_without_meaning(write, options, says):
    path = write(
        "own.yaml",
        f"model: {{pretrained_model_name_or_path: m, ema: {{_target_: ModelEMA, {options}}}}}",
    )
    loaded, _ = config.load(path)
    with pytest.raises(UserError) as error:
        compat.build(loaded.model.ema, "average", "model.ema")
    assert says in str(error.value)


def test_older_spellings_are_one_average(write):
    model = "{pretrained_model_name_or_path: m, ema_unet: 0.9995, ema_text_encoder: 0}"
    loaded, notices = config.load(write("own.yaml", f"model: {model}"))
    made = compat.build(loaded.model.ema, "average", "model.ema")
    assert made == ema.average(0.9995, power=0.85)
    assert any("model.ema_unet: taken as model.ema" in notice for notice in notices)
    assert "ema_unet" not in loaded.model
