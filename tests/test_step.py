"""A training run equals a plain PyTorch loop; layouts, accumulation and data sets add up."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers import UNet2DConditionModel as TorchUNet
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as TorchText

from jaxft import mesh as meshes
from jaxft import params, step
from jaxft.compiled import Programs
from jaxft.diffusion import losses, schedule, weighting
from jaxft.diffusion.noise import Recipe
from jaxft.models.clip import CLIPTextModel
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import optimizers
from tests.weights import randomise

UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "eos_token_id": 49,
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
SCALING = 0.18215
RATE = 2e-4  # Adam turns rounding noise in a zero gradient into a step of this size


GROUPS = ("attention", "rest")


def group_of(name: str) -> str:
    return GROUPS["attn" not in name]


def norms_of(weights: dict[str, Any]) -> dict[str, float]:
    """Of each group: the length of all its numbers as one vector."""
    return {
        group: float(
            np.linalg.norm(
                np.concatenate(
                    [np.ravel(w) for name, w in weights.items() if group_of(name) == group]
                )
            )
        )
        for group in GROUPS
    }


def by_range(errors: Any, times: Any) -> np.ndarray:
    """Of each quarter of the timesteps: sum of errors, number of images."""
    quarters = [(250 * n <= times) & (times < 250 * (n + 1)) for n in range(4)]
    return np.array([[errors[own].sum() for own in quarters], [own.sum() for own in quarters]])


class Setup:
    """Both systems with the same random weights, and batches for them."""

    def __init__(self, prediction_type: str = "epsilon", with_text: bool = False):
        self.unet: Any = randomise(TorchUNet(**UNET), 0)
        self.text: Any = randomise(TorchText(CLIPTextConfig(**TEXT, bos_token_id=0)), 1)
        self.noising: Any = DDPMScheduler.from_config(
            SCHEDULER | {"prediction_type": prediction_type}
        )
        unet_def, _ = params.abstract(lambda: UNet2DConditionModel(UNET))
        text_def, _ = params.abstract(lambda: CLIPTextModel(TEXT))
        self.objective = step.Objective(
            networks={"unet": unet_def, "text_encoder": text_def},
            schedule=schedule.from_config(SCHEDULER | {"prediction_type": prediction_type}),
            scaling_factor=SCALING,
            dtype=jnp.float32,
        )
        self.trainable = {"unet": {k: v.numpy().copy() for k, v in self.unet.state_dict().items()}}
        text = self.text.state_dict()
        encoder = {f"text_model.{k}": jnp.asarray(v.numpy().copy()) for k, v in text.items()}
        self.frozen = {"unet": {}, "text_encoder": {} if with_text else encoder}
        if with_text:
            self.trainable["text_encoder"] = {k: np.asarray(v) for k, v in encoder.items()}
        self.key = jax.random.key(7)
        self.compiled_gradient = jax.jit(
            lambda trainable, frozen, batch, key: jax.grad(
                lambda weights: step.loss(self.objective, weights, frozen, batch, key)
            )(trainable)
        )

    def batch(self, n: int, size: int = 4, shape=(4, 6)) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(n)
        ids = rng.integers(1, 48, (size, 1, 77)).astype(np.int32)
        ids[:, :, -1] = 49
        moments = rng.standard_normal((size, *shape, 8)).astype(np.float32)
        return {"input_ids": ids, "weight": np.ones(size, np.float32), "moments": moments}

    def programs(self, mesh, batches, optimizer=None, loss_weights=(1.0,), accumulation=1):
        labels = {
            part: {name: group_of(name) for name in own} for part, own in self.trainable.items()
        }
        adamw = optimizers.adamw(RATE, weight_decay=1e-2)
        optimizer = optimizer or optimizers.grouped(labels, dict.fromkeys(GROUPS, adamw), 1.0)
        programs = Programs(
            self.objective,
            optimizer,
            labels,
            mesh,
            loss_weights=loss_weights,
            accumulation=accumulation,
        )
        frozen = jax.device_put(self.frozen, meshes.shardings(mesh, self.frozen))
        key = jax.device_put(self.key, meshes.replicated(mesh))
        state = programs.init(jax.tree.map(jnp.array, self.trainable))
        programs.compile(programs.state(self.trainable), frozen, key, batches)
        return programs, state, frozen, key

    def put(self, mesh, batch):
        return jax.device_put(batch, meshes.batch_sharding(mesh))

    def noised(self, batch, draws) -> tuple[torch.Tensor, ...]:
        """In PyTorch, by diffusers' scheduler: latents, noise, timesteps, noisy latents."""

        def tensor(x):
            return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())

        mean, log_variance = tensor(batch["moments"]).chunk(2, dim=1)
        latents = (mean + torch.exp(0.5 * log_variance) * tensor(draws.latent_noise)) * SCALING
        times = torch.tensor(np.asarray(draws.timesteps)).long()
        asked, added = tensor(draws.noise.asked), tensor(draws.noise.added)
        if draws.noise.channels is not None:
            offset = noise_offset(self.objective.loss.noise, latents) * tensor(draws.noise.channels)
            asked, added = asked + offset, added + offset
        return latents, asked, times, self.noising.add_noise(latents, added, times)


