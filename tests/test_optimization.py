"""Which optimizer moves which weight, how: read off what it does without gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import config, optimization, selection
from jaxft.errors import UserError
from tests.test_adapters import groups, tiny

RATE = 1e-3
EMA = "model.ema={_target_: ModelEMA}"
LAYERS = ("conv_in", "conv_norm_out", "time_embedding")


def steered(chosen: dict[str, Any], model: Any, *overrides: str) -> Any:
    """The selection, and what `train` of the shipped fine-tuning with overrides makes of it."""
    found, _ = config.load(
        "configs/train/examples/fine-tuning.yaml", ["train.scheduler.name=constant", *overrides]
    )
    selected = selection.select(groups(**chosen), model)
    return selected, optimization.from_config(found, selected, model, 10)


def decay(selected: Any, steering: Any, model: Any) -> dict[str, float]:
    """Weight -> the share that an update takes off it where there is no gradient, in rates."""
    weights: Any = selection.initial(selected, model, 0)
    weights = jax.tree.map(lambda leaf: jnp.ones_like(leaf), weights)
    still = jax.tree.map(jnp.zeros_like, weights)
    made = steering.optimizer
    updates, _ = jax.jit(lambda w: made.update(still, made.init(w), w))(weights)
    return {
        name: -float(np.mean(np.asarray(update), dtype=np.float64)) / RATE
        for part in updates.values()
        for name, update in part.items()
    }


def item(*layers: str, **options: Any) -> dict[str, Any]:
    return {"layers": layers, "lr": RATE, "optimizer": options}


def test_a_group_has_its_own_options_and_an_optimizer_of_its_own(rng):
    model = tiny(rng)
    chosen = {
        "unet": [
            item("conv_out", *LAYERS),
            item("conv_in", weight_decay=0.5),
            item("conv_out", _target_="Lion", weight_decay=0.25),
        ]
    }
    selected, steering = steered(chosen, model, "train.optimizer.weight_decay=0.125")
    found = decay(selected, steering, model)
    wanted = {"conv_in": 0.5, "conv_out": 0.25}
    for name, share in found.items():
        assert share == pytest.approx(wanted.get(name.rpartition(".")[0], 0.125), rel=1e-4), name
    assert optimization.told(
        config.load("configs/train/examples/fine-tuning.yaml")[0].train, selected.groups
    ) == [
        "AdamW weight_decay 0.001: unet.0",
        "AdamW weight_decay 0.5: unet.1",
        "Lion weight_decay 0.25: unet.2",
    ]


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Adafactor", "Muon"])
def test_norms_and_biases_do_not_decay_if_they_are_not_to(name, rng):
    model = tiny(rng)
    node = f"train.optimizer={{_target_: {name}, weight_decay: 0.5}}"
    selected, steering = steered(
        {"unet": [item(*LAYERS)]}, model, node, "train.decay_vectors=false"
    )
    shapes = model.parts["unet"].params
    for weight, share in decay(selected, steering, model).items():
        is_vector = shapes[weight].ndim == 1
        assert (share == 0) == is_vector, weight
    assert not steering.notices


def test_that_there_is_no_norm_to_spare_is_told(rng):
    chosen = {"lora_unet": [item("")]}
    _, steering = steered(chosen, tiny(rng), "train.decay_vectors=false")
    assert steering.notices == [
        "train.decay_vectors: false has no effect: no norm and no bias is trained"
    ]


@pytest.mark.parametrize(
    ("options", "overrides", "text"),
    [
        ({"beta": 1}, [], r"unet.0.optimizer.beta: unknown option; did you mean betas\?"),
        ({"_target_": "Adam8"}, [], "unet.0.optimizer._target_: Adam8 is no optimizer"),
        ({"_target_": "SGD", "betas": [0.9, 0.99]}, [], "unet.0.optimizer.betas: unknown option"),
        ({"_target_": "AdamWScheduleFree"}, [EMA], "model.ema: unet.0 is trained by AdamWSchedule"),
        ({}, ["train.optimizer.momentum=0.9"], "train.optimizer.momentum: unknown option"),
    ],
)
def test_options_that_an_optimizer_lacks_are_named(options, overrides, text, rng):
    with pytest.raises(UserError, match=text):
        steered({"unet": [item("", **options)]}, tiny(rng), *overrides)


def test_bfloat16_weights_need_layers_that_are_trained_in_full(rng):
    with pytest.raises(UserError, match=r"train.weights_dtype: bf16 is of layers that are trained"):
        steered({"lora_unet": [item("")]}, tiny(rng), "train.weights_dtype=bf16")
