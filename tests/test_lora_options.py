"""How LoRAs begin, at which rates they are trained, and of which layers: PEFT's and diffusers'."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from peft import LoraConfig, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from jaxft import low_rank, params, selection, warm_start
from jaxft.errors import UserError
from jaxft.formats import lora
from jaxft.tuning import adapters
from jaxft.tuning.adapters import Adapter
from tests.test_adapters import LAYERS, bound, groups, tiny
from tests.test_optimization import item, steered
from tests.test_step import Setup

RANK, ALPHA = 2, 3.0

# ------------------------------------------------------------------------------------ beginnings


def principal(shape: tuple[int, ...]) -> Adapter:
    return Adapter("lora_unet.0", shape, RANK, ALPHA, 0.0, svd=True)


def test_a_lora_that_begins_by_svd_is_pefts_pissa(rng):
    holder = torch.nn.ModuleDict({"layer": torch.nn.Linear(5, 7)})
    left, right = (np.linalg.qr(rng.standard_normal((size, 5)))[0] for size in (7, 5))
    weight = left * (2.0, 1.0, 0.5, 0.25, 0.125) @ right.T  # singular values far apart
    holder["layer"].weight.data = torch.tensor(weight, dtype=torch.float32)
    base = {f"layer.{n}": p.detach().numpy().copy() for n, p in holder["layer"].named_parameters()}
    settings = LoraConfig(  # pyright: ignore
        r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights="pissa"
    )
    theirs: Any = inject_adapter_in_model(settings, holder)["layer"]  # pyright: ignore
    own = {"layer": [principal((7, 5))]}
    begun = adapters.begin(own, base)
    down, up = (begun[f"layer.lora.0.{name}"] for name in ("down", "up"))
    down_t, up_t = (
        getattr(theirs, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B")
    )
    np.testing.assert_allclose(up @ down, up_t @ down_t, atol=1e-5)  # of each, up to its sign
    np.testing.assert_allclose(np.abs(down), np.abs(down_t), atol=1e-5)
    np.testing.assert_allclose(np.abs(up), np.abs(up_t), atol=1e-5)
    left = adapters.hosts(own, begun, base)
    np.testing.assert_allclose(
        left["layer.weight"], theirs.base_layer.weight.detach().numpy(), atol=1e-5
    )
    x = rng.standard_normal((3, 5)).astype(np.float32)
    ours = params.bind(bound("linear", own["layer"][0]), left | begun).layer(jnp.asarray(x))
    np.testing.assert_allclose(ours, x @ base["layer.weight"].T + base["layer.bias"], atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_its_file_fits_the_model_as_it_was(kind, rng):
    """After some training: its LoRA of twice the rank makes the weight that was trained."""
    weight = LAYERS[kind][0]().weight.detach().numpy()
    own = {"layer": [principal(weight.shape)]}
    base = {"layer.weight": weight}
    begun = adapters.begin(own, base)
    trained = {n: v + 0.1 * rng.standard_normal(v.shape, np.float32) for n, v in begun.items()}
    low = adapters.result(own, trained, begun)["layer"]
    assert isinstance(low, low_rank.LowRank)
    assert low.rank == 2 * RANK
    down, up = (trained[f"layer.lora.0.{name}"] for name in ("down", "up"))
    added = low_rank.LowRank(down, up, ALPHA).delta()
    wanted = adapters.hosts(own, begun, base)["layer.weight"] + added.reshape(weight.shape)
    found = low_rank.merge(base, {"layer": low})["layer.weight"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - weight).max() > 0.05
    same = adapters.result(own, begun, begun)["layer"]
    again = low_rank.merge(base, {"layer": same})["layer.weight"]
    np.testing.assert_allclose(again, weight, atol=1e-6)


def test_one_that_began_by_svd_is_trained_on_from_its_file(rng, tmp_path):
    """As a LoRA of twice the rank beside the model as it was: the weights go on as they were."""
    model, alpha = tiny(rng), 2.0
    chosen = [{"layers": "attn", "svd_init": True, "alpha": alpha}]
    first = selection.begin(selection.select(groups(lora_unet=chosen), model), model)
    trained = selection.initial(first, model, 0)
    trained["lora_unet"] = {
        n: v + 0.1 * rng.standard_normal(v.shape, np.float32)
        for n, v in trained["lora_unet"].items()
    }
    lora.write_hcp(tmp_path, selection.lora(first, trained))
    files = ConfigDict({"unet": [str(tmp_path / "unet.safetensors")], "TE": [], "words": {}})
    chosen = [{"layers": "attn", "rank": 2 * RANK, "alpha": 2 * alpha}]
    second = selection.select(groups(lora_unet=chosen), model)
    second = warm_start.select(second, warm_start.read(files, model))
    weights = {}
    for selected, own in ((first, trained), (second, selection.initial(second, model, 0))):
        host, factors = selection.frozen(selected, model, "unet"), own["lora_unet"]
        for name in [name for name in factors if name.endswith(".down")]:
            module = name.removesuffix(".lora.0.down")
            scale = selected.adapters["unet"][module][0].scale
            part = scale * factors[f"{module}.lora.0.up"] @ factors[name]
            weights.setdefault(module, []).append(host[f"{module}.weight"] + part)
    assert len(weights) == 32
    for module, (theirs, ours) in weights.items():
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=module)


def test_a_selection_takes_out_of_the_model_what_its_loras_begin_as(rng):
    model = tiny(rng)
    chosen = [{"layers": "attn", "svd_init": True, "alpha": 2}, {"layers": ["conv_in"]}]
    selected = selection.begin(selection.select(groups(lora_unet=chosen), model), model)
    frozen = selection.frozen(selected, model, "unet")
    trained = selection.initial(selected, model, 0)["lora_unet"]
    changed = 0
    for name, weight in model.parts["unet"].params.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora.0.up" in trained and module != "conv_in":
            part = trained[f"{module}.lora.0.up"] @ trained[f"{module}.lora.0.down"]
            np.testing.assert_allclose(frozen[name] + part, weight, atol=1e-5)
            changed += 1
        else:
            np.testing.assert_array_equal(frozen[name], weight)
    assert changed == 32
    assert selection.lora(selected, {"lora_unet": trained})["unet"]["conv_in"].rank == RANK


# -------------------------------------------------------------------------------------- LoRA+


def test_up_has_the_rate_that_peft_gives_it(rng):
    holder = torch.nn.ModuleDict({"layer": torch.nn.Linear(5, 7)})
    settings = LoraConfig(r=RANK, target_modules=["layer"])  # pyright: ignore
    injected: Any = inject_adapter_in_model(settings, holder)  # pyright: ignore
    theirs = create_loraplus_optimizer(injected, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    wanted = {
        name.split(".")[1]: group["lr"]
        for name, weight in injected.named_parameters()
        for group in theirs.param_groups
        if "lora" in name and any(weight is one for one in group["params"])
    }
    chosen = {"lora_unet": [item("conv_in") | {"loraplus_lr_ratio": 16.0}]}
    selected, steering = steered(chosen, tiny(rng), "train.optimizer.weight_decay=0")
    weights: Any = selection.initial(selected, tiny(rng), 0)
    ones = {"lora_unet": {name: jnp.ones_like(w) for name, w in weights["lora_unet"].items()}}
    updates, _ = steering.optimizer.update(ones, steering.optimizer.init(weights), weights)
    found = {name: -float(np.mean(u)) for name, u in updates["lora_unet"].items()}
    assert found["conv_in.lora.0.down"] == pytest.approx(wanted["lora_A"], rel=1e-4)
    assert found["conv_in.lora.0.up"] == pytest.approx(wanted["lora_B"], rel=1e-4)
    assert wanted["lora_B"] == 16 * wanted["lora_A"]


# -------------------------------------------------------------------------------- which layers


def test_presets_are_the_modules_of_diffusers_and_transformers(rng):
    model, setup = tiny(rng), Setup()
    kinds = {"attn": ("Attention",), "attn-mlp": ("Transformer2DModel",), "full": None}
    for preset, names in kinds.items():
        chosen = selection.select(
            groups(lora_unet=[{"layers": preset}], lora_text_encoder=[{"layers": preset}]), model
        ).adapters
        unet = [n for n, m in setup.unet.named_modules() if names and type(m).__name__ in names]
        layers = (torch.nn.Linear, torch.nn.Conv2d)
        assert {*chosen["unet"]} == {
            name
            for name, module in setup.unet.named_modules()
            if isinstance(module, layers)
            and (not names or any(name.startswith(f"{outer}.") for outer in unet))
        }
        taken = CLIPAttention if preset == "attn" else (CLIPAttention, CLIPMLP)
        outer = [name for name, module in setup.text.named_modules() if isinstance(module, taken)]
        assert {*chosen["text_encoder"]} == {
            f"text_model.{name}"
            for name, module in setup.text.named_modules()
            if isinstance(module, layers) and any(name.startswith(f"{one}.") for one in outer)
        }


def test_a_group_that_replaces_gives_its_layers_their_rank_and_rate(rng):
    every = {"layers": "attn-mlp", "rank": 4}
    keys = {"layers": [r"re:.*to_k$"], "rank": 2, "lr": 1e-4, "type": "dora", "replaces": True}
    selected = selection.select(groups(lora_unet=[every, keys]), tiny(rng))
    found = selected.adapters["unet"]
    assert {len(own) for own in found.values()} == {1}
    for module, (own,) in found.items():
        wanted = (
            (2, "dora", "lora_unet.1") if module.endswith("to_k") else (4, "lora", "lora_unet.0")
        )
        assert (own.rank, own.kind, own.group) == wanted
    assert selected.notices == ["lora_unet.1 takes 8 layers over from groups before it"]
    assert [group.lr for group in selected.groups] == [1e-3, 1e-4]


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ([{"layers": "attention"}], "lora_unet.0.layers: 'attention' is none of attn, attn-mlp"),
        ([{"layers": [""], "svd_init": True, "type": "loha"}], "svd_init: is of `type: lora`"),
        ([{"layers": [""], "svd_init": True, "rank": 8}], "conv_out has no more than 4 singular"),
        ([{"layers": [""], "loraplus_lr_ratio": 2.0, "type": "loha"}], "loraplus_lr_ratio: 2 must"),
        ([{"layers": [""], "loraplus_lr_ratio": 0.0}], "loraplus_lr_ratio: 0 must be more than 0"),
        ([{"layers": ["conv_in"], "replaces": True}], "lora_unet.0.replaces: no group before it"),
        (
            [{"layers": ["conv_in"]}, {"layers": "full", "replaces": True}],
            "lora_unet.0: later groups replace all its LoRAs",
        ),
        (
            [{"layers": ["conv_in"], "svd_init": True}, {"layers": ["conv_in"]}],
            "only those of `type: lora` add up, svd_init does not",
        ),
    ],
)
def test_options_without_meaning_are_named(chosen, text, rng):
    with pytest.raises(UserError, match=text):
        selection.select(groups(lora_unet=chosen), tiny(rng))


def test_a_layer_does_not_begin_by_svd_and_otherwise(rng):
    model, begins = tiny(rng), [{"layers": ["conv_in"], "svd_init": True, "rank": 4}]
    with pytest.raises(UserError, match=r"lora_unet.0.svd_init: conv_in is trained in full"):
        selection.select(groups(unet=[["conv_in"]], lora_unet=begins), model)
    selected = selection.select(groups(lora_unet=begins), model)
    low = low_rank.LowRank(np.ones((4, 4, 3, 3)), np.ones((16, 4, 1, 1)), 4.0)
    begun = warm_start.Begun(model, {("unet", "conv_in"): ("file", low)}, {}, [])
    with pytest.raises(UserError, match=r"lora_unet.0.svd_init begins as a part of the weight"):
        warm_start.select(selected, begun)