def noise_offset(recipe: Recipe, latents: torch.Tensor) -> torch.Tensor:
    """Of kohya's `apply_noise_offset`, by which its channels' random numbers are multiplied."""
    latent_mean = torch.abs(latents.mean(dim=(2, 3), keepdim=True))
    strength = recipe.offset + recipe.adaptive_noise_scale * latent_mean
    return torch.clamp(strength, 0.0, None)


def one_device():
    return meshes.make(devices=jax.devices()[:1])


def torch_step(setup: Setup, optimizer, batch, draws) -> dict[str, Any]:
    """diffusers' training loop, one step, fed the same draws; the numbers of the step."""

    latents, noise, times, noisy = setup.noised(batch, draws)
    states = setup.text(torch.tensor(batch["input_ids"][:, 0]).long()).last_hidden_state
    predicted = setup.unet(noisy, times, states).sample
    is_v = setup.noising.config.prediction_type == "v_prediction"
    wanted = setup.noising.get_velocity(latents, noise, times) if is_v else noise
    loss = torch.nn.functional.mse_loss(predicted, wanted)
    optimizer.zero_grad()
    loss.backward()
    trained = {
        f"{part}.{name}": weight
        for part, network in (("unet", setup.unet), ("text", setup.text))
        for name, weight in network.named_parameters()
        if any(weight is own for own in optimizer.param_groups[0]["params"])
    }
    before = {name: weight.detach().numpy().copy() for name, weight in trained.items()}
    gradients = norms_of({name: weight.grad.numpy() for name, weight in trained.items()})
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.step()
    moved = norms_of({name: w.detach().numpy() - before[name] for name, w in trained.items()})
    return {
        "losses": np.array([[loss.item()]]),
        "by_range": [
            by_range((predicted - wanted).detach().square().mean((1, 2, 3)).numpy(), times.numpy())
        ],
        "grad_norm": norm,
        "grad_norms": gradients,
        "update_ratios": {g: moved[g] / length for g, length in norms_of(before).items()},
    }


@pytest.mark.parametrize(
    ("prediction_type", "with_text"), [("epsilon", False), ("v_prediction", True)]
)
def test_twenty_steps_equal_a_pytorch_loop(prediction_type, with_text):
    """Of the UNet alone, and of the UNet and the text encoder."""
    setup = Setup(prediction_type, with_text)
    mesh = one_device()
    programs, state, frozen, key = setup.programs(mesh, [[setup.batch(0)]])
    networks = {"unet": setup.unet} | ({"text_encoder": setup.text} if with_text else {})
    setup.unet.train()
    weights = [weight for network in networks.values() for weight in network.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=1e-2)
    for n in range(20):
        batch = setup.batch(n)
        draws = step.draw(step.batch_key(key, n, 0, 0), (4, 4, 6, 4), 1000)
        state, metrics = programs.step(state, frozen, key, [[setup.put(mesh, batch)]])
        theirs = torch_step(setup, optimizer, batch, draws)
        assert theirs.keys() == metrics._asdict().keys()
        for name, ours in metrics._asdict().items():
            # A ratio has in it what Adam makes of rounding noise in gradients that are zero.
            exact = 1e-2 if name == "update_ratios" else 1e-4
            close = functools.partial(np.testing.assert_allclose, rtol=exact)
            jax.tree.map(close, ours, theirs[name])
    assert int(state.step) == 20
    for part, network in networks.items():
        moved = 0.0
        prefix = "" if part == "unet" else "text_model."
        for name, theirs in network.state_dict().items():
            ours = np.asarray(state.trainable[part][f"{prefix}{name}"])
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, err_msg=name)
            before = setup.trainable[part][f"{prefix}{name}"]
            moved = max(moved, np.abs(ours - before).max())
        assert moved > 1e-3  # ten times the tolerance


