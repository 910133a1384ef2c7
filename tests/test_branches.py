"""LoRAs for prompts and others for negative prompts (DreamArtist++)."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.func import functional_call

from jaxft import assembly, low_rank, params, plan, records, selection, step, train
from jaxft import config as configs
from jaxft.diffusion import guidance, losses
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, lora
from jaxft.low_rank import LowRank
from jaxft.models.clip import CLIPTextModel
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import adapters
from jaxft.tuning.adapters import Adapter
from tests.data_fixtures import photo_folder
from tests.test_guided_words import PT1, SMALL, WORDS
from tests.test_sample import HEIGHT, STEPS, WIDTH, generate
from tests.test_step import TEXT, UNET, Setup

EXAMPLE = "configs/train/examples/DreamArtist++.yaml"
RANK = 2
CHOSEN = {"unet": (".to_k", ".proj_in", "conv_out"), "text_encoder": (".fc1",)}


class Branches(Setup):
    """Both systems, with LoRAs beside the networks that answer prompts, and beside a layer less of
    those that answer negative ones."""

    def __init__(self):
        super().__init__()
        rng, networks = np.random.default_rng(5), {}
        frozen = {**self.frozen, "unet": self.trainable["unet"]}
        self.trainable: dict[str, Any] = {}
        for name, build in (
            ("unet", lambda: UNet2DConditionModel(UNET)),
            ("text_encoder", lambda: CLIPTextModel(TEXT)),
        ):
            modules = [
                weight.removesuffix(".weight")
                for weight in frozen[name]
                if weight.removesuffix(".weight").endswith(CHOSEN[name])
            ]
            for network, own in ((name, modules), (f"negative_{name}", modules[1:])):
                made = {
                    m: [Adapter("g", frozen[name][f"{m}.weight"].shape, RANK, 1.0, 0.0)]
                    for m in own
                }
                networks[network], _ = params.abstract(
                    lambda b=build, a=made: adapters.attach(b(), a)
                )
                self.trainable[f"lora_{network}"] = {
                    factor: rng.standard_normal(shape).astype(np.float32) * 0.3
                    for factor, shape in adapters.shapes(made).items()
                }
        self.frozen = frozen
        scales = guidance.scales("1.0-4.0:cos", 1000)
        self.objective = self.objective._replace(
            networks=networks, loss=losses.PLAIN._replace(guidance=scales)
        )

    def merged(self, network: str, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights W + 1/2 · up · down, under PyTorch's names."""
        own: Any = getattr(self, {"unet": "unet", "text_encoder": "text"}[network])
        weights = dict(own.named_parameters())
        for name in [name for name in factors if name.endswith(".lora.0.down")]:
            module = name.removesuffix(".lora.0.down")
            target = f"{module.removeprefix('text_model.')}.weight"
            delta = factors[f"{module}.lora.0.up"].flatten(1) @ factors[name].flatten(1)
            weights[target] = weights[target] + delta.reshape(weights[target].shape) / RANK
        return weights


def test_loss_and_gradients_are_those_of_two_merged_models_under_guidance():
    setup = Branches()
    batch = setup.batch(0) | {"negative_input_ids": setup.batch(1)["input_ids"]}
    ours, gradients = jax.jit(
        jax.value_and_grad(lambda t, f, b: step.loss(setup.objective, t, f, b, setup.key))
    )(setup.trainable, setup.frozen, batch)

    _, noise, times, noisy = setup.noised(batch, step.draw(setup.key, (4, 4, 6, 4), 1000))
    leaves = {
        part: {name: torch.tensor(value, requires_grad=True) for name, value in own.items()}
        for part, own in setup.trainable.items()
    }
    predicted = []
    for side, ids in (("negative_", batch["negative_input_ids"]), ("", batch["input_ids"])):
        unet, text = (
            setup.merged(name, leaves[f"lora_{side}{name}"]) for name in ("unet", "text_encoder")
        )
        states = functional_call(setup.text, text, (torch.tensor(ids[:, 0]).long(),))[0]
        predicted.append(functional_call(setup.unet, unet, (noisy, times, states)).sample)
    scales: Any = setup.objective.loss.guidance
    scale = torch.tensor(scales[times.numpy()][:, None, None, None])
    theirs = torch.nn.functional.mse_loss(
        predicted[0] + scale * (predicted[1] - predicted[0]), noise
    )
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    for part, own in leaves.items():
        for name, leaf in own.items():
            wanted: Any = leaf.grad
            wanted = wanted.numpy()
            error = np.linalg.norm(gradients[part][name] - wanted) / np.linalg.norm(wanted)
            assert error < 2e-5, f"{part}: {name}: {error}"  # float32, through two networks


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def overrides(nano_model, tmp_path_factory) -> list[str]:
    photos = photo_folder(tmp_path_factory.mktemp("photos"), 4)
    return [
        *SMALL,
        f"model.pretrained_model_name_or_path={nano_model}",
        f"tokenizer_pt.emb_dir={photos}",
        f"data.dataset1.source.data_source1.img_root={photos}",
        "data.dataset1.batch_size=1",
        "train.save_step=1",
        "export.lora=fp32",
    ]


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = ["--config", EXAMPLE, f"exp_dir={folder}", *overrides, "train.train_steps=2"]
    assert train.main(argv) == 0
    return folder


