"""LoRAs in training: PEFT's outputs and gradients, how they begin, and what is chosen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, inject_adapter_in_model

from jaxft import low_rank, params, selection
from jaxft.errors import UserError
from jaxft.formats import hcp
from jaxft.formats.diffusers_folder import Component, Model
from jaxft.formats.families import SD1, SDXL
from jaxft.models import layers
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import adapters
from jaxft.tuning.adapters import Adapter
from tests.test_step import SCHEDULER, TEXT, UNET

RANK, ALPHA = 2, 3.0

VAE: dict[str, Any] = {"block_out_channels": (8, 8)}


def one(shape: tuple[int, ...], dropout: float = 0.0, group: str = "lora_unet.0") -> Adapter:
    return Adapter(group, shape, RANK, ALPHA, dropout)


def random_factors(own: adapters.Adapters, rng) -> dict[str, np.ndarray]:
    """Factors as after some training, of the size that they begin with."""
    made = adapters.init(own, 0)
    return {k: rng.standard_normal(v.shape, np.float32) * 0.3 for k, v in made.items()}


# ------------------------------------------------------------------------------------- one layer


class Holder(nnx.Module):
    def __init__(self, layer: Any):
        self.layer = layer


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: torch.nn.Linear(5, 7), lambda: layers.Linear(5, 7)),
    "1x1": (lambda: torch.nn.Conv2d(5, 7, 1), lambda: layers.Conv2d(5, 7, 1)),
    "3x3": (
        lambda: torch.nn.Conv2d(5, 7, 3, padding=1),
        lambda: layers.Conv2d(5, 7, 3, padding=1),
    ),
    "stride": (
        lambda: torch.nn.Conv2d(5, 7, 3, stride=2, padding=1),
        lambda: layers.Conv2d(5, 7, 3, stride=2, padding=1),
    ),
}


def bound(kind: str, own: Adapter) -> Any:
    """The graph of one layer of ours with a LoRA."""
    build = LAYERS[kind][1]
    return params.abstract(lambda: adapters.attach(Holder(build()), {"layer": [own]}))[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_pefts(kind, rng):
    holder = torch.nn.ModuleDict({"layer": LAYERS[kind][0]()})
    base = {f"layer.{n}": p.detach().numpy().copy() for n, p in holder["layer"].named_parameters()}
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"])  # pyright: ignore
    theirs: Any = inject_adapter_in_model(settings, holder)["layer"]  # pyright: ignore
    own = one(base["layer.weight"].shape)
    factors = random_factors({"layer": [own]}, rng)
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    for theirs_is, name in ((down, "down"), (up, "up")):
        theirs_is.data = torch.tensor(factors[f"layer.lora.0.{name}"])
    shape = (3, 5) if kind == "linear" else (3, 9, 11, 5)
    x = rng.standard_normal(shape).astype(np.float32)
    x_t = torch.tensor(x if kind == "linear" else x.transpose(0, 3, 1, 2).copy())
    x_t.requires_grad_()
    y_t = theirs(x_t)
    y_t.square().sum().backward()

    def forward(factors: Any, x: Any) -> Any:
        return params.bind(bound(kind, own), base | factors).layer(x)

    def nchw(value: Any) -> np.ndarray:
        value = np.asarray(value)
        return value if kind == "linear" else value.transpose(0, 3, 1, 2)

    y = forward(factors, jnp.asarray(x))
    np.testing.assert_allclose(nchw(y), y_t.detach().numpy(), atol=1e-5)
    grads, grad_x = jax.grad(lambda f, x: jnp.sum(forward(f, x) ** 2), argnums=(0, 1))(
        factors, jnp.asarray(x)
    )
    # Sums of up to 300 products of size 1 in float32, in another order.
    close: Any = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(grads["layer.lora.0.down"], down.grad.numpy(), **close)
    np.testing.assert_allclose(grads["layer.lora.0.up"], up.grad.numpy(), **close)
    np.testing.assert_allclose(nchw(grad_x), x_t.grad.numpy(), **close)  # pyright: ignore


def test_dropout_is_of_what_lies_between_the_factors_and_leaves_the_mean(rng):
    own = one((7, 5), dropout=0.25)
    assert adapters.dropout_keys({"layer": [own]}) == ["layer.lora.0.key"]
    weights = {"layer.weight": np.zeros((7, 5), np.float32), "layer.bias": np.zeros(7, np.float32)}
    factors = random_factors({"layer": [own]}, rng)
    graphdef = bound("linear", own)

    def output(key: Any) -> Any:
        module = params.bind(graphdef, weights | factors | {"layer.lora.0.key": key})
        return module.layer(jnp.ones((1, 5)))[0]

    outputs = np.asarray(jax.vmap(output)(jax.random.split(jax.random.key(0), 4000)))
    inner = factors["layer.lora.0.down"].sum(axis=1)
    up = factors["layer.lora.0.up"] * own.scale
    possible = [up @ (inner * kept / 0.75) for kept in np.ndindex(2, 2)]
    found = [np.isclose(outputs, one, atol=1e-5).all(axis=1).mean() for one in possible]
    assert sum(found) == 1
    assert found[3] == pytest.approx(0.75**2, abs=0.04)  # five standard deviations
    np.testing.assert_allclose(outputs.mean(axis=0), up @ inner, atol=0.1)


def test_dropped_ranks_are_those_of_a_whole_image(rng):
    """Of each image by itself, at all its pixels; the mean is left."""
    own = one((7, 5, 1, 1))._replace(rank_dropout=0.25)
    assert adapters.dropout_keys({"layer": [own]}) == ["layer.lora.0.key"]
    zeros = {"layer.weight": np.zeros((7, 5, 1, 1), np.float32), "layer.bias": np.zeros(7)}
    factors = random_factors({"layer": [own]}, rng)
    weights = zeros | factors | {"layer.lora.0.key": jax.random.key(0)}
    outputs = params.bind(bound("1x1", own), weights).layer(jnp.ones((4000, 2, 3, 5)))
    assert np.ptp(outputs, axis=(1, 2)).max() < 1e-6
    inner = factors["layer.lora.0.down"].sum(axis=(1, 2, 3))
    up = factors["layer.lora.0.up"][..., 0, 0] * own.scale
    for kept in np.ndindex(2, 2):
        expected = up @ (inner * kept / 0.75)
        share = np.isclose(outputs[:, 0, 0], expected, atol=1e-5).all(axis=1).mean()
        wanted = np.prod(np.where(kept, 0.75, 0.25))
        assert share == pytest.approx(wanted, abs=0.04)  # five standard deviations


# ---------------------------------------------------------------------------------- factors


def test_a_lora_begins_as_in_hcp_diffusion_and_depends_on_seed_and_name_alone():
    """`torch.nn.Linear`'s beginning for `down`, nothing for `up`."""
    own = {"a": [one((64, 400))], "b": [one((64, 50, 3, 3)), one((64, 50, 3, 3))]}
    made = adapters.init(own, 7)
    for name, value in made.items():
        if name.endswith("up"):
            assert not value.any()
            continue
        limit = 1 / np.sqrt(np.prod(value.shape[1:]))
        assert np.abs(value).max() <= limit
        assert value.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)
    assert (made["b.lora.0.down"] != made["b.lora.1.down"]).all()
    alone = adapters.init({"a": own["a"]}, 7)
    np.testing.assert_array_equal(alone["a.lora.0.down"], made["a.lora.0.down"])
    assert (adapters.init(own, 8)["a.lora.0.down"] != made["a.lora.0.down"]).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_loras_of_one_layer_add_up_to_one(shape, rng):
    own = {"a": [one(shape), Adapter("lora_unet.1", shape, 3, 0.5, 0.0)]}
    factors = random_factors(own, rng)
    low = adapters.result(own, factors)["a"]
    assert low.rank == 5
    parts = [
        low_rank.LowRank(factors[f"a.lora.{n}.down"], factors[f"a.lora.{n}.up"], alpha).delta()
        for n, alpha in ((0, ALPHA), (1, 0.5))
    ]
    np.testing.assert_allclose(low.delta(), parts[0] + parts[1], atol=1e-5)


