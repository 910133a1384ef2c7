"""Adapters of every kind: outputs and gradients are LyCORIS', and files are what it loads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lycoris.functional.general import factorization
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

from jaxft import low_rank, params
from jaxft.errors import UserError
from jaxft.formats import lora, published
from jaxft.lycoris import Change
from jaxft.models import layers
from jaxft.tuning import adapters
from jaxft.tuning.adapters import Adapter
from tests.test_adapters import Holder

LORA_KEYS = {"down": "lora_down.weight", "mid": "lora_mid.weight", "up": "lora_up.weight"}
THEIRS: dict[str, Any] = {
    "locon": lambda host: LoConModule("x", host, 1.0, 2, 3.0, use_tucker=True),
    "loha": lambda host: LohaModule("x", host, 1.0, 2, 3.0),
    "lokr": lambda host: LokrModule("x", host, 1.0, 2, 3.0),
    "dora": lambda host: LoConModule(
        "x", host, 1.0, 2, 3.0, weight_decompose=True, wd_on_out=False
    ),
    "oft": lambda host: DiagOFTModule("x", host, 1.0, 2, constraint=0.02),
}
ALPHA = {"oft": 0.02}  # small enough to be the limit of the turn
CASES = [(kind, conv) for kind in THEIRS for conv in (False, True) if conv or kind != "locon"]


@pytest.mark.parametrize(("kind", "conv"), CASES)
def test_outputs_gradients_and_merged_weights_are_lycoris(kind, conv, rng):
    """DoRA's gradient is the paper's, whose norms are constants, and not LyCORIS'."""
    host = torch.nn.Conv2d(12, 20, 3, padding=1) if conv else torch.nn.Linear(12, 20)
    theirs = THEIRS[kind](host)
    shape = tuple(host.weight.shape)
    own = Adapter("lora_unet.0", shape, 2, ALPHA.get(kind, 3.0), 0.0, kind)
    base = {f"layer.{n}": p.detach().numpy().copy() for n, p in host.named_parameters()}
    factors = {
        n: v + 0.3 * rng.standard_normal(v.shape, np.float32)
        for n, v in adapters.init({"layer": [own]}, 0, base).items()
    }
    named = {n.rpartition(".")[2]: v for n, v in factors.items()}
    held = dict(theirs.named_parameters())
    assert {LORA_KEYS.get(n, n) for n in named} <= held.keys() | {"dora_scale"}
    for name, value in named.items():
        with torch.no_grad():
            target = (
                getattr(theirs, name) if name == "dora_scale" else held[LORA_KEYS.get(name, name)]
            )
            target.copy_(torch.tensor(value))
    x = rng.standard_normal((2, 5, 7, 12) if conv else (3, 12)).astype(np.float32)
    x_t = torch.tensor(x.transpose(0, 3, 1, 2).copy() if conv else x)
    y_t = theirs(x_t)
    y_t.square().sum().backward()

    def build() -> Any:
        layer = layers.Conv2d(12, 20, 3, padding=1) if conv else layers.Linear(12, 20)
        return adapters.attach(Holder(layer), {"layer": [own]})

    graphdef = params.abstract(build)[0]

    def forward(factors: Any) -> Any:
        return params.bind(graphdef, base | factors).layer(jnp.asarray(x))

    wanted = y_t.detach().numpy()
    wanted = wanted.transpose(0, 2, 3, 1) if conv else wanted
    size = np.abs(wanted).max()
    np.testing.assert_allclose(forward(factors), wanted, atol=1e-5 * size)
    if kind != "dora":
        grads = jax.grad(lambda f: jnp.sum(forward(f) ** 2))(factors)
        for name, grad in grads.items():
            other = held[LORA_KEYS.get(name.rpartition(".")[2], name.rpartition(".")[2])].grad
            np.testing.assert_allclose(
                grad, other.numpy(), atol=1e-5 * float(other.abs().max()), rtol=1e-4
            )
    change = adapters.result({"layer": [own]}, factors)["layer"]
    merged = low_rank.merge(base, {"layer": change})["layer.weight"]
    again = dict(base) | {"layer.weight": merged}
    plain = params.abstract(lambda: adapters.attach(Holder(build().layer), {"layer": []}))[0]
    y = params.bind(plain, again).layer(jnp.asarray(x))
    np.testing.assert_allclose(y, wanted, atol=1e-5 * size)


@pytest.mark.parametrize("kind", [*THEIRS, "lora"])
def test_an_adapter_begins_at_the_model(kind, rng):
    own = Adapter("g", (20, 12, 3, 3), 2, 1.0, 0.0, kind)
    weight = rng.standard_normal(own.shape, np.float32)
    made = adapters.result({"a": [own]}, adapters.init({"a": [own]}, 0, {"a.weight": weight}))
    np.testing.assert_allclose(made["a"].delta(weight), 0, atol=1e-6)


@pytest.mark.parametrize("factor", [-1, 4, 12, 16])
def test_widths_are_factored_as_lycoris_does(factor):
    for width in (320, 640, 768, 1024, 1280, 2560, 3072, 5120):
        made = Adapter("g", (width, width), 1, 1.0, 0.0, "lokr", factor=factor)
        assert made.shapes["lokr_w1"] == (factorization(width, factor)[0],) * 2


@pytest.mark.parametrize("kind", list(THEIRS))
def test_both_forms_of_files_keep_every_kind(kind, tmp_path, rng):
    configs, module = published.ALL["SD15"], "down_blocks.0.resnets.0.conv1"
    shape = lora.modules(configs)["unet"][module]
    own = {module: [Adapter("g", tuple(shape), 2, 0.5, 0.0, kind)]}
    weight = {f"{module}.weight": rng.standard_normal(shape, np.float32)}
    made = adapters.result(own, adapters.init(own, 0, weight))
    change = made[module]
    assert isinstance(change, Change)
    lora.write_kohya(tmp_path / "k.safetensors", {"unet": made}, configs)
    lora.write_hcp(tmp_path, {"unet": made})
    for name in ("k", "unet"):
        found = lora.read(tmp_path / f"{name}.safetensors", configs)["unet"][module]
        assert isinstance(found, Change)
        assert (found.kind, found.scale) == (kind, change.scale)
        assert found.factors.keys() == change.factors.keys()
        for factor, value in found.factors.items():
            np.testing.assert_array_equal(value, change.factors[factor])
    with pytest.raises(UserError, match=f"{module} has a {kind}.*kohya"):
        lora.write_peft(tmp_path / "p.safetensors", {"unet": made})