def run(setup, mesh, batches, **options):
    """The numbers of each step, one for each entry of `batches`, and the state after the last."""
    first = [list(parts[:1]) for parts in batches[0]]
    programs, state, frozen, key = setup.programs(mesh, first, **options)
    numbers = []
    for parts in batches:
        placed = jax.tree.map(lambda leaf: setup.put(mesh, leaf), parts)
        state, metrics = programs.step(state, frozen, key, placed)
        numbers.append(jax.device_get(metrics))
    return numbers, state


@pytest.mark.parametrize(("data", "fsdp"), [(4, 1), (2, 2)])
def test_layouts_of_devices_give_the_same_numbers(data, fsdp):
    setup = Setup()
    batches = [[[setup.batch(n)]] for n in range(5)]
    alone, _ = run(setup, one_device(), batches)
    mesh = meshes.make(data, fsdp, jax.devices()[:4])
    together, state = run(setup, mesh, batches)
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
        np.testing.assert_allclose(ours.by_range, theirs.by_range, rtol=1e-5)
        norms = [(m.grad_norm, m.grad_norms, m.update_ratios) for m in (ours, theirs)]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), *norms)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (fsdp > 1)  # weights and both moments
    assert all(leaf.addressable_shards[0].data.size == leaf.size // fsdp for leaf in split)


def gradient_of(setup, batch, key):
    """The gradient that JAX gives for one batch, without any of the trainer's machinery."""
    gradient = setup.compiled_gradient
    return gradient(setup.trainable, setup.frozen, batch, key)["unet"]


def test_accumulated_data_sets_sum_their_weighted_gradients():
    """SGD shows the gradient: Σ over data sets of loss_weight · mean over parts."""
    setup = Setup()
    mesh = one_device()
    optimizer = optax.sgd(1.0)
    batches = [[setup.batch(0), setup.batch(1)], [setup.batch(2), setup.batch(3)]]
    (numbers,), state = run(
        setup, mesh, [batches], optimizer=optimizer, loss_weights=(1.0, 0.5), accumulation=2
    )
    after = state.trainable["unet"]
    wanted = {name: np.zeros(value.shape) for name, value in setup.trainable["unet"].items()}
    for dataset, (weight, parts) in enumerate(zip((1.0, 0.5), batches, strict=True)):
        for part, batch in enumerate(parts):
            grads = gradient_of(setup, batch, step.batch_key(setup.key, 0, dataset, part))
            wanted = {name: wanted[name] + weight / 2 * np.asarray(grads[name]) for name in wanted}
    for name, before in setup.trainable["unet"].items():
        np.testing.assert_allclose(
            before - np.asarray(after[name]), wanted[name], atol=1e-6, err_msg=name
        )
    assert numbers.grad_norms == pytest.approx(norms_of(wanted), rel=1e-4)
    whole = norms_of(setup.trainable["unet"])
    ratios = {group: norm / whole[group] for group, norm in norms_of(wanted).items()}
    assert numbers.update_ratios == pytest.approx(ratios, rel=1e-4)
    for parts, (errors, images) in zip(numbers.losses, numbers.by_range, strict=True):
        assert (images.sum(), errors.sum() / 8) == pytest.approx((8, parts.mean()), rel=1e-5)


def test_images_of_weight_zero_change_nothing():
    setup = Setup()
    batch = setup.batch(0)
    padded = {name: value.copy() for name, value in batch.items()}
    batch["weight"][2:] = padded["weight"][2:] = 0
    padded["moments"][2:] = 9
    key = step.batch_key(setup.key, 0, 0, 0)
    one, other = gradient_of(setup, batch, key), gradient_of(setup, padded, key)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-7, err_msg=name)
    assert max(np.abs(value).max() for value in one.values()) > 1e-3


