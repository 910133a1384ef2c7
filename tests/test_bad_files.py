"""Files that are not what they should be: one message says what they are and what is needed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jaxft import convert, tensor_file
from jaxft.formats import diffusers_folder, lora, webui
from jaxft.low_rank import LowRank
from tests.published_names import load
from tests.test_bad_input import ends


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `jaxft convert` with these arguments; its message. Nothing may be written."""

    def run(command: str, **paths: object) -> str:
        argv = [command]
        for flag, value in paths.items():
            argv += [f"--{flag}", str(value)]
        code, text = ends(capsys, [*argv, "--save_path", str(tmp_path / "out")], convert.main)
        assert code == 2
        assert not (tmp_path / "out").exists()
        return text

    return run


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """A webui file that is all right. Not to be written to."""
    file = tmp_path_factory.mktemp("whole") / "m.safetensors"
    webui.write(file, diffusers_folder.read(str(tiny_model)))
    return file


def keys_of(model: str, *prefixes: str) -> dict[str, np.ndarray]:
    """The keys of a published file that begin so, each a number."""
    names = (key for key in load(model)["webui"] if key.startswith(prefixes))
    return dict.fromkeys(names, np.zeros(1, np.float16))


UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (keys_of("sd15", UNET, VAE), "has a UNet and VAE and no text encoder"),
        (keys_of("sd15", UNET), "has a UNet and no VAE and no text encoder"),
        (keys_of("sd15", VAE), "has a VAE and no UNet and no text encoder"),
        (keys_of("sdxl", "conditioner."), "has a text encoder of Stable Diffusion XL and no UNet"),
        (keys_of("controlnet", ""), "this is a ControlNet"),
        ({"lora_unet_mid_block_x.alpha": np.ones(1)}, "this is a LoRA"),
        ({"emb_params": np.ones((2, 768))}, "this is an embedding"),
        ({"double_blocks.0.img_attn.proj.bias": np.ones(1)}, "this is a Flux model"),
        ({"weight": np.ones(1)}, "is no Stable Diffusion model in one file"),
    ],
)
def test_files_that_are_no_whole_model(refused, tmp_path, tensors, words):
    tensor_file.write(tmp_path / "m.safetensors", tensors)
    text = refused("to-diffusers", model_path=tmp_path / "m.safetensors")
    assert f"m.safetensors: {words}" in text


def test_a_file_of_another_family_than_the_folder(refused, whole, folders):
    _, xl = folders("sdxl")
    text = refused("to-diffusers", model_path=whole, config=xl)
    assert "this is a Stable Diffusion 1.x, and the configurations are those of a Stable" in text
    assert "Diffusion XL" in text


def test_a_file_of_other_widths_than_the_published(refused, whole, tmp_path):
    """Of another trainer: there is nothing in its header."""
    tensor_file.write(tmp_path / "m.safetensors", tensor_file.read(whole))
    text = refused("to-diffusers", model_path=tmp_path / "m.safetensors")
    assert (
        "a Stable Diffusion 1.x whose UNet begins with 32 channels; the published one has" in text
    )
    assert "--config FOLDER" in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-7], "it is cut off"),
        (lambda data: data + b"more", "it has something behind its end"),
        (lambda data: data[:5], "it has 5 bytes"),
        (lambda data: b"<!DOCTYPE html>" + data, "its header would have"),
        (lambda data: b"", "it has 0 bytes"),
    ],
)
def test_damaged_files(refused, whole, tmp_path, damage, words):
    (tmp_path / "m.safetensors").write_bytes(damage(whole.read_bytes()))
    text = refused("to-diffusers", model_path=tmp_path / "m.safetensors")
    assert "m.safetensors: not a readable safetensors file" in text
    assert words in text
    assert "get the file again" in text


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_was_renamed(refused, tmp_path, legacy):
    options = {"_use_new_zipfile_serialization": not legacy}
    torch.save({"weight": torch.ones(1)}, tmp_path / "m.safetensors", **options)
    text = refused("to-diffusers", model_path=tmp_path / "m.safetensors")
    assert "not safetensors; it may run code when it is opened, so jaxft does not" in text


@pytest.mark.parametrize("content", ["not json", '{"unet": 1}', '{"unet": {}}', "[" * 9999])
def test_configurations_in_a_header_that_are_none(refused, whole, tmp_path, content):
    file = tmp_path / "m.safetensors"
    tensor_file.write(file, tensor_file.read(whole), {webui.CONFIGS: content})
    assert "m.safetensors: jaxft.configs in its header" in refused("to-diffusers", model_path=file)


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("unet", "block_out_channels", None),
        ("unet", "cross_attention_dim", -1),
        ("unet", "attention_head_dim", []),
        ("vae", "layers_per_block", [2, 2]),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder", "hidden_act", {}),
    ],
)
def test_configurations_in_a_header_with_values_of_another_kind(
    refused, whole, tmp_path, part, option, value
):
    configs = webui.configs_in_header(whole)
    assert configs is not None
    configs[part][option] = value
    file = tmp_path / "m.safetensors"
    tensor_file.write(file, tensor_file.read(whole), {webui.CONFIGS: json.dumps(configs)})
    text = refused("to-diffusers", model_path=file)
    assert part in text.casefold() or "no network can be built from its config.json" in text


def test_a_lora_of_another_base(refused, folders, tiny_model, tmp_path):
    _, xl = folders("sdxl")
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    low = LowRank(np.ones((2, 32), np.float32), np.ones((32, 2), np.float32), 1.0)
    file = tmp_path / "lora.safetensors"
    lora.write_kohya(file, {"unet": {module: low}}, diffusers_folder.read_configs(xl))
    text = refused("merge", model_path=tiny_model, lora=file)
    assert (
        "lora.safetensors: this LoRA was made for another model than Stable Diffusion 1.x" in text
    )
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in text


def test_a_folder_that_mixes_families(refused, folders, tmp_path):
    _, sd2 = folders("sd2")
    _, xl = folders("sdxl")
    mixed = Path(shutil.copytree(xl, tmp_path / "mixed"))
    shutil.rmtree(mixed / "text_encoder")
    shutil.copytree(sd2 / "text_encoder", mixed / "text_encoder")
    (mixed / "unet" / "config.json").write_bytes((sd2 / "unet" / "config.json").read_bytes())
    text = refused("to-webui", model_path=mixed)
    assert "mixed: a UNet of Stable Diffusion 2.x with text_encoder, text_encoder_2 is no" in text


def test_a_model_file_where_a_lora_is_wanted(refused, whole, tiny_model):
    text = refused("merge", model_path=tiny_model, lora=whole)
    assert "holds no LoRA in kohya's, PEFT's or HCP-Diffusion's form" in text


def test_a_pickle_where_a_model_is_wanted(refused, tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "m.ckpt")
    text = refused("to-webui", model_path=tmp_path / "m.ckpt")
    assert "m.ckpt is a file, not a diffusers folder; make one of it with `jaxft convert" in text
