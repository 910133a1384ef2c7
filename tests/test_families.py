"""Stable Diffusion 2.x, XL and XL's refiner: read, written, sampled as in diffusers."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import random_model
import torch
import yaml
from PIL import Image

from jaxft import convert, sample, tensor_file
from jaxft.errors import UserError
from jaxft.formats import (
    diffusers_folder,
    families,
    hcp,
    ldm_config,
    published,
    webui,
)
from jaxft.formats.webui_names import Form, names
from tests.pipelines import FAMILIES, WIDTHS, in_files
from tests.test_formats import same_bits

# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_of_any_family_is_read_whole_and_written_back(folders, kind, tmp_path):
    pipeline, folder = folders(kind)
    model = diffusers_folder.read(str(folder))
    assert model.family == FAMILIES[kind]
    diffusers_folder.write(tmp_path / "m", model)
    opened = type(pipeline).from_pretrained(tmp_path / "m", local_files_only=True)
    for part, component in model.parts.items():
        theirs = in_files(part, getattr(pipeline, part))
        assert same_bits(component.params, theirs)
        assert same_bits(in_files(part, getattr(opened, part)), theirs)


@pytest.mark.parametrize("kind", FAMILIES)
def test_folder_to_file_to_folder_changes_no_bit(folders, kind, tmp_path):
    _, folder = folders(kind)
    file, back = tmp_path / "m.safetensors", tmp_path / "back"
    paths = ["--model_path", str(folder), "--save_path", str(file)]
    assert convert.main(["to-webui", *paths]) == 0
    paths = ["--model_path", str(file), "--save_path", str(back), "--config", str(folder)]
    assert convert.main(["from-webui", *paths]) == 0
    before, after = (diffusers_folder.read(str(path)) for path in (folder, back))
    for part, component in before.parts.items():
        assert same_bits(component.params, after.parts[part].params)
    assert webui.detect(tensor_file.read_header(file).tensors, "file") == FAMILIES[kind]


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_diffusers_reads_the_same_weights_from_the_file(folders, kind, tmp_path):
    """Among them a text projection that is not symmetric."""
    pipeline, folder = folders(kind)
    webui.write(tmp_path / "m.safetensors", diffusers_folder.read(str(folder)), "fp32")
    options = {"local_files_only": True} | ({"safety_checker": None} if kind == "sd2" else {})
    opened = type(pipeline).from_single_file(
        str(tmp_path / "m.safetensors"), config=str(folder), **options
    )
    for part in diffusers_folder.read_configs(folder).parts:
        theirs, wanted = (in_files(part, getattr(p, part)) for p in (opened, pipeline))
        assert same_bits(theirs, wanted)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_verify_finds_file_and_folder_the_same(folders, kind, tmp_path, capsys):
    _, folder = folders(kind)
    file = tmp_path / "m.safetensors"
    webui.write(file, diffusers_folder.read(str(folder)), "fp32")
    assert convert.main(["verify", str(folder), str(file), "--tolerance", "1e-5"]) == 0
    assert ("text_encoder_2 pooled" in capsys.readouterr().out) == (kind == "sdxl")


def test_velocities_are_told_in_the_files_beside_and_inside(folders, tmp_path, capsys):
    """By the YAML file, by the header, by XL's keys: and the way back finds them."""
    _, sd2 = folders("sd2")
    _, xl = folders("sdxl")
    velocity = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for folder, name in ((sd2, "two"), (xl, "xl")):
        model = diffusers_folder.read(str(folder))
        file = tmp_path / f"{name}.safetensors"
        webui.write(file, model._replace(scheduler=model.scheduler | velocity), "fp32")
        header = tensor_file.read_header(file)
        assert header.metadata["modelspec.prediction_type"] == "v"
        assert file.with_suffix(".yaml").exists() == (name == "two")
        assert ({"v_pred", "ztsnr"} <= header.tensors.keys()) == (name == "xl")
        back = tmp_path / name
        paths = ["--model_path", str(file), "--save_path", str(back), "--config", str(folder)]
        assert convert.main(["from-webui", *paths]) == 0
        assert diffusers_folder.read(str(back)).scheduler["prediction_type"] == "v_prediction"
        assert "predicts v_prediction" in capsys.readouterr().out
        webui.write(file, model._replace(scheduler=random_model.SCHEDULER), "fp32")
        assert not file.with_suffix(".yaml").exists()


def test_a_users_yaml_file_is_not_replaced(folders, tmp_path):
    _, folder = folders("sd2")
    (tmp_path / "m.yaml").write_text("model: mine")
    with pytest.raises(UserError, match=r"m\.yaml is in the way"):
        webui.write(tmp_path / "m.safetensors", diffusers_folder.read(str(folder)), "fp32")
    assert (tmp_path / "m.yaml").read_text() == "model: mine"
    assert [path.name for path in tmp_path.iterdir()] == ["m.yaml"]


