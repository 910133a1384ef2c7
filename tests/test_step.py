"""A training run equals a plain PyTorch loop; layouts, accumulation and data sets add up."""

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
        labels = {part: dict.fromkeys(own, "all") for part, own in self.trainable.items()}
        optimizer = optimizer or optimizers.grouped(
            labels, {"all": optimizers.adamw(RATE, weight_decay=1e-2)}, 1.0
        )
        programs = Programs(
            self.objective, optimizer, mesh, loss_weights=loss_weights, accumulation=accumulation
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
        noisy = self.noising.add_noise(latents, tensor(draws.added_noise), times)
        return latents, tensor(draws.noise), times, noisy


def one_device():
    return meshes.make(devices=jax.devices()[:1])


def torch_step(setup: Setup, optimizer, batch, draws) -> float:
    """diffusers' training loop, one step, fed the same draws."""

    latents, noise, times, noisy = setup.noised(batch, draws)
    states = setup.text(torch.tensor(batch["input_ids"][:, 0]).long()).last_hidden_state
    predicted = setup.unet(noisy, times, states).sample
    is_v = setup.noising.config.prediction_type == "v_prediction"
    wanted = setup.noising.get_velocity(latents, noise, times) if is_v else noise
    loss = torch.nn.functional.mse_loss(predicted, wanted)
    optimizer.zero_grad()
    loss.backward()
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return loss.item()


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
        np.testing.assert_allclose(metrics.losses[0][0], theirs, rtol=1e-4)
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
    """Losses and the final state after one step for each entry of `batches`."""
    first = [list(parts[:1]) for parts in batches[0]]
    programs, state, frozen, key = setup.programs(mesh, first, **options)
    losses = []
    for parts in batches:
        placed = jax.tree.map(lambda leaf: setup.put(mesh, leaf), parts)
        state, metrics = programs.step(state, frozen, key, placed)
        losses.append(np.asarray(metrics.losses).mean(axis=1))
    return np.array(losses), state


@pytest.mark.parametrize(("data", "fsdp"), [(4, 1), (2, 2)])
def test_layouts_of_devices_give_the_same_losses(data, fsdp):
    setup = Setup()
    batches = [[[setup.batch(n)]] for n in range(5)]
    alone, _ = run(setup, one_device(), batches)
    mesh = meshes.make(data, fsdp, jax.devices()[:4])
    together, state = run(setup, mesh, batches)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
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
    _, state = run(
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
    recipe = Recipe(offset=0.1, pyramid={"level": 3}, perturbation=0.1)
    how = losses.Loss(
        losses.huber(0.5).error,
        weights,
        chances=weighting.logit_normal(1000),
        low_discrepancy=True,
        noise=recipe,
    )
    objective, batch = setup.objective._replace(loss=how), setup.batch(0)
    batch["weight"][-1] = 0
    run = jax.jit(lambda *args: step.loss(objective, *args))
    ours = run(setup.trainable, setup.frozen, batch, setup.key)

    draws = step.draw(setup.key, (4, 4, 6, 4), 1000, how)
    latents, noise, times, noisy = setup.noised(batch, draws)
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
