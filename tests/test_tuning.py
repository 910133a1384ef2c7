"""Groups, schedules and optimizers are PyTorch's and diffusers'."""

import contextlib
from typing import Any

import came_pytorch
import dadaptation
import jax
import jax.numpy as jnp
import lion_pytorch
import numpy as np
import optax
import prodigyopt
import pytest
import schedulefree
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler
from transformers.optimization import Adafactor, get_wsd_schedule

from jaxft.errors import UserError
from jaxft.tuning import dadapt, factored, muon, optimizers, schedule_free, schedules
from jaxft.tuning.groups import Group, assign

NAMES = [
    "conv_in.weight",
    "down.0.attn.to_k.weight",
    "down.0.attn.to_q.weight",
    "down.0.resnets.0.conv1.weight",
    "up.0.attn.to_k.weight",
]

# ------------------------------------------------------------------------------------- schedules


def rates(schedule: Any, optimizer: torch.optim.Optimizer, total: int) -> list[float]:
    """PyTorch's rate at each of `total` updates."""
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (1, 7), (5, 7), (0, 100), (5, 100)])
@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "cosine", "linear"])
def test_schedules_are_diffusers(name, warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    theirs = rates(
        get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total),
        optimizer,
        total,
    )
    ours = schedules.schedule(name, 3e-4, warmup, total)
    # float32, and a cosine near its zero: 1e-6 of the peak.
    np.testing.assert_allclose([ours(n) for n in range(total)], theirs, rtol=1e-6, atol=3e-10)


def test_options_of_a_schedule_are_diffusers():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    wanted = get_cosine_schedule_with_warmup(optimizer, 5, 60, num_cycles=2.5)
    theirs = rates(wanted, optimizer, 60)
    ours = schedules.schedule("cosine", 1.0, 5, 60, num_cycles=2.5)
    np.testing.assert_allclose([ours(n) for n in range(60)], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("warmup", "total"), [(2, 5), (30, 100), (99, 100)])