def test_a_part_goes_to_the_text_encoder_that_it_fits(folders, tmp_path):
    """The second encoder of XL has layers of the same names as the first."""
    _, folder = folders("sdxl")
    model = diffusers_folder.read(str(folder))
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    weight = model.parts["text_encoder_2"].params[name] + 1
    hcp.write_part(tmp_path / "part.safetensors", {name: weight})
    paths = ["--model_path", str(folder), "--part", str(tmp_path / "part.safetensors")]
    assert convert.main(["merge", *paths, "--save_path", str(tmp_path / "m")]) == 0
    merged = diffusers_folder.read(str(tmp_path / "m"))
    np.testing.assert_array_equal(merged.parts["text_encoder_2"].params[name], weight)
    first = model.parts["text_encoder"].params
    assert same_bits(merged.parts["text_encoder"].params, first)


def test_the_yaml_file_is_that_of_the_original():
    """Against Stability's v2-inference-v.yaml, where it speaks of the architecture."""
    content = yaml.safe_load(ldm_config.text(published.SD21))["model"]["params"]
    assert content["parameterization"] == "v"
    unet = content["unet_config"]["params"]
    wanted = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": 1024,
    }
    assert unet | wanted == unet
    assert content["first_stage_config"]["params"]["ddconfig"]["ch_mult"] == [1, 2, 4, 4]
    assert content["cond_stage_config"]["params"]["layer"] == "penultimate"


# ----------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", published.ALL)
def test_published_configurations_are_those_of_torch(name):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    texts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    configs = published.ALL[name]
    with torch.device("meta"):
        made: dict[str, Any] = {
            part: network(CLIPTextConfig(**configs.parts[part]))
            for part, network in texts.items()
            if part in configs.parts
        }
        made["unet"] = UNet2DConditionModel.from_config(configs.parts["unet"])
        made["vae"] = AutoencoderKL.from_config(configs.parts["vae"])
    assert families.of_configs(configs.parts, name) == configs.family
    table = names(configs.family, configs.parts)
    assert len(set(table.values())) == len(table)
    for part, module in made.items():
        own = ("text_model.", "text_projection.") if part in WIDTHS else ("",)
        wanted = {
            key if key.startswith(own) else f"text_model.{key}": tuple(value.shape)
            for key, value in module.named_parameters()
        }
        shapes = diffusers_folder.shapes(configs.family.networks[part], configs.parts[part])
        assert {key: leaf.shape for key, leaf in shapes.items()} == wanted
        assert {key.partition(".")[2] for key in table if key.startswith(f"{part}.")} == set(wanted)


def test_stable_diffusion_2_has_all_blocks_that_the_original_has(folders):
    _, folder = folders("sd2")
    stored = webui.to_webui(diffusers_folder.read(str(folder)))
    prefix = "cond_stage_model.model."
    blocks = {key.split(".")[4] for key in stored if key.startswith(f"{prefix}transformer")}
    assert blocks == {"0", "1", "2", "3"}  # one more than the folder's three
    assert stored[f"{prefix}text_projection"].shape == (24, 24)
    assert stored[f"{prefix}logit_scale"].shape == ()


def test_openclips_rows_are_query_key_and_value(folders):
    _, folder = folders("sdxl")
    model = diffusers_folder.read(str(folder))
    stored = webui.to_webui(model)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    layer = "text_model.encoder.layers.0.self_attn"
    weights = model.parts["text_encoder_2"].params
    rows = [weights[f"{layer}.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(stored[key], np.concatenate(rows))
    table = names(model.family, {part: own.config for part, own in model.parts.items()})
    assert table["text_encoder_2.text_projection.weight"].form is Form.TRANSPOSED


# -------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_pictures_are_diffusers(folders, kind, tmp_path):
    pipeline, folder = folders(kind)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(2, 4, 8, 12)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    prompts = ["a photo of the", "the photo"]
    theirs = pipeline(
        prompts,
        negative_prompt=["of", "of"],
        latents=torch.from_numpy(noise),
        height=64,
        width=96,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
        return_dict=False,
    )[0]
    options = {
        "pretrained_model": str(folder),
        "prompt": prompts,
        "neg_prompt": "of",
        "bs": 2,
        "seed": 0,
        "dtype": "fp32",
        "infer_args.latents": str(tmp_path / "noise.npy"),
        "infer_args.height": 64,
        "infer_args.width": 96,
        "infer_args.num_inference_steps": 4,
        "infer_args.guidance_scale": 3.0,
        "save.out_dir": str(tmp_path / "out"),
    }
    arguments = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    assert sample.main(["--config", "configs/infer/text2img.yaml", *arguments]) == 0
    ours = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert np.abs(np.stack(ours) - 255 * theirs).max() <= 2


# -------------------------------------------------------------------------------------- mistakes


def test_a_file_of_another_family_is_named(folders, tmp_path):
    _, sd2 = folders("sd2")
    _, xl = folders("sdxl")
    webui.write(tmp_path / "m.safetensors", diffusers_folder.read(str(sd2)), "fp32")
    with pytest.raises(UserError, match=r"Stable Diffusion 2\.x.*Stable Diffusion XL"):
        webui.read(tmp_path / "m.safetensors", diffusers_folder.read_configs(xl))


def test_a_folder_that_mixes_families_is_refused(folders, tmp_path):
    _, sd2 = folders("sd2")
    _, xl = folders("sdxl")
    mixed = shutil.copytree(xl, tmp_path / "mixed")
    shutil.rmtree(mixed / "unet")
    shutil.copytree(sd2 / "unet", mixed / "unet")
    with pytest.raises(UserError, match="text_encoder, text_encoder_2"):
        diffusers_folder.read(str(mixed))
