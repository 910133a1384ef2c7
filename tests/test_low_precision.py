"""Moments of a byte, moments and weights in bfloat16: their arithmetic, their size, their price."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import params, step
from jaxft.errors import UserError
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import eight_bit, optimizers, rounding
from jaxft.tuning.eight_bit import BLOCK
from tests.test_step import Setup

# ------------------------------------------------------------------------------------- eight bits


def dynamic_map(signed: bool) -> np.ndarray:
    """The paper's data type read bit by bit: a sign, zeros up to an indicator bit, which are the
    decade, and a linear fraction; the middles of its steps, with 0 and 1."""
    found = {0.0, 1.0}
    bits = 7 if signed else 8
    for number in range(2 if not signed else 1, 2**bits):
        indicator = number.bit_length() - 1
        fraction = number - 2**indicator
        size = 0.1 + 0.9 * (fraction + 0.5) / 2**indicator
        decade = bits - 1 - indicator
        found |= {size * 0.1**decade} | ({-size * 0.1**decade} if signed else set())
    return np.sort(np.array([*found], np.float32))


@pytest.mark.parametrize("signed", [True, False])
def test_the_values_are_the_papers(signed):
    ours = eight_bit.values(signed)
    assert len(ours) == 256
    np.testing.assert_allclose(ours, dynamic_map(signed), rtol=1e-6)


def test_a_scalar_becomes_the_nearest_value(rng):
    tensor = rng.standard_normal((5, BLOCK)).astype(np.float32) ** 5
    tensor[3] = 0
    for signed in (True, False):
        sized = tensor if signed else np.abs(tensor)
        blocks = eight_bit.quantise(jnp.asarray(sized), signed=signed)
        assert blocks.codes.dtype == jnp.uint8
        most = np.abs(sized).max(axis=1, keepdims=True)
        every = eight_bit.values(signed) * most[..., None]
        if not signed:  # what is not 0 stays so
            every = np.where((every == 0) & (sized[..., None] > 0), np.inf, every)
        least = np.abs(every - sized[..., None]).min(axis=-1)
        found = np.abs(np.asarray(eight_bit.dequantise(blocks, signed=signed)) - sized)
        np.testing.assert_allclose(found, least, atol=1e-6 * np.max(most))


def test_fifty_updates_are_the_papers(rng):
    """Each from the moments that the last one left: they are those of AdamW on what is kept."""
    shapes = {"large.weight": (96, 96), "small.weight": (10, 30), "kernel.weight": (4, 3, 3, 3)}
    weights: Any = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    options: Any = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = eight_bit.adamw_8bit(0.1, **options)
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    moments = {n: [np.zeros(s), np.zeros(s)] for n, s in shapes.items()}
    for number in range(1, 51):
        grads: Any = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
        updates: Any
        updates, state = update(grads, state, weights)
        for name, grad in grads.items():
            m, v = moments[name]
            m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad**2
            root = np.sqrt(v / (1 - 0.95**number)) + 1e-6
            wanted = -0.1 * (m / (1 - 0.8**number) / root + 0.1 * weights[name])
            np.testing.assert_allclose(updates[name], wanted, atol=1e-5)
        moments = kept(state, shapes)
        weights = {n: weights[n] + np.asarray(updates[n]) for n in shapes}


def kept(state: Any, shapes: Any) -> dict[str, list[np.ndarray]]:
    """What the numbers in a state stand for."""
    (own,) = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, eight_bit.EightBitState))[
        :1
    ]
    found: dict[str, list[np.ndarray]] = {name: [] for name in shapes}
    for moments, signed in ((own.first, True), (own.second, False)):
        table, rows = eight_bit.values(signed), {}
        for name, blocks in moments.items():
            rows[name] = table[np.asarray(blocks.codes)] * np.asarray(blocks.size)[:, None]
        start = 0
        for name in sorted(shapes):
            size = int(np.prod(shapes[name]))
            if size > optimizers.SMALL:
                whole = rows[f"['{name}']"]
            else:
                whole = rows[optimizers.PACKED][start : start + -(-size // BLOCK)]
                start += -(-size // BLOCK)
            found[name].append(whole.ravel()[:size].reshape(shapes[name]))
    return found


def state_bytes(optimizer: Any, weights: Any) -> int:
    state = jax.eval_shape(optimizer.init, weights)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def test_moments_of_stable_diffusion_take_so_many_bytes():
    shapes = params.abstract(lambda: UNet2DConditionModel({"cross_attention_dim": 768}))[1]
    scalars = params.count(shapes)
    assert scalars == 859_520_964
    assert state_bytes(optimizers.adamw(1e-3), shapes) / scalars == pytest.approx(8, abs=0.01)
    assert state_bytes(eight_bit.adamw_8bit(1e-3), shapes) / scalars < 2.2
    halved = state_bytes(optimizers.adamw(1e-3, moments="bf16"), shapes)
    assert halved / scalars == pytest.approx(4, abs=0.01)
    factors = {str(n): jax.ShapeDtypeStruct((8, 320), jnp.float32) for n in range(9)}
    assert state_bytes(eight_bit.adamw_8bit(1e-3), factors) / params.count(factors) < 2.2


# ------------------------------------------------------------------------------------- bfloat16


def test_rounding_is_to_a_neighbour_and_right_in_the_mean(rng):
    sizes = 10.0 ** rng.integers(-30, 30, 64)
    values = (rng.standard_normal(64) * sizes).astype(np.float32)
    seeds = jax.random.bits(jax.random.key(0), (4096,), jnp.uint32)
    found = np.asarray(jax.vmap(lambda seed: rounding.stochastic(jnp.asarray(values), seed))(seeds))
    found = found.astype(np.float64)
    low, high = found.min(axis=0), found.max(axis=0)
    bits = values.view(np.uint32) >> 16 << 16
    ends = np.sort([bits.view(np.float32), (bits + 2**16).view(np.float32)], axis=0)
    assert (np.isin(found, ends)).all()
    np.testing.assert_array_equal([low, high], ends)
    # Five standard deviations of a mean of 4096 that is one of two ends.
    off = np.abs(found.mean(axis=0) - values) / (high - low)
    assert off.max() < 5 * 0.5 / 64


def test_what_is_exact_stays_and_what_is_no_number_too():
    exact = jnp.asarray([0.0, -0.0, 1.0, -1.5, 2.0**100, jnp.inf, -jnp.inf, jnp.nan])
    found = rounding.stochastic(exact, jnp.uint32(3))
    np.testing.assert_array_equal(found.astype(np.float32), exact)


def test_halved_moments_follow_what_they_would_forget():
    """The second moment of a gradient of 1 rises to 1 by steps of 0.1 % at most, which rounding to
    the nearest would lose at a quarter of it."""
    gradients: Any = {"a": jnp.ones((32, 32))}
    optimizer = optimizers.adamw(1e-3, moments="bf16")
    state, update = optimizer.init(gradients), jax.jit(optimizer.update)
    for _ in range(1000):
        _, state = update(gradients, state, gradients)
    second = max(jax.tree.leaves(state), key=lambda leaf: leaf.size * (leaf.ndim > 0))
    wanted = 1 - 0.999**1000
    found = [np.mean(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert second.dtype == jnp.bfloat16
    assert min(found) == pytest.approx(wanted, rel=0.02)


def test_options_without_meaning_are_refused():
    with pytest.raises(UserError, match="moments: 'int8' is neither fp32 nor bf16"):
        optimizers.adamw(1e-3, moments="int8")
    with pytest.raises(UserError, match="moments: without momentum nothing is remembered"):
        optimizers.sgd(1e-3, moments="bf16")


# ------------------------------------------------------------------------------- a fine-tuning

STEPS = 24
RATE = 3e-3
LAYERS = ("conv_in.", "conv_out.", "mid_block.resnets.0.")


@pytest.fixture(scope="module")
def setup():
    return Setup()


@pytest.fixture(scope="module")
def losses(setup):
    """Final loss after a short training, by the precision of moments and weights."""
    weights = setup.trainable["unet"]
    chosen = {name: weights[name] for name in weights if name.startswith(LAYERS)}
    rest = {name: jnp.asarray(w) for name, w in weights.items() if name not in chosen}
    frozen = setup.frozen | {"unet": rest}
    gradients = jax.jit(
        lambda trained, batch, key: step.gradients(
            setup.objective, 1.0, trained, frozen, batch, key, None
        )
    )
    batches = [setup.batch(n, size=2, shape=(4, 4)) for n in range(2)]

    def train(optimizer: Any, dtype: Any) -> float:
        begun = {"unet": params.cast(chosen, dtype)}
        state = step.init(optimizer, jax.tree.map(jnp.asarray, begun))
        update = jax.jit(lambda state, grads: step.update(optimizer, state, grads)[0])
        found = []
        for number in range(STEPS):
            key = jax.random.fold_in(setup.key, number % len(batches))
            judged, grads = gradients(state.trainable, batches[number % len(batches)], key)
            state = update(state, grads)
            found.append(float(judged.loss))
        assert state.trainable["unet"]["conv_in.weight"].dtype == dtype
        assert np.mean(found[-2:]) < 0.9 * np.mean(found[:2])
        return float(np.mean(found[-2:]))

    return {
        "plain": train(optimizers.adamw(RATE), jnp.float32),
        "eight": train(eight_bit.adamw_8bit(RATE), jnp.float32),
        "halved": train(optimizers.adamw(RATE, moments="bf16"), jnp.float32),
        "weights": train(optimizers.adamw(RATE), jnp.bfloat16),
    }


def test_the_loss_of_a_short_fine_tuning_is_adamws(losses):
    plain = losses["plain"]
    assert losses["eight"] == pytest.approx(plain, rel=0.01), losses
    assert losses["halved"] == pytest.approx(plain, rel=0.01), losses
    # Weights a 256th apart wander by chance, for better or worse.
    assert losses["weights"] < 1.02 * plain, losses


def test_small_updates_of_bfloat16_weights_count(setup):
    """A thousandth of a step between two bfloat16 numbers, fifty times; the mean moves with it."""
    weights = {"unet": {"a": jnp.ones((64, 64), jnp.bfloat16)}}
    optimizer = optimizers.sgd(2.0**-18)
    state = step.init(optimizer, weights)
    update = jax.jit(lambda state, grads: step.update(optimizer, state, grads)[0])
    for _ in range(50):
        state = update(state, {"unet": {"a": -jnp.ones((64, 64))}})
    moved = np.mean(np.asarray(state.trainable["unet"]["a"], np.float64)) - 1
    # Of 4096 scalars each has gone up a step of 2^-7 with a chance of 50 in 2048: five deviations.
    assert moved == pytest.approx(50 * 2.0**-18, abs=5 * 2.0**-7 * np.sqrt(0.025 / 4096))
