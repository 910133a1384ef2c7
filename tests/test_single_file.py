"""Webui files alone: told what they are, read, trained on, and what their headers say."""

import json
from pathlib import Path

import numpy as np
import pytest
import random_model

from jaxft import config as configurations
from jaxft import plan, records, tensor_file
from jaxft.convert import main
from jaxft.errors import UserError
from jaxft.formats import clip_tokenizer, diffusers_folder, modelspec, published, single_file, webui
from jaxft.formats.diffusers_folder import Component, Model
from tests.data_fixtures import photo_folder
from tests.pipelines import FAMILIES
from tests.published_names import hollow, load
from tests.test_formats import same_bits


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """A folder of narrow networks with CLIP's true tokenizer, as only a fine-tune of 1.x has it."""
    rng = np.random.default_rng(0)
    unet = random_model.UNET | {"cross_attention_dim": 16, "block_out_channels": [16, 16, 32, 32]}
    text = random_model.TEXT | {"hidden_size": 16, "intermediate_size": 32}
    text |= {"vocab_size": clip_tokenizer.SIZE, "bos_token_id": 49_406, "eos_token_id": 49_407}
    configs = {"unet": unet, "vae": random_model.VAE, "text_encoder": text}
    parts = {}
    for part, network in published.SD15.family.networks.items():
        shapes = diffusers_folder.shapes(network, configs[part])
        parts[part] = Component(configs[part], random_model.random_params(shapes, rng))
    tokenizers = {"text_encoder": clip_tokenizer.folder()}
    folder = tmp_path_factory.mktemp("narrow") / "model"
    scheduler = random_model.SCHEDULER | {"prediction_type": "v_prediction"}
    model = Model(published.SD15.family, parts, scheduler, tokenizers, folder)
    diffusers_folder.write(folder, model, dtype="fp16")
    return folder


def test_folder_to_file_to_folder_needs_nothing_else(narrow, tmp_path, capsys):
    file, back, again = tmp_path / "m.safetensors", tmp_path / "back", tmp_path / "n.safetensors"
    assert main(["to-webui", "--model_path", str(narrow), "--save_path", str(file)]) == 0
    assert main(["to-diffusers", "--model_path", str(file), "--save_path", str(back)]) == 0
    told = capsys.readouterr().out
    assert "Stable Diffusion 1.x, predicts v_prediction: so says parameterization in" in told
    before, after = (diffusers_folder.read(str(path)) for path in (narrow, back))
    assert after.configs == before.configs
    for part, component in before.parts.items():
        assert same_bits(after.parts[part].params, component.params)
    for name in ("vocab.json", "merges.txt"):
        read = [(folder / "tokenizer" / name).read_bytes() for folder in (narrow, back)]
        assert read[0] == read[1]
    assert main(["to-webui", "--model_path", str(file), "--save_path", str(again)]) == 0
    assert same_bits(tensor_file.read(again), tensor_file.read(file))


def test_training_is_planned_on_a_file(narrow, tmp_path):
    file = tmp_path / "m.safetensors"
    webui.write(file, diffusers_folder.read(str(narrow)), "fp32")
    photo_folder(tmp_path / "photos", 2)
    overrides = {
        "exp_dir": str(tmp_path / "run"),
        "model.pretrained_model_name_or_path": str(file),
        "data.dataset1.source.data_source1.img_root": str(tmp_path / "photos"),
        "data.dataset1.source.data_source1.caption_file": str(tmp_path / "photos"),
        "data.dataset1.bucket.target_area": 64 * 64,
        "data.dataset1.bucket.step_size": 32,
        "data.dataset1.bucket.num_bucket": 1,
        "train.scheduler.num_warmup_steps": 0,
    }
    arguments = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    made = plan.prepare(*configurations.load("configs/train/examples/fine-tuning.yaml", arguments))
    assert made.noising.prediction_type == "v_prediction"
    assert "predicts v_prediction" in plan.describe(made)
    assert made.datasets[0].tokenizers[0].vocab_size == clip_tokenizer.SIZE
    texts = records.described(made)
    assert texts["ss_sd_model_name"] == "m.safetensors"
    assert {"modelspec.date", "modelspec.tags", "ss_steps", "ss_unet_lr"} < texts.keys()
    assert str(tmp_path) not in str(texts)