# ------------------------------------------------------------------------------ a whole network


def weights_of(build: Any, rng) -> dict[str, np.ndarray]:
    _, shapes = params.abstract(build)
    return {n: 0.2 * rng.standard_normal(s.shape).astype(np.float32) for n, s in shapes.items()}


def tiny(rng, family=SD1) -> Model:
    """A model of two levels; of XL two text encoders."""
    config = {"unet": UNET, "vae": VAE} | dict.fromkeys(family.text_encoders, TEXT)
    parts = {
        name: Component(config[name], weights_of(lambda n=name, k=network: k(config[n]), rng))
        for name, network in family.networks.items()
        if name != "vae"
    }
    return Model(family, parts | {"vae": Component(VAE, {})}, SCHEDULER, {}, None)  # pyright: ignore


def groups(clip_skip: int = 0, **chosen: Any) -> dict[str, Any]:
    """The groups of a configuration: section -> patterns, or (patterns, options)."""
    options = {"lr": 1e-3, "rank": RANK, "alpha": ALPHA, "dropout": 0.0}
    options |= {"rank_dropout": 0.0, "type": "lora", "factor": -1, "optimizer": {}}
    options |= {"svd_init": False, "replaces": False, "branch": None}
    tree: dict[str, Any] = {name: {} for name in ("unet", "text_encoder", "controlnet")}
    tree |= {"lora_unet": {}, "lora_text_encoder": {}}
    for section, items in chosen.items():
        tree[section] = {
            str(n): options | (item if isinstance(item, dict) else {"layers": item})
            for n, item in enumerate(items)
        }
    return tree | {"model": {"clip_skip": clip_skip, "clip_final_norm": True}}