@pytest.mark.parametrize("factors", [{}, {"div_factor": 10.0, "final_div_factor": 50.0}])
def test_one_cycle_is_pytorchs(warmup, total, factors):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = rates(
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=3e-4,
            total_steps=total,
            pct_start=warmup / total,
            cycle_momentum=False,
            **factors,
        ),
        optimizer,
        total,
    )
    ours = schedules.schedule("one_cycle", 3e-4, warmup, total, **factors)
    np.testing.assert_allclose([ours(n) for n in range(total)], theirs, rtol=1e-5, atol=3e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.0}),
        ("piecewise_constant", {"step_rules": "1:7,0.3:30,0.1"}),
    ],
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 40), (5, 57)])
def test_schedules_with_options_are_diffusers(name, options, warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    given = options | {"num_warmup_steps": warmup, "num_training_steps": total}
    theirs = rates(get_scheduler(name, optimizer, **given), optimizer, total)
    ours = schedules.schedule(name, 1.0, warmup, total, **options)
    # 2e-7: diffusers' polynomial ends at a rate of 1e-7.
    np.testing.assert_allclose([ours(n) for n in range(total)], theirs, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("decay", [None, 1, 12])
def test_warmup_stable_decay_is_transformers(decay):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    wanted = get_wsd_schedule(optimizer, 5, decay or 6, num_training_steps=60, decay_type="linear")
    options = {} if decay is None else {"num_decay_steps": decay}
    ours = schedules.schedule("warmup_stable_decay", 1.0, 5, 60, **options)
    theirs = rates(wanted, optimizer, 60)
    np.testing.assert_allclose([ours(n) for n in range(60)], theirs, rtol=1e-5, atol=1e-6)


def test_rex_is_its_papers():
    progress = np.arange(50) / 50
    wanted = (1 - progress) / (1 / 2 + 1 / 2 * (1 - progress))
    ours = schedules.schedule("rex", 1.0, 0, 50)
    np.testing.assert_allclose([ours(n) for n in range(50)], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", list(schedules.SCHEDULES))
def test_a_schedule_is_the_same_when_compiled(name):
    rate = schedules.schedule(name, 1e-3, 3, 20)
    compiled = jax.jit(rate)
    plain = [float(rate(jnp.asarray(n))) for n in range(20)]
    fused = [compiled(jnp.asarray(n)) for n in range(20)]
    np.testing.assert_allclose(fused, plain, rtol=1e-6, atol=1e-9)  # 1e-6 of the peak


def test_mistakes_in_schedules_are_named():
    with pytest.raises(UserError, match=r"train.scheduler.name: 'cosin'.* cosine"):
        schedules.schedule("cosin", 1e-3, 0, 10)
    with pytest.raises(UserError, match=r"num_warmup_steps: 10 updates.* 10 updates"):
        schedules.schedule("linear", 1e-3, 10, 10)
    with pytest.raises(UserError, match="scheduler_kwargs: linear does not take power"):
        schedules.schedule("linear", 1e-3, 0, 10, power=2)
    with pytest.raises(UserError, match="num_decay_steps: 8 updates of decay and 3 of warm-up"):
        schedules.schedule("warmup_stable_decay", 1e-3, 3, 10, num_decay_steps=8)
    for rules in ("1:x,2", "1:9,1:3,2", "a", "1:5"):
        with pytest.raises(UserError, match=r"step_rules: .* is not of the form"):
            schedules.schedule("piecewise_constant", 1e-3, 0, 10, step_rules=rules)


# ------------------------------------------------------------------------------------- optimizers

RATES = {"slow": 1e-3, "fast": 1e-2}
LABELS = {"unet": {"a": "slow", "b": "fast", "c": "fast", "large": "fast", "scalar": "slow"}}


def trainable(rng) -> dict[str, dict[str, np.ndarray]]:
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2, 2), "large": (2, optimizers.SMALL), "scalar": ()}
    return {"unet": {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()}}


@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_two_groups_of_adamw_are_pytorchs(rng, options, max_norm):
    ours: Any = trainable(rng)
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in ours["unet"].items()}
    names = {group: [k for k, g in LABELS["unet"].items() if g == group] for group in RATES}
    adamw = torch.optim.AdamW(
        [{"params": [theirs[k] for k in names[group]], "lr": RATES[group]} for group in RATES],
        **options,
    )
    transforms = {group: optimizers.adamw(lr, **options) for group, lr in RATES.items()}
    optimizer = optimizers.grouped(LABELS, transforms, max_norm)
    state = optimizer.init(ours)
    for _ in range(20):
        grads = trainable(rng)
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, weight in theirs.items():
            weight.grad = torch.tensor(grads["unet"][name])
        if max_norm:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_norm)
        adamw.step()
    for name, weight in theirs.items():
        np.testing.assert_allclose(
            np.asarray(ours["unet"][name]), weight.detach().numpy(), rtol=1e-5, atol=1e-6
        )