@pytest.mark.parametrize("kind", FAMILIES)
def test_files_of_all_families_carry_their_configurations(folders, kind, tmp_path):
    """So that files of any width are read; only another tokenizer than CLIP's is missed."""
    _, folder = folders(kind)
    file = tmp_path / "m.safetensors"
    model = diffusers_folder.read(str(folder))
    webui.write(file, model, None)
    held = webui.configs_in_header(file)
    assert held is not None
    for name, config in (model.configs.parts | {"scheduler": model.scheduler}).items():
        public = {k: v for k, v in config.items() if k == "_class_name" or k[0] != "_"}
        assert held[name] == public
    with pytest.raises(UserError, match=r"knows \d+ tokens.*tokenizer is not CLIP's.*--config"):
        single_file.read(file)


# ------------------------------------------------------------------------------------- evidence


def opened(name: str, change) -> single_file.Opened:
    stored = hollow(load(name)["webui"])
    change(stored)
    return single_file.read(Path("original.ckpt"), load=lambda _: stored)


def test_stable_diffusion_2_is_told_by_the_spread_of_a_weight():
    """ComfyUI's rule, where nothing else says what the UNet predicts."""
    spread = np.random.default_rng(0).normal(0, 0.2, 320).astype(np.float16)
    model, told = opened("sd21", lambda stored: stored.update({single_file.SPREAD: spread}))
    assert model.configs == published.SD21
    assert "ComfyUI's rule" in told[0]


def test_xl_is_told_by_its_marks():
    marks = {"v_pred": np.zeros(0), "ztsnr": np.zeros(0), "alphas_cumprod": np.ones(1000)}
    model, told = opened("sdxl", lambda stored: stored.update(marks))
    assert model.scheduler["prediction_type"] == "v_prediction"
    assert model.scheduler["rescale_betas_zero_snr"]
    assert "so says the key v_pred" in told[0]
    assert {"  alphas_cumprod", "  v_pred", "  ztsnr"} < {*told}


def test_an_inpainting_model_is_told_by_its_inputs(tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = np.broadcast_to(np.float16(0), (320, 9, 3, 3))
    model, _ = opened("sd15", lambda stored: stored.update({key: wide}))
    assert model.parts["unet"].config["in_channels"] == 9


def test_openclips_prompts_are_padded_with_zeros():
    configs = {name: opened(name, lambda _: None).model.tokenizers for name in ("sd15", "sdxl")}
    pads = {
        (name, part): json.loads((folder / "tokenizer_config.json").read_text())["pad_token"]
        for name, tokenizers in configs.items()
        for part, folder in tokenizers.items()
    }
    end = clip_tokenizer.END
    assert pads == {
        ("sd15", "text_encoder"): end,
        ("sdxl", "text_encoder"): end,
        ("sdxl", "text_encoder_2"): "!",
    }


# -------------------------------------------------------------------------------------- headers


def test_what_training_adds_to_a_header_tells_nothing_of_the_machine():
    texts = modelspec.training(
        base="/home/someone/models/base-1/",
        captions=["a cat, sofa", "a dog, sofa", "x" * 99],
        words=["sks"],
        settings={"seed": 3, "unet_lr": 1e-5},
    )
    assert texts["ss_sd_model_name"] == "base-1"
    assert not any("/" in text for text in texts.values())
    assert texts["modelspec.trigger_phrase"] == "sks"
    assert json.loads(texts["ss_tag_frequency"]) == {"train": {"a cat": 1, "sofa": 2, "a dog": 1}}
    assert texts["modelspec.tags"].split(", ")[0] == "sofa"
    assert (texts["ss_seed"], texts["ss_unet_lr"]) == ("3", "1e-05")


def test_no_path_of_the_folder_gets_into_the_file(narrow, tmp_path):
    model = diffusers_folder.read(str(narrow))
    private = model.parts["unet"].config | {"_name_or_path": "/home/someone/model"}
    model = model.replace(unet=model.parts["unet"]._replace(config=private))
    webui.write(tmp_path / "m.safetensors", model, None, {"modelspec.tags": "cat"})
    metadata = tensor_file.read_header(tmp_path / "m.safetensors").metadata
    assert "someone" not in str(metadata)
    assert str(tmp_path) not in str(metadata)
    assert metadata["modelspec.tags"] == "cat"


def test_a_loras_words_stay_with_it_in_other_forms():
    kept = {"modelspec.trigger_phrase": "sks", "ss_tag_frequency": "{}", "modelspec.license": "MIT"}
    assert modelspec.carried(kept | {"ss_output_name": "old", "modelspec.title": "old"}) == kept
