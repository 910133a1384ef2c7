"""The webui's single file: diffusers' own converters and loaders see the same model."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, webui
from jaxft.formats.diffusers_folder import Model
from jaxft.formats.published import SD15
from jaxft.formats.webui_names import VAE_MATRICES, names
from jaxft.models.unet import UNet2DConditionModel
from tests.test_formats import in_torch, same_bits

PREFIX = "first_stage_model.encoder.mid.attn_1."


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return diffusers_folder.read(str(tiny_model))


def mixed(model: Model) -> Model:
    """The model with weights of three dtypes, infinities and NaN among them."""
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    parts = {}
    for part, component in model.parts.items():
        stored = {
            name: array.astype(kinds[i % 3])
            for i, (name, array) in enumerate(component.params.items())
        }
        first = next(iter(stored))
        stored[first] = stored[first].copy()
        stored[first].flat[:3] = [np.nan, -np.inf, -0.0]
        parts[part] = component._replace(params=stored)
    return model.replace(**parts)


def sd15_in_torch():
    """SD 1.5's true networks, without memory for their weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(SD15.parts["unet"]),
            "vae": AutoencoderKL.from_config(SD15.parts["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SD15.parts["text_encoder"])),
        }


def test_names_of_sd15_are_those_of_torch_and_one_to_one():
    table = names(SD15.family, SD15.parts)
    assert len({place.key for place in table.values()}) == len(table) == 686 + 248 + 196
    for part, module in sd15_in_torch().items():
        ours = {name.partition(".")[2] for name in table if name.startswith(f"{part}.")}
        theirs = {f"text_model.{n}" if part == "text_encoder" else n: tuple(p.shape) for n, p in
                  module.named_parameters()}  # fmt: skip
        assert ours == theirs.keys()
        expected = diffusers_folder.shapes(SD15.family.networks[part], SD15.parts[part])
        assert {name: leaf.shape for name, leaf in expected.items()} == theirs


@pytest.mark.parametrize("depth", [1, 3])
def test_names_are_those_of_diffusers_converters(depth):
    from diffusers.loaders import single_file_utils as theirs

    vae, unet = SD15.parts["vae"], SD15.parts["unet"] | {"layers_per_block": depth}
    table = names(SD15.family, SD15.parts | {"unet": unet})
    keys = [place.key for place in table.values()]
    numbers = {key: torch.full((1, 1, 1, 1), float(i)) for i, key in enumerate(keys)}
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(numbers), unet),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(numbers), vae),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(numbers)),
    }
    found = {f"{part}.{k}": int(v.item()) for part, d in converted.items() for k, v in d.items()}
    assert found == {name: i for i, name in enumerate(table)}


def test_only_listed_tensors_change_form(model):
    stored = webui.to_webui(model)
    table = names(model.family, {part: own.config for part, own in model.parts.items()})
    changed = set()
    for name, place in table.items():
        part, _, rest = name.partition(".")
        if model.parts[part].params[rest].shape != stored[place.key].shape:
            changed.add(name)
    assert changed == {f"vae.{name}" for name in VAE_MATRICES}


def test_folder_to_webui_to_folder_changes_no_bit(model, tmp_path):
    before = mixed(model)
    file = tmp_path / "model.safetensors"
    webui.write(file, before, None)
    configs = diffusers_folder.read_configs(model.folder)
    weights = webui.read(file, configs)
    after = before.replace(
        **{p: own._replace(params=weights.parts[p]) for p, own in before.parts.items()}
    )
    diffusers_folder.write(tmp_path / "again", after, None)
    again = diffusers_folder.read(str(tmp_path / "again"))
    assert weights.ignored == []
    for part, own in again.parts.items():
        assert same_bits(own.params, before.parts[part].params)
        assert own.config == model.parts[part].config
    assert again.scheduler == model.scheduler
    assert same_bits(webui.to_webui(again), params.load(file))


def test_diffusers_opens_the_webui_file(model, tiny_model, tiny_pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline

    file = tmp_path / "m.safetensors"
    webui.write(file, model, "fp32")
    opened = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tiny_model), local_files_only=True, safety_checker=None
    )
    for part in model.parts:
        theirs = in_torch(part, getattr(opened, part))
        assert same_bits(theirs, in_torch(part, getattr(tiny_pipeline, part)))