FILES = ("unet", "unet-neg", "text_encoder", "text_encoder-neg")


def test_each_branch_has_files_of_its_own(run, nano_model):
    """HCP-Diffusion's in `ckpts/`; in `export/` kohya's, of the same factors."""
    names = {f"{name}-{number}.safetensors" for name in (*FILES, *WORDS) for number in (1, 2)}
    assert {path.name for path in (run / "ckpts").iterdir()} == names
    exported = {f"run-lora{end}.safetensors" for end in ("", "-neg")}
    assert {path.name for path in (run / "export").iterdir()} == exported | {
        f"{word}.safetensors" for word in WORDS
    }
    assert "for negative prompts alone" in (run / "plan.txt").read_text()
    configs_of = diffusers_folder.read_configs(nano_model)
    for end in ("", "-neg"):
        kohya = lora.read(run / "export" / f"run-lora{end}.safetensors", configs_of)
        for network in ("unet", "text_encoder"):
            file = run / "ckpts" / f"{network}{end}-2.safetensors"
            theirs: Any = kohya[network]
            ours: Any = lora.read(file, configs_of)[network]
            for module, low in ours.items():
                assert np.any(low.up), module
                np.testing.assert_array_equal(theirs[module].up, low.up)
                np.testing.assert_array_equal(theirs[module].down, low.down)


def test_the_branches_are_resumed_bit_for_bit(run, tmp_path):
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "state" / "2")
    files = [path for path in (again / "ckpts").iterdir() if path.stem.endswith("-2")]
    for path in files:
        path.unlink()
    assert train.main(["--resume", str(again), "export=null"]) == 0
    for path in files:
        assert path.read_bytes() == (run / "ckpts" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["lora_unet.0.branch=null"], r"lora_unet\.0\.branch: other groups of lora_unet have one"),
        (["lora_unet.1.svd_init=true"], r"lora_unet\.1\.svd_init: .* leave it out, or the branch"),
        (["lora_unet.0.branch=x"], r"lora_unet\.0\.branch"),
        (
            ["train.cfg_scale='1.0'", f"{PT1}={' '.join(WORDS)}"],
            "lora_unet: branch tells LoRAs .* set train.cfg_scale",
        ),
    ],
)
def test_branches_without_sense_are_named(overrides, changes, told):
    with pytest.raises(UserError, match=told):
        plan.prepare(*configs.load(EXAMPLE, [*overrides, *changes]))


def test_a_warm_start_does_not_guess_a_branch(overrides, run):
    file = run / "ckpts" / "unet-neg-2.safetensors"
    with pytest.raises(UserError, match=r"train\.warm_start: a file does not say of which branch"):
        plan.prepare(*configs.load(EXAMPLE, [*overrides, f"train.warm_start.unet=[{file}]"]))


def test_a_branch_alone_leaves_the_other_prompts_to_the_network_as_it_is(overrides):
    made = plan.prepare(
        *configs.load(EXAMPLE, [*overrides, "lora_unet.1=---", "lora_text_encoder=null"])
    )
    (unet, negative) = (made.selection.adapters[n] for n in ("unet", "negative_unet"))
    assert unet
    assert not negative
    assert made.selection.adapters.keys() == {"unet", "negative_unet"}
    assert selection.has_branches(made.selection)


def test_of_xl_both_text_encoders_have_branches(overrides, folders):
    """Traced only: the loss asks both sides; files are named as in HCP-Diffusion."""
    model = f"model.pretrained_model_name_or_path={folders('sdxl')[1]}"
    made = plan.prepare(*configs.load(EXAMPLE, [*overrides, model]))
    run, begun = assembly.outline(made), assembly.initial(made)
    encoders = ("text_encoder", "text_encoder_2")
    assert {f"negative_{n}" for n in ("unet", *encoders)} < run.objective.networks.keys()
    (batch,) = assembly.one_of_each_shape(run.plan.datasets[0])
    shapes = assembly.initial_shapes(made)
    found = jax.eval_shape(
        lambda t, f, b: step.loss(run.objective, t, f, b, jax.random.key(0)),
        *(shapes, run.frozen, batch),
    )
    assert found.shape == ()
    files = records.parts_of(made, begun, {})
    assert files.keys() == {*FILES}
    for end in ("", "-neg"):
        names = files[f"text_encoder{end}"]["lora"]
        assert {name.split(".")[0] for name in names} == {"clip_B", "clip_bigG"}


