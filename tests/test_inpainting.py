"""Inpainting models are trained on what diffusers' script gives them: holes, and what is left."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL as TorchVAE
from diffusers import StableDiffusionInpaintPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.models.autoencoders import vae as torch_vae
from PIL import Image

from jaxft import config as configs
from jaxft import params, plan, step, train, validation
from jaxft.data import holes, source
from jaxft.data.images import CENTRE, View
from jaxft.diffusion import schedule
from jaxft.diffusion.generate import LEFT, initial_noise
from jaxft.errors import UserError
from jaxft.models.unet import UNet2DConditionModel
from jaxft.models.vae import AutoencoderKL
from tests.data_fixtures import one_shape, photo_folder, photograph
from tests.test_controlnet import XL, channels_first
from tests.test_sample import HEIGHT, STEPS, WIDTH, generate
from tests.test_step import SCHEDULER, UNET, Setup
from tests.weights import randomise

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
}


def make_objective(more: dict[str, Any]) -> step.Objective:
    config = {**UNET, **more, "in_channels": 9}
    nets = {
        "unet": params.abstract(lambda: UNet2DConditionModel(config))[0],
        "vae": params.abstract(lambda: AutoencoderKL(VAE))[0],
    }
    noising = schedule.from_config(SCHEDULER | {"prediction_type": "epsilon"})
    return step.Objective(nets, noising, 0.18215, jnp.float32)


def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "encoder_hidden_states": rng.standard_normal((2, 7, 16)).astype(np.float32),
        "weight": np.ones(2, np.float32),
        "pixel_values": rng.integers(0, 256, (2, 32, 48, 3)).astype(np.uint8),
        "inpaint_mask": np.stack([holes.drawn((48, 32), pick) for pick in (2, 5)]),
    }


@pytest.mark.parametrize("more", [{}, XL], ids=["sd1", "sdxl"])
def test_loss_and_gradients_are_those_of_diffusers_networks(more, rng):
    """The input as in diffusers' `train_dreambooth_inpaint.py`: noisy latents, the mask by nearest
    neighbour, and the latents of `image * (mask < 0.5)`, which are drawn as the others."""
    unet: Any = randomise(TorchUNet(**UNET, **more, in_channels=9), 0)
    autoencoder: Any = randomise(TorchVAE(**VAE), 1)
    objective = make_objective(more)
    own, fixed = (
        {name: jnp.asarray(value.numpy().copy()) for name, value in part.state_dict().items()}
        for part in (unet, autoencoder)
    )
    batch, added = make_batch(rng), {}
    if more:
        batch["pooled_text_embeds"] = rng.standard_normal((2, 8)).astype(np.float32)
        batch["time_ids"] = rng.uniform(0, 99, (2, 6)).astype(np.float32)
        added["text_embeds"] = torch.tensor(batch["pooled_text_embeds"])
        added["time_ids"] = torch.tensor(batch["time_ids"])
    assert 0 < batch["inpaint_mask"].mean() < 1
    key = jax.random.key(3)

    @jax.jit
    def compute(trained, frozen, batch):
        encoded = step.encoded(objective, {"vae": frozen}, batch)
        value = jax.value_and_grad(
            lambda u: step.loss(objective, {"unet": u}, {"vae": frozen}, batch, key)
        )(trained)
        return value, encoded["moments"]

    (ours, gradients), moments = compute(own, fixed, batch)
    draws = step.draw(key, (2, 4, 6, 4), 1000)
    _, noise, times, noisy = Setup().noised({"moments": moments}, draws)
    masked_key = jax.random.fold_in(draws.dropout_key, step.MASKED)
    image = channels_first(batch["pixel_values"]).float() / 127.5 - 1
    mask = torch.tensor(batch["inpaint_mask"])[:, None].float()
    with torch.no_grad():
        mean, log_variance = autoencoder.encode(image * (mask < 0.5)).latent_dist.parameters.chunk(
            2, dim=1
        )
    left = mean + torch.exp(0.5 * log_variance) * channels_first(
        jax.random.normal(masked_key, (2, 4, 6, 4))
    )
    small = torch.nn.functional.interpolate(mask, size=(4, 6))
    inputs = torch.cat([noisy, small, left * 0.18215], dim=1)
    text = torch.tensor(batch["encoder_hidden_states"])
    predicted = unet(inputs, times, text, added_cond_kwargs=added).sample
    theirs = torch.nn.functional.mse_loss(predicted, noise)
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    for name, weight in unet.named_parameters():
        wanted = weight.grad.numpy()
        error = np.linalg.norm(gradients[name] - wanted) / np.linalg.norm(wanted)
        assert error < 2e-5, f"{name}: {error}"  # float32, through two networks


def test_what_is_held_out_is_judged_with_its_holes(rng):
    """Traced only, with and without kept latents: a UNet of nine channels takes no others."""
    shapes = {
        name: params.abstract(lambda n=network, c=config: n(c))[1]
        for name, network, config in (
            ("unet", UNet2DConditionModel, {**UNET, "in_channels": 9}),
            ("vae", AutoencoderKL, VAE),
        )
    }
    kept = {"moments": np.zeros((2, 4, 6, 8), np.float32)}
    for more in ({}, kept):
        batch = make_batch(rng) | more | {validation.SEED: np.arange(2, dtype=np.uint32)}
        found = jax.eval_shape(
            lambda u, v, b: validation.curve(
                make_objective({}), {"unet": u}, {"vae": v}, b, np.arange(3)
            ),
            shapes["unet"],
            shapes["vae"],
            batch,
        )
        assert found.shape == (3,)


def test_a_hole_is_a_rectangle_or_an_ellipse_of_any_size_and_place():
    kinds, shares, size = set(), [], (96, 64)
    for pick in range(2000):
        hole = holes.drawn(size, pick)
        assert hole.shape == (64, 96)
        np.testing.assert_array_equal(hole, holes.drawn(size, pick))
        shares.append(hole.mean())
        if not hole.any():  # a side of 0, in a corner
            continue
        rows, columns = (np.flatnonzero(hole.any(axis=axis)) for axis in (1, 0))
        box = hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if min(box.shape) > 16:
            filled = box.mean()
            assert filled == 1 or abs(filled - np.pi / 4) < 0.05
            kinds.add(filled == 1)
    assert kinds == {True, False}
    # A side is uniform from 0 to all, and drawn with both its ends; half of them are ellipses.
    width, height = (
        np.mean([min(n // 2 * 2 + 1, n_all) for n in range(n_all + 1)]) for n_all in size
    )
    expected = (1 + np.pi / 4) / 2 * width * height / 96 / 64
    assert abs(np.mean(shares) - expected) < 0.02  # four times the mean's standard deviation


@pytest.mark.parametrize("view", [CENTRE, View(0, 0.5), View(0.25, 1, True)])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_mask_is_cut_as_its_image(view, scaled):
    """No pixel is scaled here, so the cut is one of whole pixels."""
    picture, size = photograph(1, (96, 64)).convert("L"), (64, 64) if scaled else (64, 48)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    grey = np.asarray(picture)
    left, top = (round((g - s) * w) for g, s, w in zip((96, 64), size, view[:2], strict=True))
    shown = grey[:, ::-1] if view.mirrored else grey
    expected = shown[top : top + size[1], left : left + size[0]] / 255 >= 0.5
    got = holes.of_mask(stream.getvalue(), (96, 64), size, view, scaled=scaled)
    np.testing.assert_array_equal(got, expected)


@pytest.fixture(scope="module")
def model(nano_model, tmp_path_factory) -> Path:
    """`nano_model` with a UNet of nine channels, of diffusers' pipeline for inpainting."""
    folder = tmp_path_factory.mktemp("inpainting") / "model"
    shutil.copytree(nano_model, folder)
    config: Any = TorchUNet.load_config(folder / "unet")
    config["in_channels"] = 9
    shutil.rmtree(folder / "unet")
    net: Any = TorchUNet.from_config(config)
    randomise(net, 0).save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionInpaintPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def recipe(model, tmp_path) -> Path:
    photos = photo_folder(tmp_path / "photos", 4)
    tree = {
        "_base_": ["configs/train/examples/fine-tuning.yaml"],
        "mixed_precision": "no",
        "export": {"webui": None, "diffusers": "fp32"},
        "train": {
            "train_steps": 2,
            "workers": 1,
            "scheduler": {"name": "constant", "num_warmup_steps": 0},
        },
        "model": {"pretrained_model_name_or_path": str(model)},
        "data": one_shape(photos, inpaint_mask="random"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_run_leaves_what_diffusers_opens(recipe, model, tmp_path):
    """Latents are cached, and masked images encoded in each step."""
    run = tmp_path / "run"
    assert train.main(["--config", str(recipe), f"exp_dir={run}"]) == 0
    assert (
        "inpaint_mask: 4 images, parts of which are painted anew" in (run / "plan.txt").read_text()
    )
    opened: Any = StableDiffusionInpaintPipeline.from_pretrained(
        run / "export/run", local_files_only=True
    )
    before: Any = TorchUNet.from_pretrained(model / "unet", local_files_only=True)
    trained = opened.unet.conv_in.weight - before.conv_in.weight
    assert all(trained[:, channels].abs().max() > 0 for channels in (slice(4), 4, slice(5, 9)))


def test_a_run_resumes_bit_for_bit(recipe, tmp_path):
    """Holes, and the latents of what is left, are drawn anew in each step."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    saved = ["--config", str(recipe), "train.save_step=1", "export=null"]
    assert train.main([*saved, f"exp_dir={whole}"]) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "state" / "2")
    (broken / "ckpts" / "unet-2.safetensors").unlink()
    assert train.main(["--resume", str(broken)]) == 0
    file = "ckpts/unet-2.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()
    assert (whole / file).read_bytes() != (whole / "ckpts/unet-1.safetensors").read_bytes()


def test_images_are_diffusers(model, tmp_path, monkeypatch):
    """Of pictures in the size of the images; the latents of what is left are drawn by the same
    numbers."""
    picture, grey = photograph(3, (WIDTH, HEIGHT)), np.zeros((HEIGHT, WIDTH), np.uint8)
    grey[8:40, 16:48], grey[:8, :8], grey[8:16, :8] = 255, 127, 128
    picture.save(tmp_path / "picture.png")
    Image.fromarray(grey).save(tmp_path / "mask.png")
    shape = (2, 4, HEIGHT // 8, WIDTH // 8)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.save(tmp_path / "noise.npy", noise)
    left = initial_noise([0, 1], HEIGHT // 8, WIDTH // 8, stream=LEFT)
    drawn: Any = torch.tensor(np.asarray(left).transpose(0, 3, 1, 2).copy())
    monkeypatch.setattr(torch_vae, "randn_tensor", lambda size, **_: drawn[: size[0]])
    pipeline: Any = StableDiffusionInpaintPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        ["a photo of"] * 2,
        [picture] * 2,
        [Image.fromarray(grey)] * 2,
        negative_prompt=["on"] * 2,
        latents=torch.from_numpy(noise),
        num_inference_steps=STEPS,
        width=WIDTH,
        height=HEIGHT,
    ).images
    given = [
        f"infer_args.latents={tmp_path / 'noise.npy'}",
        f"condition.image={tmp_path / 'picture.png'}",
        f"condition.mask={tmp_path / 'mask.png'}",
    ]
    found = generate(model, tmp_path / "out", *given)
    expected = np.stack([np.asarray(image).astype(int) for image in expected])
    assert expected.std() > 5  # a picture, not one colour
    assert np.abs(np.stack(found) - expected).max() <= 2
    info = yaml.safe_load((tmp_path / "out" / "0-0-info.yaml").read_text())
    assert info["condition"]["mask"] == str(tmp_path / "mask.png")
    for change, told in (
        ("condition.mask=null", r"condition\.mask: is needed by an inpainting model"),
        ("condition.type=i2i", r"condition\.type: not supported: no image to begin from"),
    ):
        with pytest.raises(UserError, match=told):
            generate(model, tmp_path / "no", *given, change)


def test_holes_are_other_ones_in_each_epoch_cached_or_not(recipe):
    made = plan.prepare(*configs.load(str(recipe)))
    (data,) = made.datasets
    seen = {data.batch(n)["inpaint_mask"].tobytes() for n in range(2 * data.num_batches)}
    assert len(seen) > data.num_batches
    np.testing.assert_array_equal(data.batch(3)["inpaint_mask"], data.batch(3)["inpaint_mask"])


def test_what_does_not_go_together_is_refused(recipe, nano_model, tmp_path):
    where = "data.dataset1.source"
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (64, 64)).save(masks / "0.png")
    first, other = f"{where}.data_source1", f"{where}.other"
    for overrides, told in (
        ([f"{first}.inpaint_mask=null"], r"data\.dataset1: .* set inpaint_mask"),
        (
            [f"model.pretrained_model_name_or_path={nano_model}"],
            r"data\.dataset1: inpaint_mask has no effect",
        ),
        ([f"{first}.inpaint_mask={masks}"], "1.jpg: no inpainting mask"),
        (
            [f"{other}.img_root={tmp_path / 'photos'}", f"{other}.prompt_template=null"],
            r"some of its sources have inpaint_mask",
        ),
        (
            ["controlnet=[{lr: 1e-5, layers: ['']}]"],
            "controlnet: .* is an inpainting model",
        ),
    ):
        with pytest.raises(UserError, match=told):
            plan.prepare(*configs.load(str(recipe), overrides))


def test_a_mask_of_a_folder_says_where_the_hole_is(tmp_path):
    photos, masks = photo_folder(tmp_path / "photos", 1), tmp_path / "masks"
    masks.mkdir()
    grey = np.zeros((64, 64), np.uint8)
    grey[8:24, 16:48] = 255
    Image.fromarray(grey).save(masks / "0.png")
    (record,) = source.index(photos, inpaint_mask=masks).records
    np.testing.assert_array_equal(source.hole(record, (64, 64), 7), grey == 255)
    (masks / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png.*it was there"):
        source.hole(record, (64, 64), 7)