def test_exports_compute_in_diffusers_what_they_compute_here(model, tiny_model, tmp_path, rng):
    from diffusers import StableDiffusionPipeline

    latents = rng.standard_normal((1, 8, 8, 4), np.float32)
    text = rng.standard_normal((1, 77, 32), np.float32)
    graphdef, _ = params.abstract(lambda: UNet2DConditionModel(model.parts["unet"].config))
    run = jax.jit(lambda weights, *inputs: params.bind(graphdef, weights)(*inputs))
    ours = run(model.parts["unet"].params, latents, np.array([500]), text)
    webui.write(tmp_path / "m.safetensors", model, "fp32")
    diffusers_folder.write(tmp_path / "m", model)
    options = {"local_files_only": True, "safety_checker": None}
    for opened in (
        StableDiffusionPipeline.from_single_file(
            str(tmp_path / "m.safetensors"), config=str(tiny_model), **options
        ),
        StableDiffusionPipeline.from_pretrained(tmp_path / "m", **options),
    ):
        with torch.no_grad():
            nchw = torch.tensor(latents.transpose(0, 3, 1, 2))
            theirs = opened.unet(nchw, 500, torch.tensor(text)).sample.numpy()
        theirs = theirs.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def rewritten(model: Model, path: Path, change) -> Path:
    """A webui file of the model after `change` has edited its dict of weights."""
    stored = webui.to_webui(model)
    change(stored)
    tensor_file.write(path / "changed.safetensors", stored)
    return path / "changed.safetensors"


@pytest.mark.parametrize(
    "former",
    [
        {"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
        {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    ],
)
@pytest.mark.parametrize("form", ["conv", "linear"])
def test_other_names_of_vae_attention(model, tmp_path, former, form):
    def change(stored):
        for new, old in former.items():
            for leaf in ("weight", "bias"):
                array = stored.pop(f"{PREFIX}{new}.{leaf}")
                flat = form == "linear" and array.ndim == 4
                stored[f"{PREFIX}{old}.{leaf}"] = array[:, :, 0, 0] if flat else array

    file = rewritten(model, tmp_path, change)
    weights = webui.read(file, diffusers_folder.read_configs(model.folder))
    assert same_bits(weights.parts["vae"], model.parts["vae"].params)


def test_what_is_no_weight_is_left_out_and_said(model, tmp_path):
    extra = {
        "alphas_cumprod": np.ones(1000, np.float32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
        "model_ema.decay": np.ones((), np.float32),
        "model_ema.diffusion_modelinput_blocks00weight": np.ones(3, np.float32),
    }
    file = rewritten(model, tmp_path, lambda stored: stored.update(extra))
    weights = webui.read(file, diffusers_folder.read_configs(model.folder))
    assert weights.ignored == sorted(extra)
    assert same_bits(weights.parts["text_encoder"], model.parts["text_encoder"].params)


def test_misfits_of_a_webui_file_are_all_listed(model, tmp_path):
    def change(stored):
        stored["model.diffusion_model.out.9.bias"] = stored.pop("model.diffusion_model.out.2.bias")
        stored[f"{PREFIX}q.weight"] = np.zeros((2, 2), np.float32)

    file = rewritten(model, tmp_path, change)
    with pytest.raises(UserError, match=r"out\.9\.bias") as error:
        webui.read(file, diffusers_folder.read_configs(model.folder))
    assert "model.diffusion_model.out.2.bias" in str(error.value)
    assert f"{PREFIX}q.weight (2, 2)" in str(error.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "XL"),
        ("lora_unet_conv_in.alpha", "LoRA"),
    ],
)
def test_files_of_other_models_are_named(tmp_path, key, kind):
    tensor_file.write(tmp_path / "other.safetensors", {key: np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=kind):
        webui.read(tmp_path / "other.safetensors", SD15)


@pytest.mark.parametrize(("ours", "spec"), [("epsilon", "epsilon"), ("v_prediction", "v")])
def test_metadata_is_modelspecs(model, tmp_path, ours, spec):
    scheduler = model.scheduler | {"prediction_type": ours}
    webui.write(tmp_path / "My model.safetensors", model._replace(scheduler=scheduler))
    found = tensor_file.read_header(tmp_path / "My model.safetensors").metadata
    required = ("sai_model_spec", "architecture", "implementation", "title", "resolution")
    assert {f"modelspec.{name}" for name in required} < found.keys()
    assert found["modelspec.title"] == "My model"
    assert found["modelspec.resolution"] == "64x64"
    assert found["modelspec.prediction_type"] == spec
