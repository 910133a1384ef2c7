"""What a LoRA's step does not compute."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import params, selection, step
from jaxft.diffusion import schedule
from jaxft.formats.diffusers_folder import Component, Model
from jaxft.formats.families import SD1
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import adapters
from tests.test_adapters import VAE, groups, tiny
from tests.test_step import SCHEDULER, TEXT, UNET


def test_a_lora_step_computes_a_third_less_than_full_training():
    """The products of the weights' gradients, a third of all, are not in the program."""
    unet = UNET | {"block_out_channels": (128, 256), "cross_attention_dim": 64}
    text = TEXT | {"hidden_size": 64}
    model = tiny(np.random.default_rng(0))._replace(
        parts={
            "unet": Component(unet, params.abstract(lambda: UNet2DConditionModel(unet))[1]),
            "text_encoder": Component(
                text, params.abstract(lambda: SD1.networks["text_encoder"](text))[1]
            ),
            "vae": Component(VAE, {}),
        }
    )
    flops = {
        name: _flops(model, selection.select(groups(**{name: [[""]]}), model))
        for name in ("unet", "lora_unet")
    }
    assert flops["lora_unet"] < 0.75 * flops["unet"]


def test_no_step_of_a_lora_forms_the_gradient_of_a_weight(rng):
    """No product in its program has the shape of a layer's weight, as those of full training do."""
    model, shapes = tiny(rng), {}
    for name in ("unet", "lora_unet"):
        function, args = _gradient(model, selection.select(groups(**{name: [[""]]}), model))
        shapes[name] = products(jax.make_jaxpr(function)(*args).jaxpr)
    hosts = {
        tuple(sorted(weight.shape[:2]))
        if weight.size == np.prod(weight.shape[:2])
        # On a CPU a kernel of several pixels may be one product for each.
        else tuple(sorted(weight.shape))
        for weight in model.parts["unet"].params.values()
        if weight.ndim > 1
    }
    assert hosts <= shapes["unet"] | {shape for shape in hosts if shape[:2] in shapes["unet"]}
    assert not hosts & shapes["lora_unet"]


def products(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes that come out of a program's products and convolutions, their axes sorted."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.add(tuple(sorted(size for size in equation.outvars[0].aval.shape)))
        for inner in jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda node: hasattr(node, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= products(inner)
    return found


def _flops(model: Model, chosen: selection.Selection) -> float:
    """Of the loss's gradient, as counted by XLA before it compiles."""
    function, args = _gradient(model, chosen)
    cost: Any = jax.jit(function).lower(*args).cost_analysis()
    return cost["flops"]


def _gradient(model: Model, chosen: selection.Selection) -> tuple[Any, tuple]:
    """The gradient of a loss, and shapes of what it takes."""
    parts = {name: part for name, part in model.parts.items() if name != "vae"}

    def build(name: str) -> Any:
        network = SD1.networks[name](parts[name].config)
        return adapters.attach(network, chosen.adapters.get(name, {}))

    networks = {name: params.abstract(lambda n=name: build(n))[0] for name in parts}
    objective = step.Objective(networks, schedule.from_config(SCHEDULER), 0.18, jnp.float32)
    frozen = {
        name: {k: v for k, v in part.params.items() if k not in chosen.labels.get(name, {})}
        for name, part in parts.items()
    }
    trainable = {name: part.params for name, part in parts.items() if name in chosen.labels}
    for name, own in chosen.adapters.items():
        trainable[f"lora_{name}"] = jax.tree.map(jnp.asarray, adapters.init(own, 0))
    batch = {
        "input_ids": jax.ShapeDtypeStruct((2, 1, 77), jnp.int32),
        "weight": jax.ShapeDtypeStruct((2,), jnp.float32),
        "moments": jax.ShapeDtypeStruct((2, 20, 28, 8), jnp.float32),
    }

    def loss(trained: Any, frozen: Any, batch: Any) -> Any:
        return step.loss(objective, trained, frozen, batch, jax.random.key(0))

    return jax.grad(loss), (trainable, frozen, batch)
