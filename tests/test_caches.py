"""Runs with caches on disk and in memory are one run; what a run needs of them is built once."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from jaxft import caches, plan, train
from jaxft import config as configs
from jaxft.errors import UserError
from tests.data_fixtures import SIZES, photo_folder
from tests.test_train import ONE_SHAPE, arguments, losses, recipe, state

__all__ = ["recipe"]

DATA = "data.dataset1"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(recipe: Path, folder: Path, *overrides: str) -> tuple[dict[str, np.ndarray], str]:
    """The state at the end of a run of four steps, and its log."""
    assert train.main(arguments(recipe, folder, *ONE_SHAPE, *overrides)) == 0
    return state(folder, 4), (folder / "train.log").read_text()


def test_a_run_from_the_disk_is_one_from_memory_bit_for_bit(recipe, cache, tmp_path):
    ends, logs = {}, {}
    for name, folder in {"memory": "null", "built": cache, "found": cache}.items():
        ends[name], logs[name] = run(recipe, tmp_path / name, f"{DATA}.cache_dir={folder}")
    assert "latents found" not in logs["memory"]
    assert f"0 of 8 latents found in {cache}" in logs["built"]
    assert f"8 of 8 latents found in {cache}" in logs["found"]
    for name in ("built", "found"):
        assert losses(tmp_path / name) == losses(tmp_path / "memory")
        for key, value in ends["memory"].items():
            np.testing.assert_array_equal(ends[name][key], value)


def test_prompts_encoded_before_give_the_run_that_encodes_them(recipe, cache, tmp_path):
    """Other programs compute the same: their sums are in another order."""
    run(recipe, tmp_path / "plain")
    text = (f"{DATA}.cache_text=true", f"{DATA}.cache_dir={cache}")
    built, _ = run(recipe, tmp_path / "built", *text)
    found, log = run(recipe, tmp_path / "found", *text)
    assert f"8 of 8 prompts found in {cache}" in log
    np.testing.assert_allclose(losses(tmp_path / "built"), losses(tmp_path / "plain"), rtol=1e-5)
    for key, value in built.items():
        np.testing.assert_array_equal(found[key], value)


def prepared(recipe: Path, *overrides: str) -> plan.Plan:
    return plan.prepare(*configs.load(str(recipe), [*ONE_SHAPE, *overrides]))


def with_part(made: plan.Plan, part: str, **changes: Any) -> plan.Plan:
    """The plan with another configuration, or with one weight changed."""
    component = made.model.parts[part]
    if name := changes.pop("weight", None):
        weights = dict(component.params)
        weights[name] = weights[name] * np.float32(1.001)
        component = component._replace(params=weights)
    component = component._replace(config=component.config | changes)
    return made._replace(model=made.model.replace(**{part: component}))


def test_a_change_of_the_model_encodes_anew_what_it_changes(recipe, tmp_path):
    """The VAE's scaling and its decoder change no moments; other weights do."""
    made = prepared(
        recipe, f"{DATA}.cache_dir={tmp_path}", f"{DATA}.cache_text=true", "unet.0.lr=1e-4"
    )

    def found(made: plan.Plan) -> list[int]:
        told: list[str] = []
        caches.fill(made, say=told.append)
        return [int(line.split()[1]) for line in told]

    assert found(made) == [0, 0]
    assert found(made) == [8, 8]
    assert found(with_part(made, "vae", weight="encoder.conv_in.weight")) == [0, 8]
    assert found(with_part(made, "vae", weight="decoder.conv_in.weight")) == [8, 8]
    assert found(with_part(made, "vae", scaling_factor=0.5)) == [8, 8]
    norm = "text_model.final_layer_norm.weight"
    assert found(with_part(made, "text_encoder", weight=norm)) == [8, 0]
    skipping = prepared(
        recipe,
        f"{DATA}.cache_dir={tmp_path}",
        f"{DATA}.cache_text=true",
        "model.clip_final_norm=false",
    )
    assert found(skipping) == [8, 0]
    assert found(made) == [8, 8]


