"""The published models' names and shapes, beside what their own programs and diffusers say."""

from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils

from jaxft.formats import controlnet, diffusers_folder, published, single_file, webui
from jaxft.formats.clip_tokenizer import SIZE
from jaxft.formats.diffusers_folder import Component, Model
from jaxft.formats.webui_names import Form, names
from jaxft.models.controlnet import ControlNetModel
from tests.published_names import hollow, load

MODELS = {"sd15": published.SD15, "sd21": published.SD21_BASE, "sdxl": published.SDXL}


@pytest.mark.parametrize(
    ("name", "weights", "keys"),
    [("sd15", 859_520_964, 686), ("sd21", 865_910_724, 686), ("sdxl", 2_567_463_684, 1680)],
)
def test_the_folder_has_the_names_and_shapes_of_diffusers(name, weights, keys):
    configs, lists = MODELS[name], load(name)
    for part, network in configs.family.networks.items():
        ours = diffusers_folder.shapes(network, configs.parts[part])
        assert {key: leaf.shape for key, leaf in ours.items()} == lists[part]
    assert len(lists["unet"]) == keys
    sizes = [torch.Size(shape).numel() for shape in lists["unet"].values()]
    assert sum(sizes) == weights


@pytest.mark.parametrize("name", MODELS)
def test_the_single_file_has_the_names_and_shapes_of_its_own_program(name):
    configs, lists = MODELS[name], load(name)
    parts = {part: Component(config, hollow(lists[part])) for part, config in configs.parts.items()}
    stored = webui.to_webui(Model(configs.family, parts, configs.scheduler, {}, Path()))
    assert {key: tensor.shape for key, tensor in stored.items()} == lists["webui"]


@pytest.mark.parametrize("name", MODELS)
def test_the_single_file_is_read_without_a_folder(name):
    """All that it lacks is published: architecture, schedule, tokenizer."""
    configs, lists = MODELS[name], load(name)
    model, told = single_file.read(Path("original.ckpt"), load=lambda _: hollow(lists["webui"]))
    assert model.configs == configs
    for part, component in model.parts.items():
        assert {key: array.shape for key, array in component.params.items()} == lists[part]
    assert configs.family.title in told[0]
    assert "predicts epsilon" in told[0]
    assert model.tokenizers.keys() == {part for part in lists if part.startswith("text")}


def converted(name: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The networks under diffusers' names, by diffusers' own conversion."""
    configs = MODELS[name]
    found = {}
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(stored), configs.parts["unet"])
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(stored), configs.parts["vae"])
    for part, weights in (("unet", unet), ("vae", vae)):
        found |= {f"{part}.{key}": value for key, value in weights.items()}
    for part, prefix in configs.family.text_prefixes.items():
        if part in configs.family.openclip:
            weights = single_file_utils.convert_open_clip_checkpoint(None, stored, prefix)
        else:
            weights = single_file_utils.convert_ldm_clip_checkpoint(stored)
        own = ("text_model.", "text_projection.")
        found |= {
            f"{part}.{'' if key.startswith(own) else 'text_model.'}{key}": value
            for key, value in weights.items()
        }
    return found


@pytest.mark.parametrize("name", MODELS)
def test_each_name_is_where_diffusers_own_conversion_puts_it(name):
    with torch.device("meta"):
        stored = {key: torch.empty(shape) for key, shape in load(name)["webui"].items()}
    keys = {id(tensor): key for key, tensor in stored.items()}
    theirs = converted(name, stored)
    table = names(MODELS[name].family, MODELS[name].parts)
    unused = "text_projection", ".layers.23."  # of Stable Diffusion 2.x, which has no use for them
    lacking = [key for key in theirs.keys() - table.keys() if not any(u in key for u in unused)]
    assert lacking == []
    assert table.keys() <= theirs.keys()
    moved = {ours: place.key for ours, place in table.items() if place.form is Form.SAME}
    assert moved == {ours: keys[id(theirs[ours])] for ours in moved}


def test_controlnets_names_are_those_of_its_own_program_and_of_diffusers():
    lists, config = load("controlnet"), published.CONTROLNETS["SD15"]
    shapes = diffusers_folder.shapes(ControlNetModel, config)
    assert {key: leaf.shape for key, leaf in shapes.items()} == lists["controlnet"]
    table = controlnet.names(config)
    assert {table[key]: shape for key, shape in lists["controlnet"].items()} == lists["webui"]
    with torch.device("meta"):
        stored = {key: torch.empty(shape) for key, shape in lists["webui"].items()}
    keys = {id(tensor): key for key, tensor in stored.items()}
    theirs = single_file_utils.convert_controlnet_checkpoint(dict(stored), config)
    assert {ours: keys[id(tensor)] for ours, tensor in theirs.items()} == table


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clips_tokenizer_is_the_published_one(pad):
    """Ids of openai/clip-vit-large-patch14 (`<|endoftext|>`) and of OpenCLIP's models (`!`, 0)."""
    from transformers import CLIPTokenizer

    from jaxft.formats.clip_tokenizer import folder

    tokenizer = CLIPTokenizer.from_pretrained(folder(pad), local_files_only=True)
    assert len(tokenizer.get_vocab()) == SIZE == 49_408
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, end) == (49_406, 49_407, 49_407)
    assert tokenizer("A photo of a cat").input_ids == [49_406, 320, 1125, 539, 320, 2368, 49_407]
    assert tokenizer.pad_token_id == {"!": 0}.get(pad, 49_407)
    assert tokenizer.convert_ids_to_tokens([0, 320, 49_405]) == ["!", "a</w>", "jekyll</w>"]