def test_a_network_with_loras_is_the_network_with_the_sum_of_weights(rng):
    """Of every kind of layer, two on some; the rounding is that of float32."""
    model = tiny(rng)
    chosen = selection.select(groups(lora_unet=[[""], [r"re:.*attn.?$"]]), model)
    assert chosen.notices == [
        "lora_unet.1 adds to the LoRAs that 32 of its layers have already"  # 4 transformers
    ]
    own = chosen.adapters["unet"]
    factors = random_factors(own, rng)
    graphdef, _ = params.abstract(lambda: adapters.attach(UNet2DConditionModel(UNET), own))
    plain, _ = params.abstract(lambda: UNet2DConditionModel(UNET))
    inputs = (
        jnp.asarray(rng.standard_normal((1, 8, 8, 4)), jnp.float32),
        jnp.asarray([10]),
        jnp.asarray(rng.standard_normal((1, 77, 16)), jnp.float32),
    )
    base = model.parts["unet"].params
    beside = jax.jit(lambda w: params.bind(graphdef, w)(*inputs))(base | factors)
    lora = selection.lora(chosen, {"lora_unet": factors})["unet"]
    merged = jax.jit(lambda w: params.bind(plain, w)(*inputs))(low_rank.merge(base, lora))
    untouched = jax.jit(lambda w: params.bind(plain, w)(*inputs))(base)
    size = float(jnp.abs(untouched).max())
    assert float(jnp.abs(merged - untouched).max()) > 0.1 * size
    np.testing.assert_allclose(beside, merged, atol=2e-5 * size)


# -------------------------------------------------------------------------------------- choosing


def test_both_text_encoders_of_xl_are_chosen_by_hcps_names(rng):
    model = tiny(rng, SDXL)
    chosen = selection.select(
        groups(
            text_encoder=[["re:clip_bigG.*mlp$"]],
            lora_text_encoder=[[r"re:.*self_attn$"]],
        ),
        model,
    )
    layer = "text_model.encoder.layers.0"
    assert set(chosen.labels) == {"text_encoder_2", "lora_text_encoder_2"}
    # XL's first encoder here has one layer, which XL leaves out.
    assert all(name.startswith(f"{layer}.mlp.") for name in chosen.labels["text_encoder_2"])
    assert set(chosen.adapters["text_encoder_2"]) == {
        f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")
    }


