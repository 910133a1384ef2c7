"""The networks compute what diffusers' and transformers' compute, on the same random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from diffusers import ControlNetModel as TorchControlNet
from diffusers import UNet2DConditionModel as TorchUNet
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as TorchText
from transformers import CLIPTextModelWithProjection as TorchTextWithProjection

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.models import attention
from jaxft.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxft.models.controlnet import ControlNetModel
from jaxft.models.encoder import REMAT, Added
from jaxft.models.unet import UNet2DConditionModel
from jaxft.models.vae import AutoencoderKL
from tests.pipelines import UNETS
from tests.weights import randomise

TOLERANCE = 1e-4  # of the output's scale: float32 sums in another order
TINY: dict[str, Any] = {"norm_num_groups": 16, "cross_attention_dim": 24}


def bound(network, config, state):
    """The jaxft network's structure and its weights from a PyTorch state dict."""
    graphdef, shapes = params.abstract(lambda: network(config))
    weights = {name: value.numpy() for name, value in state.items()}
    params.check(weights, shapes, "torch")
    return graphdef, weights


def assert_same(ours, theirs: torch.Tensor) -> None:
    theirs_nhwc = theirs.numpy().transpose(0, 2, 3, 1)
    scale = np.abs(theirs_nhwc).max()
    np.testing.assert_allclose(np.asarray(ours), theirs_nhwc, atol=TOLERANCE * scale, rtol=0)


def to_torch(nhwc: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(nhwc.transpose(0, 3, 1, 2).copy())


def text_time(rng, kind):
    """What SDXL is told besides the text, for PyTorch and for us; None for other families."""
    if "addition_embed_type" not in UNETS[kind]:
        return None, None
    embeds = rng.standard_normal((2, 20), np.float32)
    numbers = rng.uniform(0, 1024, (2, 6)).astype(np.float32)
    theirs = {"text_embeds": torch.tensor(embeds), "time_ids": torch.tensor(numbers)}
    return theirs, Added(jnp.asarray(embeds), jnp.asarray(numbers))


def inputs(rng, size, channels=4):
    """Latents, timesteps and text states."""
    latents = rng.standard_normal((2, *size, channels), np.float32)
    return latents, np.array([3, 777]), rng.standard_normal((2, 7, 24), np.float32)


@pytest.fixture(scope="module")
def unets():
    """Family -> diffusers' UNet, our structure and weights; each made once."""
    made = {}

    def make(kind):
        if kind not in made:
            theirs = randomise(TorchUNet(**TINY | UNETS[kind]), 0)
            weights = theirs.state_dict()
            graphdef, weights = bound(UNet2DConditionModel, dict(theirs.config), weights)
            run = jax.jit(lambda w, *args: params.bind(graphdef, w)(*args))
            made[kind] = theirs, run, weights
        return made[kind]

    return make


@pytest.mark.parametrize(
    ("kind", "size"), [("sd1", (8, 8)), ("sd1", (9, 13))] + [(kind, (8, 20)) for kind in UNETS]
)
def test_unet_equals_diffusers(unets, kind, size, rng):
    theirs, run, weights = unets(kind)
    latents, times, text = inputs(rng, size, theirs.config.in_channels)
    their_added, added = text_time(rng, kind)
    with torch.no_grad():
        wanted = theirs(
            to_torch(latents),
            torch.tensor(times),
            torch.tensor(text),
            added_cond_kwargs=their_added,
        ).sample
    assert_same(run(weights, latents, times, text, added), wanted)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_controlnet_equals_diffusers(unets, kind, rng):
    unet, run_unet, unet_weights = unets(kind)
    theirs = TorchControlNet.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32))
    theirs = randomise(theirs, 1)
    graphdef, weights = bound(ControlNetModel, dict(theirs.config), theirs.state_dict())
    latents, times, text = inputs(rng, (8, 12))
    image = rng.uniform(0, 1, (2, 64, 96, 3)).astype(np.float32)
    their_added, added = text_time(rng, kind)
    common = (to_torch(latents), torch.tensor(times), torch.tensor(text))
    with torch.no_grad():
        down, mid = theirs(
            *common, to_torch(image), added_cond_kwargs=their_added, return_dict=False
        )
        wanted = unet(
            *common,
            added_cond_kwargs=their_added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
    run = jax.jit(lambda w, *args: params.bind(graphdef, w)(*args))
    residuals = run(weights, latents, times, text, image, added)
    for ours, other in zip((*residuals.down, residuals.mid), (*down, mid), strict=True):
        assert_same(ours, other)
    assert_same(run_unet(unet_weights, latents, times, text, added, residuals), wanted)


def test_vae_equals_diffusers(rng):
    theirs = randomise(
        TorchVAE(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 16, 32, 32),
            layers_per_block=2,
            norm_num_groups=8,
        ),
        0,
    )
    graphdef, weights = bound(AutoencoderKL, dict(theirs.config), theirs.state_dict())
    images = rng.uniform(-1, 1, (2, 64, 40, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 8, 5, 4), np.float32)
    with torch.no_grad():
        posterior = theirs.encode(to_torch(images)).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        decoded = theirs.decode(to_torch(latents)).sample
    encode = jax.jit(lambda w, x: params.bind(graphdef, w).encode(x))
    decode = jax.jit(lambda w, x: params.bind(graphdef, w).decode(x))
    assert_same(encode(weights, images), moments)
    assert_same(decode(weights, latents), decoded)