# ---------------------------------------------------------------------------------------- sampling


def some_lora(model: diffusers_folder.Model, seed: int, keys: tuple[str, ...]) -> dict[str, Any]:
    rng, made = np.random.default_rng(seed), {}
    for network in ("unet", "text_encoder"):
        for name, weight in model.parts[network].params.items():
            module = name.removesuffix(".weight")
            if name != module and module.endswith(keys):
                down, up = (
                    rng.standard_normal(shape).astype(np.float32) * 0.3
                    for shape in ((RANK, weight.shape[1]), (weight.shape[0], RANK))
                )
                made.setdefault(network, {})[module] = LowRank(down, up, 1.0)
    return made


def test_images_are_those_of_two_merged_models_under_guidance(nano_model, tmp_path):
    """diffusers' pipeline with two UNets and two text encoders, each for a half of the batch."""
    model = diffusers_folder.read(str(nano_model))
    pipelines = {}
    for side, seed, ending in (("p", 1, ""), ("n", 2, "-neg")):
        own = some_lora(model, seed, (".to_k", ".fc1"))
        named = {n if side == "p" else f"negative_{n}": layers for n, layers in own.items()}
        lora.write_hcp(tmp_path / "ckpts", named)
        pipe: Any = StableDiffusionPipeline.from_pretrained(nano_model, local_files_only=True)
        for network, layers in own.items():
            weights = low_rank.merge(model.parts[network].params, layers, 0.5)
            state = {
                name if network == "unet" else name.removeprefix("text_model."): torch.tensor(value)
                for name, value in weights.items()
            }
            getattr(pipe, network).load_state_dict(state)
        pipelines[side] = pipe
        for name in own:
            file = tmp_path / "ckpts" / f"{name}{ending}.safetensors"
            file.rename(file.with_stem(f"{file.stem}-7"))
    noise = np.random.default_rng(0).normal(size=(2, 4, HEIGHT // 8, WIDTH // 8))
    np.save(tmp_path / "noise.npy", noise.astype(np.float32))
    negative, positive = pipelines["n"], pipelines["p"]
    states, _ = positive.encode_prompt(["a photo of"] * 2, "cpu", 1, False)
    against, _ = negative.encode_prompt(["on"] * 2, "cpu", 1, False)
    answer, other = positive.unet.forward, negative.unet

    def both(sample, timestep, encoder_hidden_states, **options):
        halves = zip(sample.chunk(2), encoder_hidden_states.chunk(2), strict=True)
        (x, states_n), (y, states_p) = halves
        first = other(x, timestep, encoder_hidden_states=states_n, return_dict=False)[0]
        second = answer(y, timestep, encoder_hidden_states=states_p, return_dict=False)[0]
        return (torch.cat([first, second]),)

    positive.unet.forward = both
    positive.set_progress_bar_config(disable=True)
    images = positive(
        prompt_embeds=states,
        negative_prompt_embeds=against,
        latents=torch.from_numpy(np.load(tmp_path / "noise.npy")),
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
    ).images
    expected = np.stack([np.asarray(image).astype(int) for image in images])
    given = [f"exp_dir={tmp_path}", "step=7", "alpha=0.5", "alpha_neg=0.5"]
    given += [f"infer_args.latents={tmp_path / 'noise.npy'}", "infer_args.guidance_scale=3"]
    found = generate(nano_model, tmp_path / "out", *given, config="t2i_dreamartist++")
    assert expected.std() > 5  # a picture, not one colour
    assert np.abs(np.stack(found) - expected).max() <= 2


def test_a_model_is_not_saved_with_branches(nano_model, tmp_path):
    model = diffusers_folder.read(str(nano_model))
    lora.write_hcp(tmp_path, some_lora(model, 0, (".to_k",)))
    item = f"{{path: {tmp_path / 'unet.safetensors'}, branch: p}}"
    with pytest.raises(UserError, match=r"save_model\.path: a model has one set of weights"):
        generate(
            nano_model,
            tmp_path,
            f"merge={{unet: {{lora: [{item}]}}}}",
            f"save_model.path={tmp_path / 'saved'}",
        )