def quiet(function: Any, *args: Any, **options: Any) -> Any:
    """What it returns; a reference may print."""
    with contextlib.redirect_stdout(None):
        return function(*args, **options)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optimizers.sgd, torch.optim.SGD, {}),
        (optimizers.sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (optimizers.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (optimizers.lion, lion_pytorch.Lion, {"weight_decay": 0.1}),
        (optimizers.lion, lion_pytorch.Lion, {"betas": (0.95, 0.98)}),
        (factored.adafactor, Adafactor, {"relative_step": False}),
        (factored.adafactor, Adafactor, {"relative_step": False, "weight_decay": 0.1}),
        (
            factored.adafactor,
            Adafactor,
            {"relative_step": False, "scale_parameter": False, "beta1": 0.9, "clip_threshold": 0.5},
        ),
        (factored.came, came_pytorch.CAME, {}),
        (factored.came, came_pytorch.CAME, {"weight_decay": 0.1, "clip_threshold": 0.5}),
        (optimizers.prodigy, prodigyopt.Prodigy, {"use_bias_correction": True}),
        (
            optimizers.prodigy,
            prodigyopt.Prodigy,
            {
                "use_bias_correction": True,
                "safeguard_warmup": True,
                "weight_decay": 0.1,
                "d_coef": 2.0,
            },
        ),
        (dadapt.dadapt_adam, dadaptation.DAdaptAdam, {"weight_decay": 0.1}),
        (
            dadapt.dadapt_adam,
            dadaptation.DAdaptAdam,
            {"decouple": True, "weight_decay": 0.1, "use_bias_correction": True},
        ),
        (dadapt.dadapt_adam, dadaptation.DAdaptAdam, {"growth_rate": 1.02}),
        (optimizers.adamw, torch.optim.AdamW, {"weight_decay": 0.1}),
        (schedule_free.adamw_schedule_free, schedulefree.AdamWScheduleFree, {"weight_decay": 0.1}),
        (
            schedule_free.adamw_schedule_free,
            schedulefree.AdamWScheduleFree,
            {"betas": (0.95, 0.99), "r": 1.0, "weight_lr_power": 1.0},
        ),
    ],
)
def test_fifty_updates_are_the_references(rng, ours, theirs, options):
    weights: Any = trainable(rng)
    copies = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in weights["unet"].items()}
    reference = quiet(theirs, list(copies.values()), lr=1e-2, **options)
    if hasattr(reference, "train"):
        reference.train()
    optimizer = ours(1e-2, **options)
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    for _ in range(50):
        grads = trainable(rng)
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        for name, weight in copies.items():
            weight.grad = torch.tensor(grads["unet"][name])
        reference.step()

    def check(found: Any) -> None:
        for name, weight in copies.items():
            np.testing.assert_allclose(
                found["unet"][name], weight.detach().numpy(), rtol=1e-5, atol=1e-5
            )

    check(weights)
    if hasattr(reference, "eval"):  # the weights to keep are others than those in training
        reference.eval()
        check(schedule_free.result(state, weights))


def test_d_adaptation_finds_a_rate(rng):
    """From 1e-6 to one that minimises a quadratic function."""
    wanted = rng.standard_normal(8).astype(np.float32)
    weights: Any = np.zeros(8, np.float32)
    optimizer = dadapt.dadapt_adam(1.0)
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    for _ in range(300):
        updates, state = update(2 * (weights - wanted), state, weights)
        weights = weights + updates
    assert np.mean(np.square(weights - wanted)) < 0.05 * np.mean(np.square(wanted))


def test_options_that_would_take_over_the_rates_are_refused():
    for option in ("relative_step", "warmup_init"):
        with pytest.raises(UserError, match="set both to false"):
            factored.adafactor(1e-3, **{option: True})
    with pytest.raises(UserError, match="use_bias_correction: false is not supported"):
        optimizers.prodigy(1.0, use_bias_correction=False)


def test_factored_moments_are_small():
    """A row and a column of a matrix; of CAME two of each, and its momentum."""
    matrix = np.zeros((64, 48), np.float32)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(optimizer(1e-3).init(matrix)) if leaf.ndim)
        for optimizer in (factored.adafactor, factored.came)
    ]
    assert sizes == [64 + 48, 2 * (64 + 48) + 64 * 48]


@pytest.mark.parametrize(
    "optimizer", [optimizers.prodigy, factored.adafactor, factored.came, dadapt.dadapt_adam]
)
def test_weights_and_state_can_both_be_given_away(rng, optimizer):
    """As a training step does, which donates both."""
    made = optimizer(1e-3)
    weights = jax.tree.map(jnp.asarray, trainable(rng))
    state = jax.jit(lambda weights: (weights, made.init(weights)))(weights)
    updates, _ = jax.jit(lambda s: made.update(s[0], s[1], s[0]), donate_argnums=0)(state)
    assert all(np.isfinite(update).all() for update in jax.tree.leaves(updates))


def test_every_trained_weight_has_two_moments_and_no_other_array_is_kept(rng):
    weights = trainable(rng)
    transforms = {group: optimizers.adamw(lambda step: 1e-3) for group in RATES}
    state = optimizers.grouped(LABELS, transforms, 1.0).init(weights)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    filling = moments - 2 * sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert 0 <= filling < 2 * optimizers.WHOLE * len(RATES)  # of packed vectors