@pytest.mark.parametrize(("activation", "end"), [("quick_gelu", 2), ("gelu", 99)])
def test_text_encoder_equals_transformers(activation, end, rng):
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=100,
        bos_token_id=0,
        eos_token_id=end,
        hidden_act=activation,
    )
    theirs = randomise(TorchText(config), 0)
    state = {f"text_model.{name}": value for name, value in theirs.state_dict().items()}
    ours_config = {k: getattr(config, k) for k in ("vocab_size", "hidden_size", "hidden_act")}
    ours_config |= {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    graphdef, weights = bound(CLIPTextModel, ours_config | {"eos_token_id": end}, state)
    ids = rng.integers(1, 99, (2, 77))
    ids[:, 30:] = 99
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids), output_hidden_states=True)
    run = jax.jit(
        lambda w, x, skip, norm: params.bind(graphdef, w)(x, skip, norm), static_argnums=(2, 3)
    )
    states, pooled = run(weights, ids, 0, True)
    penultimate, _ = run(weights, ids, 1, False)
    np.testing.assert_allclose(states, wanted.last_hidden_state.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(pooled, wanted.pooler_output.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(penultimate, wanted.hidden_states[-2].numpy(), atol=TOLERANCE)


def test_projected_text_encoder_equals_transformers(rng):
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        projection_dim=20,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=99,
    )
    theirs = randomise(TorchTextWithProjection(config), 0)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    keys += ("num_attention_heads", "projection_dim", "eos_token_id")
    state = {
        name if name.startswith("text_") else f"text_model.{name}": value
        for name, value in theirs.state_dict().items()
    }
    network, own = CLIPTextModelWithProjection, {key: getattr(config, key) for key in keys}
    graphdef, weights = bound(network, own, state)
    ids = rng.integers(1, 99, (2, 77))
    ids[:, 30:] = 99
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids), output_hidden_states=True)
    states, embeds = jax.jit(lambda w, x: params.bind(graphdef, w)(x, 1, False))(weights, ids)
    np.testing.assert_allclose(embeds, wanted.text_embeds.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(states, wanted.hidden_states[-2].numpy(), atol=TOLERANCE)


TRUE_UNETS: dict[str, tuple[int, dict[str, Any]]] = {
    "sd1": (859_520_964, {"cross_attention_dim": 768}),
    "sd1 inpainting": (859_535_364, {"cross_attention_dim": 768, "in_channels": 9}),
    "sd2": (
        865_910_724,
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
    ),
    "sdxl": (
        2_567_463_684,
        {
            **UNETS["sdxl"],
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sdxl refiner": (
        2_259_526_660,
        {
            **UNETS["sdxl refiner"],
            "block_out_channels": (384, 768, 1536, 1536),
            "cross_attention_dim": 1280,
            "attention_head_dim": (6, 12, 24, 24),
            "transformer_layers_per_block": 4,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
    ),
}
"""Family -> number of parameters and configuration of the published UNet."""


@pytest.mark.parametrize("kind", TRUE_UNETS)
def test_true_unets_have_diffusers_keys_and_shapes(kind):
    count, config = TRUE_UNETS[kind]
    with torch.device("meta"):
        theirs = TorchUNet(**config)
    _, shapes = params.abstract(lambda: UNet2DConditionModel(dict(theirs.config)))
    wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {name: leaf.shape for name, leaf in shapes.items()} == wanted
    assert params.count(shapes) == count


@pytest.mark.parametrize("policy", [p for p in REMAT if p != "none"])
def test_remat_changes_no_gradient(policy, rng):
    config: dict[str, Any] = {
        "block_out_channels": (16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    weights = dict(randomise(TorchUNet(**config), 0).state_dict())
    weights = {name: value.numpy() for name, value in weights.items()}
    latents = jnp.asarray(rng.standard_normal((1, 4, 4, 4), np.float32))
    text = jnp.asarray(rng.standard_normal((1, 7, 8), np.float32))
    time = jnp.array([500])

    def gradient(remat):
        graphdef, _ = params.abstract(lambda: UNet2DConditionModel(config, remat))

        def loss(w):
            return (params.bind(graphdef, w)(latents, time, text) ** 2).mean()

        lowered = jax.jit(jax.grad(loss)).lower(weights)
        return lowered.as_text().count("optimization_barrier"), lowered.compile()(weights)

    barriers, recomputed = gradient(policy)
    none, plain = gradient("none")
    assert barriers > none == 0  # jax.checkpoint leaves barriers behind: the policy did something
    for name in plain:
        scale = np.abs(plain[name]).max() + 1e-6
        np.testing.assert_allclose(recomputed[name], plain[name], atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(600, 77), (77, 77), (513, 513)])
def test_chunked_attention_equals_torch(monkeypatch, queries, keys, causal, rng):
    if causal and queries != keys:
        keys = queries
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 2**18)  # several chunks, the last not full
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((2, s, 3, 16), np.float32))
        for s in (queries, keys, keys, queries)
    )
    ours, pull = jax.vjp(lambda *x: attention.attend(*x, causal=causal), q, k, v)
    leaves = [
        torch.tensor(np.asarray(x).transpose(0, 2, 1, 3), requires_grad=True) for x in (q, k, v)
    ]
    wanted = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    wanted.backward(torch.tensor(np.asarray(g).transpose(0, 2, 1, 3)))
    for mine, theirs in zip(
        (ours, *pull(g)), (wanted.detach(), *(x.grad for x in leaves)), strict=True
    ):
        assert theirs is not None
        np.testing.assert_allclose(mine, theirs.numpy().transpose(0, 2, 1, 3), atol=2e-5)


@pytest.mark.parametrize(
    ("network", "option", "value"),
    [
        (UNet2DConditionModel, "class_embed_type", "timestep"),
        (UNet2DConditionModel, "time_embedding_typo", 1),
        (UNet2DConditionModel, "down_block_types", ["AttnDownBlock2D"] * 4),
        (UNet2DConditionModel, "addition_embed_type", "image"),
        (ControlNetModel, "global_pool_conditions", True),
        (ControlNetModel, "controlnet_conditioning_channel_order", "gbr"),
        (AutoencoderKL, "shift_factor", 0.1),
        (CLIPTextModel, "hidden_act", "relu6"),
    ],
)
def test_unsupported_option_is_named(network, option, value):
    with pytest.raises(UserError, match=option):
        params.abstract(lambda: network({option: value}))


def test_check_lists_every_misfit():
    expected = {name: np.zeros((2, 2)) for name in "abc"}
    with pytest.raises(UserError) as error:
        params.check({"a": np.zeros((2, 2)), "b": np.zeros(3), "z": np.zeros(1)}, expected, "file")
    text = str(error.value)
    assert "missing:\n    c" in text
    assert "unexpected:\n    z" in text
    assert "b (3,), expected (2, 2)" in text


def test_params_round_trip_bit_for_bit(tmp_path, rng):
    import ml_dtypes

    weights = {
        "a.weight": rng.standard_normal((3, 2), np.float32),
        "b": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
        "ids": np.arange(4),
    }
    tensor_file.write(tmp_path / "x.safetensors", weights, {"title": "x"})
    again = params.load(tmp_path / "x.safetensors")
    assert again.keys() == weights.keys()
    assert all(again[k].dtype == v.dtype and (again[k] == v).all() for k, v in weights.items())
    assert tensor_file.read_header(tmp_path / "x.safetensors").metadata["title"] == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