def test_more_prompts_than_can_be_encoded_are_refused_in_the_plan(recipe, tmp_path):
    template = tmp_path / "many.txt"
    template.write_text("".join(f"photo {number}\n" for number in range(101)))
    overrides = (
        f"{DATA}.cache_text=true",
        f"{DATA}.source.data_source1.prompt_template={template}",
    )
    with pytest.raises(UserError, match=r"dataset1\.cache_text: 0\.png has 101 prompts"):
        prepared(recipe, *overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["text_encoder=[{lr: 1e-4, layers: ['']}]"], "a text encoder is trained"),
        (["lora_text_encoder=[{lr: 1e-4, layers: ['']}]"], "a text encoder is trained"),
        (
            [f"{DATA}.source.data_source1.text_transforms=[{{_target_: CaptionDropout}}]"],
            r"the text_transforms of 0\.png make other prompts in every epoch",
        ),
    ],
)
def test_prompts_that_change_are_not_encoded_before(recipe, overrides, told):
    made = prepared(recipe, *overrides)
    assert made.total_steps == 4
    with pytest.raises(UserError, match=rf"dataset1\.cache_text: {told}"):
        prepared(recipe, f"{DATA}.cache_text=true", *overrides)


def test_a_run_with_masks_and_flips_is_resumed_bit_for_bit(recipe, tmp_path):
    """The images of half a mask count half of five times; both sides of them are kept."""
    photos = photo_folder(tmp_path / "photos", 8)
    (tmp_path / "masks").mkdir()
    grey = np.repeat(np.array([[255, 0]], np.uint8), 32, axis=1)
    for number in range(8):
        size = SIZES[number % len(SIZES)]
        Image.fromarray(grey).resize(size).save(tmp_path / f"masks/{number}.png")
    source = f"{DATA}.source.data_source1"
    options = (f"{source}.img_root={photos}", f"{source}.flip=true", "train.save_step=2")
    masked = f"{source}.att_mask={tmp_path / 'masks'}"
    ended, log = run(recipe, tmp_path / "masked", *options, masked)
    assert "att_mask: 8 images of which the parts count as masks say" in log
    assert "flip: 8 images mirrored half of the time" in log
    again = Path(shutil.copytree(tmp_path / "masked", tmp_path / "again"))
    shutil.rmtree(again / "state" / "4")
    assert train.main(["--resume", str(again)]) == 0
    assert losses(again) == losses(tmp_path / "masked")
    resumed = state(again, 4)
    for name, value in ended.items():
        np.testing.assert_array_equal(resumed[name], value)


def test_states_of_xl_are_those_of_diffusers(folders, tmp_path):
    pipeline, folder = folders("sdxl")
    tree = {
        "_base_": ["configs/train/examples/fine-tuning.yaml"],
        "mixed_precision": "no",
        "unet": [{"lr": 1e-3, "layers": [r"re:.*\.to_k$"]}],
        "model": {"pretrained_model_name_or_path": str(folder), "tokenizer_repeats": 1},
        "data": {
            "dataset1": {
                "batch_size": 1,
                "cache_latents": False,
                "cache_text": True,
                "source": {
                    "data_source1": {
                        "img_root": str(photo_folder(tmp_path / "p", 2)),
                        "caption_file": str(tmp_path / "p"),
                        "prompt_template": None,
                    }
                },
                "bucket": {"target_area": 64 * 64, "step_size": 32, "num_bucket": 1},
            }
        },
    }
    file = tmp_path / "xl.yaml"
    file.write_text(yaml.safe_dump(tree))
    (dataset,) = caches.fill(plan.prepare(*configs.load(str(file)))).datasets
    batch = dataset.batch(0)
    drawn = dataset.plan[0].images.tolist()
    prompts = [dataset.records[image].captions[0] for image in drawn]
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert "input_ids" not in batch
    np.testing.assert_allclose(batch["encoder_hidden_states"], states, atol=2e-5)
    np.testing.assert_allclose(batch["pooled_text_embeds"], pooled, atol=2e-5)
