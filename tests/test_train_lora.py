"""A run that trains everything there is: layers and LoRAs of UNet and text encoder."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from jaxft import config as configs
from jaxft import low_rank, merging, plan, sample, tensor_file, train
from jaxft.formats import diffusers_folder, hcp, lora
from jaxft.tuning import ema
from tests.data_fixtures import photo_folder

STEPS = 4
SMALL = (
    "data.dataset1.batch_size=1",
    "data.dataset1.bucket={target_area: 4096, step_size: 32, num_bucket: 1}",
    "mixed_precision=no",
    "model.gradient_checkpointing=false",
    "train.scheduler.num_warmup_steps=0",
)
GROUPS: dict[str, Any] = {
    "unet": [{"lr": 1e-3, "layers": ["conv_in", r"re:.*\.ff$"]}],
    "text_encoder": [{"lr": 1e-3, "layers": [r"re:.*mlp$"]}],
    "lora_unet": [
        {"lr": 1e-2, "rank": 2, "alpha": 2, "dropout": 0.1, "layers": [r"re:.*\.attn.?$"]},
        {"lr": 1e-2, "rank": 0.2, "alpha": 2, "layers": [r"re:.*resnets$", r"re:.*\.ff$"]},
    ],
    "lora_text_encoder": [{"lr": 1e-2, "rank": 2, "alpha": 2, "layers": ["re:.*self_attn$"]}],
}


@pytest.fixture(scope="module")
def overrides(nano_model, tmp_path_factory) -> list[str]:
    photos = photo_folder(tmp_path_factory.mktemp("photos"), 4)
    model = f"model.pretrained_model_name_or_path={nano_model}"
    return [*SMALL, model, f"data.dataset1.source.data_source1.img_root={photos}"]


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    recipe = {"_base_": ["configs/train/examples/fine-tuning.yaml"], **GROUPS}
    recipe |= {"train": {"train_steps": STEPS, "save_step": 2, "log_step": 1}}
    recipe |= {"model": {"ema": {"_target_": "ModelEMA", "power": 0.5, "every": 2}}}
    recipe |= {"export": {"webui": None, "diffusers": "fp32", "lora": "fp32"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["--config", str(folder / "recipe.yaml"), f"exp_dir={folder / 'run'}", *overrides]
    assert train.main(argv) == 0
    return folder / "run"


def part(run: Path, name: str, step: int = STEPS) -> Path:
    return run / "ckpts" / f"{name}-{step}.safetensors"


def test_part_files_hold_weights_and_factors_under_hcps_keys(run):
    keys = {name: set(tensor_file.read(part(run, name))) for name in ("unet", "text_encoder")}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {"base:conv_in.weight", f"base:{block}.ff.net.2.weight"} < keys["unet"]
    assert f"lora:{block}.attn1.to_q.___.layer.W_down" in keys["unet"]
    assert "lora:down_blocks.0.resnets.0.conv1.___.alpha" in keys["unet"]
    assert f"base:{block}.attn1.to_q.weight" not in keys["unet"]
    layer = "text_model.encoder.layers.0"
    assert f"base:{layer}.mlp.fc1.bias" in keys["text_encoder"]
    assert f"lora:{layer}.self_attn.q_proj.___.layer.W_up" in keys["text_encoder"]


def test_averages_in_part_files_are_the_formula_upon_the_weights_in_them(run, nano_model):
    rule, model = ema.average(power=0.5, every=2), diffusers_folder.read(str(nano_model))
    wanted = {n: np.asarray(v, np.float64) for n, v in model.parts["unet"].params.items()}
    for step in (2, STEPS):
        weights = hcp.read_part(part(run, "unet", step))
        averages = hcp.read_part(part(run, "unet", step), average=True)
        assert averages.keys() == weights.keys()
        for name, weight in weights.items():
            wanted[name] += rule.share(step) * (weight - wanted[name])
            # float32 of weights of about 1
            np.testing.assert_allclose(averages[name], wanted[name], atol=5e-7, err_msg=name)
        assert any(np.any(averages[name] != weights[name]) for name in weights)
    configs_of = diffusers_folder.read_configs(nano_model)
    for name in ("unet", "text_encoder"):
        raw, averaged = (lora.read(part(run, name), configs_of, average) for average in (0, 1))
        assert averaged[name].keys() == raw[name].keys()
        assert any(np.any(low.up != raw[name][m].up) for m, low in averaged[name].items())


def merged(model: diffusers_folder.Model, run: Path) -> diffusers_folder.Model:
    """The base with what `ckpts/` holds."""
    files = [merging.Addition(str(part(run, name))) for name in ("unet", "text_encoder")]
    return merging.merge_loras(merging.merge_parts(model, files), files)


def test_the_export_is_the_base_merged_with_the_part_files(run, nano_model):
    base = diffusers_folder.read(str(nano_model))
    wanted = merged(base, run)
    (folder,) = (path for path in (run / "export").iterdir() if path.is_dir())
    found = diffusers_folder.read(str(folder))
    for network in ("unet", "text_encoder"):
        changed = 0
        for name, weight in found.parts[network].params.items():
            # The two add in one order, but not in one place.
            other = wanted.parts[network].params[name]
            np.testing.assert_allclose(weight, other, atol=1e-6, err_msg=name)
            changed += bool(np.any(weight != base.parts[network].params[name]))
        assert 5 < changed < len(found.parts[network].params)


def test_sampling_merges_the_files_of_both_networks(run, nano_model):
    groups = {
        name: {"type": kind, "part": [{"path": path}], "lora": [{"path": path}]}
        for name, kind in (("unet", "unet"), ("text_encoder", "TE"))
        for path in [str(part(run, name))]
    }
    config, _ = configs.load(
        "configs/infer/text2img.yaml",
        [
            f"pretrained_model={nano_model}",
            f"merge={yaml.safe_dump(groups, default_flow_style=True)}",
        ],
        "infer",
    )
    ours, wanted = sample.load_model(config), merged(diffusers_folder.read(str(nano_model)), run)
    for network in ("unet", "text_encoder"):
        for name, weight in wanted.parts[network].params.items():
            np.testing.assert_array_equal(ours.parts[network].params[name], weight, name)


def test_the_lora_file_in_diffusers_makes_the_export(run, nano_model):
    """Upon the weights that were trained in full, which are its base."""
    (folder,) = (path for path in (run / "export").iterdir() if path.is_dir())
    (file,) = (run / "export").glob("*-lora.safetensors")
    trained: Any = StableDiffusionPipeline.from_pretrained(nano_model, local_files_only=True)
    for network, weights in (("unet", trained.unet), ("text_encoder", trained.text_encoder)):
        own = {n: torch.tensor(v) for n, v in hcp.read_part(part(run, network)).items()}
        if not any(name.startswith("text_model.") for name in weights.state_dict()):
            own = {name.removeprefix("text_model."): value for name, value in own.items()}
        assert not weights.load_state_dict(own, strict=False).unexpected_keys
    trained.load_lora_weights(str(file), adapter_name="x", local_files_only=True)
    trained.fuse_lora(lora_scale=1.0)
    trained.unload_lora_weights()
    export: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for ours, theirs in (
        (export.unet, trained.unet),
        (export.text_encoder, trained.text_encoder),
    ):
        found = theirs.state_dict()
        for name, value in ours.state_dict().items():
            np.testing.assert_allclose(value.numpy(), found[name].numpy(), atol=2e-6, err_msg=name)


def test_the_factors_of_the_lora_file_are_those_of_the_part_files(run, nano_model):
    model = diffusers_folder.read_configs(nano_model)
    (file,) = (run / "export").glob("*-lora.safetensors")
    whole = lora.read(file, model)
    for network in ("unet", "text_encoder"):
        found = lora.read(part(run, network), model)[network]
        assert found.keys() == whole[network].keys()
        for module, low in found.items():
            np.testing.assert_array_equal(low.up, whole[network][module].up)
            assert low.alpha == pytest.approx(whole[network][module].alpha)
            assert np.any(low.up)


def state(folder: Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as reader:
        return jax.tree.map(np.asarray, reader.restore(folder / "state" / str(STEPS) / "arrays"))


def test_a_resumed_run_ends_bit_for_bit_as_the_unbroken_one(run, tmp_path):
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "state" / str(STEPS))
    shutil.rmtree(again / "export")
    for name in ("unet", "text_encoder"):
        part(again, name).unlink()
    assert train.main(["--resume", str(again), "export=null"]) == 0
    ours, theirs = state(again), state(run)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    for name in ("unet", "text_encoder"):
        assert part(again, name).read_bytes() == part(run, name).read_bytes()


# ------------------------------------------------------------------------------- shipped examples


def test_the_example_of_a_lora_is_planned(overrides):
    prepared = plan.prepare(
        *configs.load("configs/train/examples/lora_conventional.yaml", overrides)
    )
    text = plan.describe(prepared)
    assert "rank 8, scale 0.125 (alpha / rank)" in text
    assert "rank 4, scale 0.25 (alpha / rank)" in text
    assert set(prepared.selection.labels) == {"lora_unet", "lora_text_encoder"}


def test_the_example_with_convolutions_trains(overrides, tmp_path):
    argv = ["--config", "configs/train/examples/locon.yaml", f"exp_dir={tmp_path / 'run'}"]
    halves = "model.ema={_target_: ModelEMA, decay_max: 0.5, power: null}"
    chosen = ("export.webui=null", "export.lora=fp32", "export.weights=both", "train.train_steps=1")
    assert train.main([*argv, *overrides, *chosen, halves]) == 0
    keys = set(tensor_file.read(part(tmp_path / "run", "unet", 1)))
    assert "lora:conv_in.___.alpha" not in keys
    assert "lora:down_blocks.0.downsamplers.0.conv.___.layer.W_down" in keys
    assert not any(key.startswith("base:") for key in keys)
    files = sorted((tmp_path / "run" / "export").iterdir())
    assert [file.name for file in files] == ["run-ema-lora.safetensors", "run-lora.safetensors"]
    average, raw = (tensor_file.read(file) for file in files)
    for name in [name for name in raw if name.endswith("lora_up.weight")]:  # `up` begins at 0
        np.testing.assert_array_equal(average[name], raw[name] / 2)


def test_every_kind_trains_and_its_file_makes_the_export(overrides, nano_model, tmp_path):
    layers = {
        "loha": r"re:.*\.attn1$",
        "lokr": r"re:.*\.attn2$",
        "dora": r"re:.*\.resnets$",
        "oft": r"re:.*\.ff$",
        "locon": r"re:.*samplers\.0\.conv$",
    }
    groups = [{"lr": 1e-2, "rank": 2, "type": k, "layers": [own]} for k, own in layers.items()]
    recipe = {
        "_base_": ["configs/train/examples/fine-tuning.yaml"],
        "unet": [],
        "lora_unet": groups,
    }
    recipe |= {"export": {"webui": None, "diffusers": "fp32", "lora": "fp32"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["--config", str(tmp_path / "recipe.yaml"), f"exp_dir={tmp_path / 'run'}", *overrides]
    assert train.main([*argv, "train.train_steps=2"]) == 0
    base = diffusers_folder.read(str(nano_model))
    (folder,) = (path for path in (tmp_path / "run" / "export").iterdir() if path.is_dir())
    found = diffusers_folder.read(str(folder)).parts["unet"].params
    for file in (*(tmp_path / "run" / "export").glob("*-lora*"), part(tmp_path / "run", "unet", 2)):
        own = lora.read(file, base.configs)["unet"]
        assert {getattr(low, "kind", "lora") for low in own.values()} == {*layers}
        wanted = low_rank.merge(base.parts["unet"].params, own)
        for name, weight in found.items():
            np.testing.assert_allclose(weight, wanted[name], atol=1e-6, err_msg=name)
            changed = bool(np.any(weight != base.parts["unet"].params[name]))
            assert changed == (name.removesuffix(".weight") in own), name