def test_what_lies_behind_the_last_layer_in_use_is_not_trained(rng):
    model = tiny(rng)
    text = TEXT | {"num_hidden_layers": 2}
    weights = weights_of(lambda: SD1.networks["text_encoder"](text), rng)
    model = model.replace(text_encoder=Component(text, weights))
    chosen = selection.select(groups(1, text_encoder=[[""]], lora_text_encoder=[[""]]), model)
    left = {n for n in weights if n not in chosen.labels["text_encoder"]}
    assert left == {n for n in weights if ".layers.1." in n}
    assert not any(".layers.1." in name for name in chosen.labels["lora_text_encoder"])
    assert len(chosen.notices) == 2
    with pytest.raises(UserError, match=r"text_encoder\.0: its layers have no influence"):
        selection.select(groups(1, text_encoder=[[r"re:.*layers\.1\.mlp$"]]), model)


def test_a_rank_below_one_is_a_share_of_the_layers_width(rng):
    half = {"layers": ["conv_in", "time_embedding.linear_1"], "rank": 0.25}
    chosen = selection.select(groups(lora_unet=[half]), tiny(rng))
    ranks = {module: own[0].rank for module, own in chosen.adapters["unet"].items()}
    assert ranks == {"conv_in": 4, "time_embedding.linear_1": 16}


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({"lora_unet": [["conv_norm_out"]]}, "'conv_norm_out' matches no linear layer"),
        ({"lora_unet": [["conv_inn"]]}, "lora_unet.0.layers: 'conv_inn' matches no layer.*conv_in"),
        ({"lora_unet": [[]]}, "lora_unet.0.layers: no layers"),
        ({"lora_text_encoder": [[r"re:.*attn9"]]}, "lora_text_encoder.0.layers: .*no layer"),
        ({"text_encoder": [["re:.*attn9"]]}, "text_encoder.0.layers: .*matches no layer"),
        ({"lora_unet": [{"layers": [""], "rank": 1.5}]}, "lora_unet.0.rank: 1.5 is neither"),
        ({"lora_unet": [{"layers": [""], "rank": 0}]}, "lora_unet.0.rank: 0 is neither"),
        ({"lora_unet": [{"layers": [""], "alpha": 0}]}, "lora_unet.0.alpha: 0 must be more"),
        ({"lora_unet": [{"layers": [""], "dropout": 1}]}, "lora_unet.0.dropout: 1 must be"),
        (
            {"lora_unet": [{"layers": [""], "type": "lora3"}]},
            "type: 'lora3' is none of lora, locon",
        ),
        (
            {"lora_unet": [{"layers": [r"re:.*attn.?$"], "type": "locon"}]},
            "lora_unet.0.type: locon differs from lora in convolutions",
        ),
        ({"lora_unet": [{"layers": [""], "factor": 4}]}, "lora_unet.0.factor: 4 .*`type: lokr`"),
        (
            {"lora_unet": [{"layers": [""], "type": "oft", "rank_dropout": 0.1}]},
            "lora_unet.0.rank_dropout: oft has nothing",
        ),
        (
            {"lora_unet": [["conv_in"], {"layers": ["conv_in"], "type": "dora"}]},
            "lora_unet.1: conv_in has an adapter of lora_unet.0 already, and only .* dora does not",
        ),
        ({}, "nothing is trained"),
    ],
)
def test_loras_that_cannot_be_are_named(chosen, text, rng):
    with pytest.raises(UserError, match=text):
        selection.select(groups(**chosen), tiny(rng))


def test_names_in_part_files_are_hcps(rng):
    networks = {"text_encoder_2": {"a": 1}}
    assert hcp.by_file(networks, True) == {"text_encoder": {"clip_bigG.a": 1}}
    assert hcp.by_file({"text_encoder": {"a": 1}}, False) == {"text_encoder": {"a": 1}}