def test_muon_of_many_matrices_is_pytorchs_of_each(rng, monkeypatch):
    """Over 50 updates; PyTorch's computes in float32 here, as ours does, not in bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    shapes = {"a": (4, 3), "b": (4, 3), "kernel": (4, 1, 1, 3), "wide": (2, 5)}
    ours: Any = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    flat = {n: w.reshape(len(w), -1) for n, w in ours.items()}
    theirs = {n: torch.nn.Parameter(torch.tensor(w)) for n, w in flat.items()}
    options: Any = {"momentum": 0.9, "weight_decay": 0.2}
    reference = torch.optim.Muon(theirs.values(), lr=0.1, adjust_lr_fn="match_rms_adamw", **options)
    optimizer = muon.muon(0.1, **options)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for _ in range(50):
        grads: Any = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
        updates: Any
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for n, weight in theirs.items():
            weight.grad = torch.tensor(grads[n].reshape(flat[n].shape))
        reference.step()
    for n, weight in theirs.items():
        wanted = weight.detach().numpy()
        # Five iterations let rounding grow, several hundred times at most.
        np.testing.assert_allclose(ours[n].reshape(wanted.shape), wanted, atol=1e-4)


def test_muons_updates_have_the_size_of_adamws(rng):
    weights: Any = {"square": np.zeros((64, 64), np.float32), "kernel": np.zeros((32, 8, 3, 3))}
    grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), weights)
    optimizer = muon.muon(1e-2)
    updates, _ = optimizer.update(grads, optimizer.init(weights), weights)
    for update in jax.tree.leaves(updates):  # singular values are 1 to within a third
        assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2e-2, rel=0.35)


def test_muon_leaves_biases_norms_and_embeddings_to_adamw(rng):
    weights: Any = {name: np.ones(4, np.float32) for name in ("norm.weight", "conv.bias")}
    weights["token_embedding.weight"] = np.ones((4, 4), np.float32)
    grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), weights)
    both, adamw = muon.muon(0.1), optimizers.adamw(0.1, betas=(0.9, 0.99), weight_decay=0.1)
    updates, _ = both.update(grads, both.init(weights), weights)
    wanted, _ = adamw.update(grads, adamw.init(weights), weights)
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_muon_trains_a_group_beside_another(rng):
    weights: Any = trainable(rng)
    transforms = {group: muon.muon(lr) for group, lr in RATES.items()}
    optimizer = optimizers.grouped(LABELS, transforms, 1.0)
    updates: Any
    updates, _ = optimizer.update(trainable(rng), optimizer.init(weights), weights)
    sizes = {n: np.sqrt(np.mean(np.square(u))) for n, u in updates["unet"].items()}
    assert sizes["c"] > 5 * sizes["a"] > 0  # ten times the rate


# ----------------------------------------------------------------------------------------- groups


def group(number: int, *layers: str) -> Group:
    return Group(f"unet.{number}", "unet", layers, 10.0**-number)


def test_the_later_group_gets_a_weight_that_two_claim():
    found = assign([group(0, ""), group(1, r"re:.*\.to_k$")], {"unet": NAMES})
    wanted = {name: "unet.1" if "to_k" in name else "unet.0" for name in NAMES}
    assert found.labels == {"unet": wanted}
    assert found.notices == ["unet.1 takes 2 weights over from unet.0"]


def test_weights_that_no_group_names_are_not_trained():
    found = assign([group(0, "conv_in"), group(1, r"re:.*resnets$")], {"unet": NAMES})
    assert found.labels == {"unet": {NAMES[0]: "unet.0", NAMES[3]: "unet.1"}}
    assert not found.notices


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([], "nothing is trained; add a group"),
        ([group(0, "conv_in"), group(1, "")], "unet.0: later groups claim every weight of it"),
        ([group(0, "conv_in", "con_in")], r"unet.0.layers: 'con_in' matches no layer.*'conv_in'"),
        ([group(0, r"re:.*\.(to_k$")], r"unet.0.layers: .*is not a regular expression"),
    ],
)
def test_groups_that_cannot_be_trained_are_named(groups, text):
    with pytest.raises(UserError, match=text):
        assign(groups, {"unet": NAMES})
