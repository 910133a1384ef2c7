"""ControlNet files: diffusers opens what is written, folder and single file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import ControlNetModel

from jaxft import tensor_file
from jaxft.convert import main
from jaxft.errors import UserError
from jaxft.formats import controlnet, published, webui
from tests.published_names import hollow, load
from tests.test_formats import same_bits
from tests.weights import randomise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A narrow ControlNet of Stable Diffusion 1.x, written by diffusers."""
    path = tmp_path_factory.mktemp("controlnet") / "net"
    net = ControlNetModel(
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 8, 16, 16),
    )
    randomise(net, 0).save_pretrained(path)
    return path


def weights(net: ControlNetModel) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in net.named_parameters()}


def test_folder_to_file_to_folder_and_diffusers_opens_both(folder, tmp_path):
    file, back = tmp_path / "net.safetensors", tmp_path / "back"
    assert main(["controlnet", "--model_path", str(folder), "--save_path", str(file)]) == 0
    assert main(["controlnet", "--model_path", str(file), "--save_path", str(back)]) == 0
    wanted = weights(ControlNetModel.from_pretrained(folder, local_files_only=True))
    for opened in (
        ControlNetModel.from_pretrained(back, local_files_only=True),
        ControlNetModel.from_single_file(str(file), config=str(folder), local_files_only=True),
    ):
        assert same_bits(weights(opened), wanted)
    header = tensor_file.read_header(file)
    assert all(key.startswith("control_model.") for key in header.tensors)
    assert header.metadata["modelspec.architecture"] == "stable-diffusion-v1/controlnet"


def test_a_published_one_is_read_without_configuration():
    """Also from a file that holds the whole model, as ControlNet's first files did."""
    stored = hollow(load("controlnet")["webui"] | load("sd15")["webui"])
    config, found = controlnet.from_file(Path("control.ckpt"), stored)
    assert config == published.CONTROLNETS["SD15"]
    assert {key: w.shape for key, w in found.items()} == load("controlnet")["controlnet"]


def test_other_files_and_folders_are_named(folder, tiny_model, tmp_path):
    file = tmp_path / "net.safetensors"
    controlnet.write_file(file, controlnet.read_folder(folder))
    with pytest.raises(UserError, match="this is a ControlNet"):
        webui.detect(tensor_file.read_header(file).tensors, str(file))
    with pytest.raises(UserError, match="holds a UNet2DConditionModel, not a ControlNetModel"):
        controlnet.read_folder(tiny_model / "unet")
    with pytest.raises(UserError, match=r"is no ControlNet of Stable Diffusion 1\.x or 2\.x"):
        controlnet.from_file(file, {"conv_in.weight": np.zeros(1)})
    with pytest.raises(UserError, match="is in the way"):
        controlnet.write_folder(tiny_model, controlnet.read_folder(folder))
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors: missing"):
        controlnet.read_folder(damaged)