def test_a_gradient_that_is_not_finite_changes_no_bit():
    setup = Setup()
    mesh = one_device()
    programs, state, frozen, key = setup.programs(mesh, [[setup.batch(0)]])
    state, _ = programs.step(state, frozen, key, [[setup.put(mesh, setup.batch(0))]])
    before = jax.device_get(state)
    poisoned = setup.batch(1)
    poisoned["moments"][0, 0, 0, 0] = np.nan
    state, metrics = programs.step(state, frozen, key, [[setup.put(mesh, poisoned)]])
    after = jax.device_get(state)
    assert not np.isfinite(metrics.grad_norm)
    jax.tree.map(np.testing.assert_array_equal, before.trainable, after.trainable)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
    assert int(after.step) == 2
    state, metrics = programs.step(state, frozen, key, [[setup.put(mesh, setup.batch(2))]])
    assert np.isfinite(metrics.grad_norm)


def test_a_weighted_error_at_drawn_timesteps_and_noise_is_pytorchs():
    """All options of the loss at once, stated in PyTorch with diffusers' scheduler."""
    setup = Setup("v_prediction")
    weights = weighting.weights(setup.objective.schedule, "min_snr", gamma=5.0)
    recipe = Recipe(0.1, 0.5, -2.5, pyramid={"level": 3}, perturbation=0.1)
    how = losses.Loss(
        losses.huber(0.5).error,
        weights,
        chances=weighting.logit_normal(1000),
        low_discrepancy=True,
        noise=recipe,
    )
    setup.objective = objective = setup.objective._replace(loss=how)
    batch = setup.batch(0)
    batch["weight"][-1] = 0
    run = jax.jit(lambda *args: step.loss(objective, *args))
    ours = run(setup.trainable, setup.frozen, batch, setup.key)

    draws = step.draw(setup.key, (4, 4, 6, 4), 1000, how)
    latents, noise, times, noisy = setup.noised(batch, draws)
    channels: Any = draws.noise.channels
    has, strength = channels[:, 0, 0, 0] != 0, noise_offset(recipe, latents)
    assert 0 < has.sum() < 4  # images with and without an offset
    assert (strength == 0).any()  # and channels for which it is none
    assert (strength > 0).any()
    states = setup.text(torch.tensor(batch["input_ids"][:, 0]).long()).last_hidden_state
    with torch.no_grad():
        predicted = setup.unet(noisy, times, states).sample
    wanted = setup.noising.get_velocity(latents, noise, times)
    errors = torch.nn.functional.huber_loss(predicted, wanted, reduction="none", delta=0.5)
    snr = setup.noising.alphas_cumprod[times] / (1 - setup.noising.alphas_cumprod[times])
    each = errors.mean((1, 2, 3)) * torch.clamp(snr, max=5.0) / (snr + 1)
    assert ours == pytest.approx(float(each[:3].mean()), rel=1e-4)


def test_a_teacher_is_the_model_as_it_began():
    """The target is PyTorch's prediction with the old weights and the old text encoder."""
    setup = Setup("v_prediction", with_text=True)
    batch = setup.batch(0) | {"teacher": np.ones(4, np.float32)}
    batch["weight"][-1] = 0
    frozen = setup.frozen | {f"teacher_{name}": own for name, own in setup.trainable.items()}
    compiled = jax.jit(lambda *args: step.loss(setup.objective, *args))

    def run(trainable):
        return compiled(trainable, frozen, batch, setup.key)

    assert run(setup.trainable) < 1e-10  # nothing to learn yet

    _, _, times, noisy = setup.noised(batch, step.draw(setup.key, (4, 4, 6, 4), 1000))
    ids = torch.tensor(batch["input_ids"][:, 0]).long()

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return setup.unet(noisy, times, setup.text(ids).last_hidden_state).sample

    before = predict()
    randomise(setup.unet, 5)
    randomise(setup.text, 6)
    trained = {
        "unet": {k: v.numpy() for k, v in setup.unet.state_dict().items()},
        "text_encoder": {f"text_model.{k}": v.numpy() for k, v in setup.text.state_dict().items()},
    }
    errors = ((predict() - before) ** 2).mean((1, 2, 3))
    assert run(trained) == pytest.approx(float(errors[:3].mean()), rel=1e-4)
