"""The stages that train the demo's base model: stopping, rate, tokenizer."""

import demo_world as world
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demo_base import fit as fitting
from demo_base import unet, vae
from demo_base.fit import Recipe, fit

RECIPE = Recipe(steps=6, batch=3, lr=0.1, warmup=2)


def batch(number):
    return np.random.default_rng(number).normal(size=(3, 4)).astype(np.float32)


def loss(weights, batch, key):
    noise = jax.random.normal(key, batch.shape)
    return jnp.mean((batch @ weights["net"]["w"] - noise[:, :1]) ** 2)


@pytest.fixture
def weights():
    return {"net": {"w": np.ones((4, 1), np.float32)}}


def test_a_stopped_stage_ends_like_one_that_was_not_bit_for_bit(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(fitting, "SAVE_EVERY", 2)
    whole = fit(tmp_path / "whole", RECIPE, weights, loss, batch, seed=0)

    def breaks(number):
        if number == 3:
            raise KeyboardInterrupt
        return batch(number)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", RECIPE, weights, loss, breaks, seed=0)
    resumed_at = []

    def counted(number):
        resumed_at.append(number)
        return batch(number)

    parts = fit(tmp_path / "parts", RECIPE, weights, loss, counted, seed=0)
    assert resumed_at[0] == 2
    np.testing.assert_array_equal(parts["net"]["w"], whole["net"]["w"])
    assert not np.array_equal(whole["net"]["w"], weights["net"]["w"])


def test_a_batch_in_parts_teaches_what_the_whole_one_does(tmp_path, weights):
    def noiseless(weights, batch, key):
        return jnp.mean((batch @ weights["net"]["w"] - batch[:, 2:3]) ** 2)

    whole, parts = (
        fit(tmp_path / str(n), RECIPE._replace(parts=n), weights, noiseless, batch, seed=0)
        for n in (1, 3)
    )
    # Sums in another order: a few units in the last place of each step.
    np.testing.assert_allclose(parts["net"]["w"], whole["net"]["w"], rtol=1e-4)
    assert not np.allclose(whole["net"]["w"], weights["net"]["w"], rtol=1e-2)


def test_the_rate_rises_stays_and_falls_to_zero():
    rate = Recipe(steps=100, batch=1, lr=0.5, warmup=10, decay=0.2).rate()
    rates = [float(rate(step)) for step in range(101)]
    assert rates[0] == 0
    assert rates[10:81] == [0.5] * 71
    assert rates[90] == pytest.approx(0.25, abs=1e-6)  # half way down
    assert rates[100] == pytest.approx(0, abs=1e-6)
    assert all(np.diff(rates[80:]) <= 0)


def test_the_rate_rises_again_at_a_restart():
    before = Recipe(steps=100, batch=1, lr=0.5, warmup=10, decay=0.2)
    both = before._replace(steps=300, lr=0.3, before=before).rate()
    first, second = before.rate(), Recipe(200, 1, 0.3, warmup=10, decay=0.2).rate()
    wanted = [float(first(step)) for step in range(100)]
    wanted += [float(second(step)) for step in range(200)]
    assert [float(both(step)) for step in range(300)] == pytest.approx(wanted)


def test_a_longer_run_begins_like_a_shorter_one():
    short, long = (Recipe(steps, 1, 0.5, decay=0.2).rate() for steps in (1000, 5000))
    assert [float(short(s)) for s in range(801)] == [float(long(s)) for s in range(801)]


def test_every_word_of_the_captions_is_one_token(tmp_path):
    tokenizer = unet.write_tokenizer(tmp_path / "tokenizer")
    for word in world.words():
        start, *content = tokenizer.encode(word)[0].tolist()
        end = tokenizer.vocab_size - 1
        assert content[1:] == [end] * 75, word
        assert start == tokenizer.vocab_size - 2


def test_training_never_draws_what_is_held_out():
    for number in range(200):
        assert not world.held_out(unet.scene(0, (160, 96), number))
    assert all(len(pixels) == 16 for pixels, _ in zip(vae.held_out(0), range(2), strict=False))


def test_a_batch_of_the_vae_follows_from_its_number():
    recipe = Recipe(steps=60, batch=2, lr=1)
    assert vae.pictures(recipe, 0, 3).shape == (2, 128, 128, 3)
    np.testing.assert_array_equal(vae.pictures(recipe, 0, 3), vae.pictures(recipe, 0, 3))
    assert (vae.pictures(recipe, 0, 3) != vae.pictures(recipe, 0, 4)).any()
