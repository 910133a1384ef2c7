"""A ControlNet is trained as diffusers' script trains it, and diffusers opens what is left."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetModel as TorchControlNet
from diffusers import StableDiffusionControlNetPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from PIL import Image

from jaxft import assembly, controls, params, plan, records, sample, step, tensor_file, train
from jaxft import config as configs
from jaxft.diffusion import schedule
from jaxft.errors import UserError
from jaxft.formats import controlnet, diffusers_folder, hcp
from jaxft.models.controlnet import ControlNetModel
from jaxft.models.unet import UNet2DConditionModel
from tests.data_fixtures import one_shape, photo_folder, photograph
from tests.test_formats import same_bits
from tests.test_sample import HEIGHT, STEPS, WIDTH, generate
from tests.test_step import SCHEDULER, UNET, Setup
from tests.weights import randomise

XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
    "use_linear_projection": True,
}


def channels_first(x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("more", [{}, XL], ids=["sd1", "sdxl"])
def test_loss_and_gradients_are_those_of_diffusers_networks(more, rng):
    """All weights are random: as a ControlNet begins, with zeros, most gradients would be none."""
    unet: Any = randomise(TorchUNet(**UNET, **more), 0)
    net: Any = TorchControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    randomise(net, 1)
    nets = {
        "unet": params.abstract(lambda: UNet2DConditionModel({**UNET, **more}))[0],
        "controlnet": params.abstract(lambda: ControlNetModel(dict(net.config)))[0],
    }
    noising = schedule.from_config(SCHEDULER | {"prediction_type": "epsilon"})
    objective = step.Objective(nets, noising, 0.18215, jnp.float32)
    own, fixed = (
        {name: jnp.asarray(value.numpy().copy()) for name, value in part.state_dict().items()}
        for part in (net, unet)
    )
    states = rng.standard_normal((2, 7, 16)).astype(np.float32)
    batch = {
        "encoder_hidden_states": states,
        "weight": np.ones(2, np.float32),
        "moments": rng.standard_normal((2, 4, 6, 8)).astype(np.float32),
        "conditioning_pixel_values": rng.integers(0, 256, (2, 32, 48, 3)).astype(np.uint8),
    }
    added: dict[str, Any] = {}
    if more:
        batch["pooled_text_embeds"] = rng.standard_normal((2, 8)).astype(np.float32)
        batch["time_ids"] = rng.uniform(0, 99, (2, 6)).astype(np.float32)
        added["text_embeds"] = torch.tensor(batch["pooled_text_embeds"])
        added["time_ids"] = torch.tensor(batch["time_ids"])
    key = jax.random.key(3)
    ours, gradients = jax.jit(
        jax.value_and_grad(
            lambda c, u, b: step.loss(objective, {"controlnet": c}, {"unet": u}, b, key)
        )
    )(own, fixed, batch)

    _, noise, times, noisy = Setup().noised(batch, step.draw(key, (2, 4, 6, 4), 1000))
    text = torch.tensor(states)
    seen = channels_first(batch["conditioning_pixel_values"]).float() / 255  # as ToTensor has it
    down, mid = net(
        noisy, times, text, controlnet_cond=seen, added_cond_kwargs=added, return_dict=False
    )
    predicted = unet(
        noisy,
        times,
        text,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    theirs = torch.nn.functional.mse_loss(predicted, noise)
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    for name, weight in net.named_parameters():
        wanted = weight.grad.numpy()
        error = np.linalg.norm(gradients[name] - wanted) / np.linalg.norm(wanted)
        assert error < 1e-5, f"{name}: {error}"


def weights(net: TorchControlNet) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in net.named_parameters()}


def plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_new_one_is_diffusers_copy_of_the_unet(folders, kind):
    """The copied weights and the zeros are the same; the others are drawn as PyTorch does."""
    pipeline, folder = folders(kind)
    made = controlnet.from_unet(diffusers_folder.read(str(folder)).parts["unet"], 0)
    torch.manual_seed(0)
    theirs = TorchControlNet.from_unet(pipeline.unet)
    wanted = weights(theirs)
    drawn = {name for name, value in wanted.items() if "cond_embedding" in name and value.any()}
    assert len(drawn) == 14
    assert made.params.keys() == wanted.keys()
    for name, value in wanted.items():
        if name not in drawn:
            np.testing.assert_array_equal(made.params[name], value, err_msg=name)
            continue
        assert np.abs(made.params[name]).max() <= np.abs(value).max() * 1.3, name
        if value.size > 2000:
            np.testing.assert_allclose(made.params[name].std(), value.std(), rtol=0.05)
    opened: Any = TorchControlNet.from_config(made.config)
    for key, value in theirs.config.items():
        assert key[0] == "_" or plain(opened.config[key]) == plain(value), key


@pytest.fixture(scope="module")
def recipe(nano_model, tmp_path_factory) -> Path:
    """A configuration of four steps on photographs of one shape; each is seen as it is."""
    folder = tmp_path_factory.mktemp("recipe")
    photos = photo_folder(folder / "photos", 4)
    seen = photo_folder(folder / "seen", 4, captions=False)
    tree = {
        "_base_": ["configs/train/examples/controlnet.yaml"],
        "mixed_precision": "no",
        "controlnet": [{"lr": 1e-2, "layers": [""]}],
        "export": {"webui": "fp32", "diffusers": "fp32"},
        "train": {
            "train_steps": 4,
            "save_step": 2,
            "log_step": 1,
            "workers": 1,
            "scheduler": {"name": "constant", "num_warmup_steps": 0},
        },
        "model": {"pretrained_model_name_or_path": str(nano_model)},
        "data": one_shape(photos, cond_dir=str(seen)),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_run_ends_as_if_it_had_not_been_stopped_and_leaves_what_diffusers_opens(
    recipe, nano_model, tmp_path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shown = recipe.parent / "infer.yaml"
    shown.write_text(
        yaml.safe_dump(
            {
                "_base_": ["configs/infer/preview.yaml"],
                "prompt": "a photo",
                "bs": 2,
                "seed": 3,
                "dtype": "fp32",
                "ex_input": {"cond": {"image": str(recipe.parent / "seen" / "1.jpg")}},
                "infer_args": {"width": 64, "height": 48, "num_inference_steps": 2},
            }
        )
    )
    preview = f"previewer.infer_cfg={shown}"
    assert train.main(["--config", str(recipe), f"exp_dir={whole}", preview]) == 0
    half = ["--config", str(recipe), f"exp_dir={broken}", "train.train_steps=2"]
    assert train.main(half) == 0
    assert train.main(["--resume", str(broken), "train.train_steps=4"]) == 0
    last = "ckpts/controlnet-4.safetensors"
    trained = hcp.read_part(whole / last)
    assert same_bits(hcp.read_part(broken / last), trained)
    assert [path.name for path in sorted((whole / "ckpts").iterdir())] == [
        "controlnet-2.safetensors",
        "controlnet-4.safetensors",
    ]
    begun = controlnet.from_unet(
        diffusers_folder.read(str(nano_model)).parts["unet"], configs.load(str(recipe))[0].seed
    )
    moved = [name for name in trained if not np.array_equal(trained[name], begun.params[name])]
    assert "controlnet_mid_block.weight" in moved
    assert "controlnet_cond_embedding.conv_in.weight" in moved
    folder, file = (
        whole / "export" / f"{whole.name}-controlnet{end}" for end in ("", ".safetensors")
    )
    for opened in (
        TorchControlNet.from_pretrained(folder, local_files_only=True),
        TorchControlNet.from_single_file(str(file), config=str(folder), local_files_only=True),
    ):
        assert same_bits(weights(opened), trained)
    assert {path.name for path in (whole / "export").iterdir()} == {folder.name, file.name}
    assert tensor_file.read_header(file).metadata["ss_steps"] == "4"
    given = [f"pretrained_model={nano_model}", f"controlnet={whole / last}"]
    config, _ = configs.load(str(shown), given, "infer")
    images = sample.paint(sample.make_requests(config), sample.load_model(config), config)
    wanted = np.concatenate([pixels for pixels, _ in images], axis=1).astype(int)
    painted = {n: np.asarray(Image.open(whole / f"preview/{n}.png")).astype(int) for n in (0, 4)}
    assert np.abs(painted[4] - wanted).max() <= 1  # a program of another structure
    assert np.abs(painted[4] - painted[0]).max() > 2
    for place in (folder, file, whole / last):  # any of them is trained on
        model = plan.prepare(*configs.load(str(recipe), [f"model.controlnet={place}"])).model
        assert same_bits(model.parts[controls.PART].params, trained)


def test_what_does_not_go_together_is_refused(recipe, folders, tmp_path):
    source, seen = "data.dataset1.source.data_source1", tmp_path / "xl"
    unet = diffusers_folder.read(str(folders("sdxl")[1])).parts["unet"]
    controlnet.write_folder(seen, controlnet.from_unet(unet, 0))
    for overrides, told in (
        ([f"{source}.cond_dir=null"], r"data\.dataset1: the ControlNet .* name their folder"),
        (
            ["controlnet=null", "unet=[{lr: 1e-5, layers: ['']}]"],
            r"data\.dataset1: its conditioning images have no effect",
        ),
        (
            ["controlnet=null", f"model.controlnet={seen}"],
            r"model\.controlnet: .* no group trains it",
        ),
        ([f"model.controlnet={seen}"], r"model\.controlnet: .* its block_out_channels is"),
        ([f"model.controlnet={tmp_path / 'none'}"], r"model\.controlnet: .*none"),
        (
            ["previewer.infer_cfg=configs/infer/preview.yaml"],
            r"previewer\.infer_cfg: .* ex_input\.cond\.image: is needed by a ControlNet",
        ),
    ):
        with pytest.raises(UserError, match=told):
            plan.prepare(*configs.load(str(recipe), overrides))


def test_hcp_diffusions_plugin_is_a_group_of_all_layers(write):
    file = write("own.yaml", "_base_: [cfgs/plugins/plugin_controlnet.yaml]")
    needed = "model.pretrained_model_name_or_path=m"
    (group,) = configs.load(file, [needed])[0].controlnet.values()
    assert (group.lr, group.layers) == (1e-4, ("",))
    plugin = "plugin_unet.controlnet1"
    for override, told in (
        (f"{plugin}.from_layers=[conv_in]", "a ControlNet is a copy of all"),
        (f"{plugin}._target_=lycoris.hcp.LokrBlock.wrap_model", "no plugins but"),
    ):
        with pytest.raises(UserError, match=told):
            configs.load(file, [needed, override])


def test_one_of_xl_is_exported_under_diffusers_names_for_webuis_too(recipe, folders, tmp_path):
    made = plan.prepare(
        *configs.load(str(recipe), [f"model.pretrained_model_name_or_path={folders('sdxl')[1]}"])
    )
    trained = assembly.initial(made)
    file, folder = records.export(made, trained, {}, tmp_path / "run")
    assert (file.name, folder.name) == ("run-controlnet.safetensors", "run-controlnet")
    opened: Any = TorchControlNet.from_pretrained(folder, local_files_only=True)
    assert opened.config.addition_embed_type == "text_time"
    for found in (weights(opened), tensor_file.read(file)):
        assert same_bits(found, trained[controls.PART])


# ---------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def control(nano_model, tmp_path_factory) -> Path:
    """A ControlNet of random weights for `nano_model`."""
    folder = tmp_path_factory.mktemp("control") / "net"
    unet: Any = TorchUNet.from_pretrained(nano_model / "unet", local_files_only=True)
    net: Any = TorchControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    randomise(net, 8).save_pretrained(folder)
    return folder


def test_images_with_one_are_diffusers(nano_model, control, tmp_path):
    seen = photograph(2, (WIDTH, HEIGHT))
    seen.save(tmp_path / "seen.png")
    noise = np.random.default_rng(0).standard_normal((2, 4, HEIGHT // 8, WIDTH // 8), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    net: Any = TorchControlNet.from_pretrained(control, local_files_only=True)
    pipeline: Any = StableDiffusionControlNetPipeline.from_pretrained(
        nano_model, controlnet=net, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        ["a photo of"] * 2,
        seen,
        negative_prompt=["on"] * 2,
        latents=torch.from_numpy(noise),
        num_inference_steps=STEPS,
        controlnet_conditioning_scale=0.7,
    ).images
    given = [f"infer_args.latents={tmp_path / 'noise.npy'}", f"controlnet={control}"]
    given += [f"ex_input.cond.image={tmp_path / 'seen.png'}"]
    weak = "infer_args.controlnet_conditioning_scale=0.7"
    found = generate(nano_model, tmp_path / "weak", *given, weak)
    expected = np.stack([np.asarray(image).astype(int) for image in expected])
    assert expected.std() > 5  # a picture, not one colour
    assert np.abs(np.stack(found) - expected).max() <= 2
    other = generate(nano_model, tmp_path / "whole", *given)
    assert np.abs(np.stack(other) - expected).max() > 20


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["ex_input.cond.image=null"], r"ex_input\.cond\.image: is needed by a ControlNet"),
        (["controlnet=null"], r"ex_input\.cond\.image: has no effect without a ControlNet"),
        (
            ["controlnet=null", "infer_args.controlnet_conditioning_scale=2"],
            r"controlnet_conditioning_scale: has no effect",
        ),
        (["ex_input.cond.image=no.png"], r"ex_input\.cond\.image: no\.png: No such file"),
        (["ex_input.cond.image=[a.png]"], r"ex_input\.cond\.image: a list needs one entry"),
        (["ex_input.cond.image=README.md"], r"README\.md: not an image"),
        (["condition.image=a.png"], r"condition\.image: has no effect without an inpainting model"),
        (["save_model.path=model"], "controlnet: is no part of a model that is saved"),
    ],
)
def test_mistakes_are_named(nano_model, control, tmp_path, changes, told):
    photograph(2, (WIDTH, HEIGHT)).save(tmp_path / "seen.png")
    given = [f"controlnet={control}", f"ex_input.cond.image={tmp_path / 'seen.png'}"]
    with pytest.raises(UserError, match=told):
        generate(nano_model, tmp_path / "out", *given, *changes)


def test_one_that_lacks_weights_is_not_sampled_with(nano_model, tmp_path):
    hcp.write_part(tmp_path / "controlnet-1.safetensors", {"conv_in.bias": np.zeros(16)})
    photograph(2, (WIDTH, HEIGHT)).save(tmp_path / "seen.png")
    given = [f"controlnet={tmp_path / 'controlnet-1.safetensors'}"]
    with pytest.raises(UserError, match=r"(?s)controlnet: .* 127 missing"):
        generate(
            nano_model, tmp_path / "out", *given, f"ex_input.cond.image={tmp_path / 'seen.png'}"
        )


def test_the_one_that_hcp_diffusion_merges_is_taken(write):
    plugin = "{type: unet, plugin: {controlnet1: {path: ckpts/c.safetensors, layers: all}}}"
    file = write("own.yaml", f"merge: {{plugin_cfg: cfgs/plugins/x.yaml, group1: {plugin}}}")
    processor = "hcpdiff.data.data_processor.ControlNetProcessor"
    given = [
        "pretrained_model=m",
        f"ex_input={{cond: {{_target_: {processor}, image: cond_img.png}}}}",
    ]
    config, _ = configs.load(file, given, "infer")
    assert (config.controlnet, config.ex_input.cond.image) == (
        "ckpts/c.safetensors",
        "cond_img.png",
    )
    with pytest.raises(UserError, match=r"merge\.group1\.plugin\.controlnet1: .*no plugins"):
        configs.load(file, [*given, "merge.plugin_cfg=null"], "infer")
