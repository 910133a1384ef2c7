"""Folders of diffusers' Flax models, as its release 0.35 wrote them, hold what their twins hold."""

import shutil
from pathlib import Path

import pytest
import random_model
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from jaxft import convert
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, flax_folder
from tests import data_flax
from tests.conftest import ROOT
from tests.pipelines import in_files
from tests.test_formats import same_bits
from tests.weights import randomise


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder with a tokenizer."""
    copied = Path(shutil.copytree(ROOT / "tests" / "data" / "flax", tmp_path / "flax"))
    random_model.write_tokenizer(copied / "tokenizer")
    return copied


def test_weights_are_those_of_the_pytorch_twin(folder):
    twins = {
        "unet": randomise(UNet2DConditionModel(**data_flax.UNET), 1),
        "vae": randomise(AutoencoderKL(**data_flax.VAE), 2),
        "text_encoder": randomise(CLIPTextModel(CLIPTextConfig(**data_flax.TEXT)), 3),
    }
    model = flax_folder.read(folder)
    for part, twin in twins.items():
        assert same_bits(model.parts[part].params, in_files(part, twin)), part


def test_it_becomes_a_folder_that_diffusers_opens(folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    paths = ["--model_path", str(folder), "--save_path", str(tmp_path / "m")]
    assert convert.main(["to-diffusers", *paths]) == 0
    StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    model, again = flax_folder.read(folder), diffusers_folder.read(str(tmp_path / "m"))
    assert again.scheduler["_class_name"] == "PNDMScheduler"
    for part, component in model.parts.items():
        assert same_bits(again.parts[part].params, component.params)


def test_damage_is_named(folder):
    file = folder / "unet" / "diffusion_flax_model.msgpack"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="diffusion_flax_model"):
        flax_folder.read(folder)
    file.unlink()
    with pytest.raises(UserError, match="diffusion_flax_model"):
        flax_folder.read(folder)
