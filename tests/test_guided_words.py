"""Pairs of words, trained with guidance (DreamArtist); words beside layers (CustomDiffusion)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxft import config as configs
from jaxft import params, plan, step, tensor_file, train
from jaxft.data.tokens import Tokenizer
from jaxft.diffusion import guidance, losses, schedule
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder
from jaxft.tuning import optimizers
from tests.data_fixtures import photo_folder
from tests.test_step import Setup

PAIRS = "configs/train/examples/DreamArtist.yaml"
BESIDE = "configs/train/examples/CustomDiffusion.yaml"
WORDS = ("pt-catgirl1", "pt-catgirl1-neg")
SMALL = (
    "data.dataset1.bucket={target_area: 4096, step_size: 32, num_bucket: 1}",
    "mixed_precision=no",
    "model.gradient_checkpointing=false",
    "train.scheduler={name: constant, num_warmup_steps: 0}",
    "train.scheduler_pt={name: constant, num_warmup_steps: 0}",
    "export.webui=null",
)

# ------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize(
    ("cfg_scale", "formula"),
    [
        ("3.0", lambda x: 3 + 0 * x),
        ("2", lambda x: 2 + 0 * x),
        ("1.0-3.0", lambda x: 1 + 2 * x),
        ("1.0-3.0:ln", lambda x: 1 + 2 * x),
        ("1.0-3.5:cos", lambda x: 1 + 2.5 * np.cos((x - 1) * np.pi / 2)),
        ("5.0-1.0:cos2", lambda x: 5 - 4 * (1 - np.cos(x * np.pi / 2))),
    ],
)
def test_scales_follow_hcps_courses(cfg_scale, formula):
    wanted = [formula(t / 999) for t in range(1000)]
    found: Any = guidance.scales(cfg_scale, 1000)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("cfg_scale", ["x", "", "1.0-", "3.0:sin", "-1", "1-2-3", "3:rate*2"])
def test_a_scale_without_sense_is_named(cfg_scale):
    with pytest.raises(UserError, match=r"train\.cfg_scale: .* ln, cos, cos2"):
        guidance.scales(cfg_scale, 1000)


def test_the_guided_loss_is_that_of_pytorchs_predictions():
    setup = Setup()
    scales = guidance.scales("1.0-4.0:cos", 1000)
    assert scales is not None
    objective = setup.objective._replace(loss=losses.PLAIN._replace(guidance=scales))
    batch = setup.batch(0)
    batch["negative_input_ids"] = setup.batch(1)["input_ids"]
    ours = jax.jit(lambda t, f, b: step.loss(objective, t, f, b, setup.key))(
        setup.trainable, setup.frozen, batch
    )

    _, noise, times, noisy = setup.noised(batch, step.draw(setup.key, (4, 4, 6, 4), 1000))
    with torch.no_grad():
        predicted = [
            setup.unet(noisy, times, setup.text(torch.tensor(ids[:, 0]).long())[0]).sample.numpy()
            for ids in (batch["negative_input_ids"], batch["input_ids"])
        ]
    scale = scales[times.numpy()][:, None, None, None]
    guided = predicted[0] + scale * (predicted[1] - predicted[0])
    np.testing.assert_allclose(ours, np.mean((guided - noise.numpy()) ** 2), rtol=1e-5)


def test_of_xl_guidance_of_zero_leaves_the_negative_prompts(folders, rng):
    """Sizes and pooled states are doubled with the rest."""
    _, folder = folders("sdxl")
    model = diffusers_folder.read(str(folder))
    networks, weights = {}, {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        config, network = model.parts[name].config, model.family.networks[name]
        networks[name] = params.abstract(lambda n=network, c=config: n(c))[0]
        weights[name] = jax.tree.map(jnp.asarray, model.parts[name].params)
    noising, text = schedule.from_config(model.scheduler), model.family.text_layer(0, True)
    objective = step.Objective(networks, noising, 0.13025, jnp.float32, *text)
    size = Tokenizer(model.tokenizers["text_encoder"]).vocab_size
    ids = rng.integers(1, size - 2, (4, 2, 1, 77)).astype(np.int32)
    ids[..., -1] = size - 1
    batch = {
        "weight": np.ones(2, np.float32),
        "moments": rng.standard_normal((2, 4, 6, 8)).astype(np.float32),
        "time_ids": rng.uniform(0, 99, (2, 6)).astype(np.float32),
    }
    guided = batch | dict(
        zip(
            ("input_ids", "input_ids_2", "negative_input_ids", "negative_input_ids_2"),
            ids,
            strict=True,
        )
    )
    plain = batch | {"input_ids": ids[2], "input_ids_2": ids[3]}
    key, none = jax.random.key(3), losses.PLAIN._replace(guidance=np.zeros(1000, np.float32))

    def loss(how: Any, one: Any) -> Any:
        made = objective._replace(loss=how)
        return jax.jit(lambda w, b: step.loss(made, {}, w, b, key))(weights, one)

    np.testing.assert_allclose(loss(none, guided), loss(losses.PLAIN, plain), rtol=1e-5)


def test_gradients_of_words_are_not_clipped_nor_count_in_the_norm():
    own = {"unet": {"w": jnp.array([3.0, 4.0])}, "words": {"x": jnp.array([[30.0, 40.0]])}}
    labels = {"unet": {"w": "a"}, "words": {"x": "b"}}
    made = optimizers.grouped(labels, {"a": optax.sgd(1.0), "b": optax.sgd(1.0)}, 1.0)
    updates: Any = made.update(own, made.init(own), own)[0]
    np.testing.assert_allclose(updates["unet"]["w"], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(updates["words"]["x"], [[-30, -40]])


# ------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"), 4)


@pytest.fixture
def overrides(nano_model, photos, tmp_path) -> list[str]:
    model = f"model.pretrained_model_name_or_path={nano_model}"
    no_words = f"tokenizer_pt.emb_dir={tmp_path}"
    return [*SMALL, model, no_words, f"data.dataset1.source.data_source1.img_root={photos}"]


PT1 = "data.dataset1.source.data_source1.word_names.pt1"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["train.cfg_scale='1.0'"], r"data\.dataset1: word_names has pairs"),
        ([f"{PT1}=pt-catgirl1"], "no prompt says 'pt-catgirl1-neg'"),
        ([f"{PT1}=pt-catgirl1-neg pt-catgirl1"], r"train\.cfg_scale: there are no negative"),
        ([f"{PT1}=[pt-catgirl1]"], r"word_names\.pt1"),
        (["data.dataset1.cache_text=true"], "so it must be false"),
    ],
)
def test_guidance_needs_pairs_and_pairs_guidance(overrides, changes, told):
    with pytest.raises(UserError, match=told):
        plan.prepare(*configs.load(PAIRS, [*overrides, *changes]))


def test_a_negative_prompt_is_the_same_prompt_with_the_other_word(overrides):
    prepared = plan.prepare(*configs.load(PAIRS, overrides))
    (dataset,) = prepared.datasets
    batch, (tokenizer,) = dataset.batch(0), dataset.tokenizers
    ids = {name: tokenizer.ids(name) for name in WORDS}
    assert [len(own) for own in ids.values()] == [3, 6]
    for positive, negative in zip(batch["input_ids"], batch["negative_input_ids"], strict=True):
        ours, theirs = (row[0].tolist() for row in (positive, negative))
        place = ours.index(ids[WORDS[0]][0])
        assert ours[place : place + 3] == ids[WORDS[0]]
        swapped = ours[:place] + ids[WORDS[1]] + ours[place + 3 :]
        assert swapped[:77] == theirs
    text = plan.describe(prepared)
    assert "guidance 3.0" in text
    assert "  against 'a photo of a pt-catgirl1-neg girl'" in text


# -------------------------------------------------------------------------------------------- runs


def moved(run: Path, prepared: plan.Plan, word: str, step: int) -> np.ndarray:
    rows = tensor_file.read(run / "ckpts" / f"{word}-{step}.safetensors")["emb_params"]
    return np.abs(rows - prepared.words.rows[word]).min(axis=1)


def test_a_guided_run_moves_both_words(overrides, tmp_path):
    argv = [*overrides, "data.dataset1.batch_size=1", "train.train_steps=2"]
    assert train.main(["--config", PAIRS, f"exp_dir={tmp_path / 'run'}", *argv]) == 0
    prepared = plan.prepare(*configs.load(PAIRS, argv))
    for word in WORDS:
        assert np.all(moved(tmp_path / "run", prepared, word, 2) > 1e-4)
    assert {path.name for path in (tmp_path / "run" / "ckpts").iterdir()} == {
        f"{word}-2.safetensors" for word in WORDS
    }


def test_a_word_is_trained_beside_keys_and_values(overrides, photos, tmp_path):
    argv = [*overrides, "data.dataset1.batch_size=1", "train.train_steps=1"]
    argv += [
        f"data.dataset_class.source.data_source1.img_root={photos}",
        "data.dataset_class.bucket.target_size=[64, 64]",
    ]
    assert train.main(["--config", BESIDE, f"exp_dir={tmp_path / 'run'}", *argv]) == 0
    prepared = plan.prepare(*configs.load(BESIDE, argv))
    assert np.all(moved(tmp_path / "run", prepared, "pt-dog1", 1) > 1e-4)
    keys = set(tensor_file.read(tmp_path / "run" / "ckpts" / "unet-1.safetensors"))
    assert keys
    assert all(key.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")) for key in keys)
