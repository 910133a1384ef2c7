"""The sampling program: diffusers' images from the same noise, and the files it writes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from jaxft import cli, gallery, sample
from jaxft.data.prompt_weights import WeightedTokenizer, parse
from jaxft.diffusion.conditioning import encode_text, weigh
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, hcp
from jaxft.models.clip import CLIPTextModel
from jaxft.params import abstract, bind

SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH, HEIGHT, STEPS = 64, 48, 4
THEIRS = {
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
}


def generate(model: Path, out: Path, *overrides: str, config: str = "text2img") -> list[np.ndarray]:
    """Runs the program; the images in the order of their numbers."""
    arguments = {
        "pretrained_model": model,
        "save.out_dir": out,
        "prompt": "a photo of",
        "neg_prompt": "on",
        "infer_args.width": WIDTH,
        "infer_args.height": HEIGHT,
        "infer_args.num_inference_steps": STEPS,
        "dtype": "fp32",
        "bs": 2,
        "seed": 0,
    }
    given_first = [f"{key}={value}" for key, value in arguments.items()]
    argv = ["--config", f"configs/infer/{config}.yaml", *given_first, *overrides]
    assert sample.main(argv) == 0
    paths = sorted(out.glob("*.png"), key=lambda path: int(path.name.split("-")[0]))
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


def theirs(pipeline, scheduler, noise: np.ndarray, prompt: str, guidance: float) -> np.ndarray:
    """diffusers' images [b, h, w, 3] from the same noise."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    try:
        images = pipeline(
            [prompt] * len(noise),
            negative_prompt=["on"] * len(noise),
            latents=torch.from_numpy(noise),
            width=WIDTH,
            height=HEIGHT,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
        ).images
    finally:
        pipeline.scheduler = own
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise.npy"
    shape = (2, 4, HEIGHT // 8, WIDTH // 8)
    np.save(path, np.random.default_rng(0).normal(size=shape).astype(np.float32))
    return path


@pytest.mark.parametrize(
    ("name", "options", "guidance"),
    [
        (None, {}, 7.5),  # the model's own
        (None, {}, 1.0),
        (None, {}, 0.0),
        ("EulerDiscreteScheduler", {}, 7.5),
        ("DPMSolverMultistepScheduler", {}, 7.5),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 7.5),
    ],
)
def test_images_are_diffusers(tiny_model, tiny_pipeline, noise, tmp_path, name, options, guidance):
    options = {**SD1, **options}
    scheduler = THEIRS[name](**options) if name else tiny_pipeline.scheduler
    prompt = "on" if guidance == 0 else "a photo of"  # scale 0: the negative prompt alone
    expected = theirs(tiny_pipeline, scheduler, np.load(noise), prompt, guidance or 1.0)
    component = json.dumps({"_target_": f"diffusers.{name}", **options}) if name else "null"
    found = generate(
        tiny_model,
        tmp_path,
        f"new_components.scheduler={component}",
        f"infer_args.latents={noise}",
        f"infer_args.guidance_scale={guidance}",
    )
    assert expected.std() > 5  # a picture, not one colour
    assert np.abs(np.stack(found) - expected).max() <= 2


def test_half_precision_is_near(tiny_model, tiny_pipeline, noise, tmp_path):
    scheduler = tiny_pipeline.scheduler
    expected = theirs(tiny_pipeline, scheduler, np.load(noise), "a photo of", 1.0)
    options = ["infer_args.guidance_scale=1", "dtype=fp16", "amp=false"]
    found = generate(tiny_model, tmp_path, f"infer_args.latents={noise}", *options)
    # fp16 has 11 bits; each step's rounding is carried on by the next.
    assert np.abs(np.stack(found) - expected).mean() <= 1


def test_an_image_is_made_by_its_seed(tiny_model, tmp_path):
    zero, one = generate(tiny_model, tmp_path / "a", "seed=0")
    one_again, zero_again = generate(tiny_model, tmp_path / "b", "seed=[1,0]")
    np.testing.assert_array_equal(zero, zero_again)
    np.testing.assert_array_equal(one, one_again)
    assert np.abs(zero - one).max() > 20


def test_five_images_on_four_devices_are_those_of_one(tiny_model, tmp_path, monkeypatch):
    """Each device makes one at a time; of the second four, one is wanted."""
    together = generate(tiny_model, tmp_path / "a", "bs=1", "num=5")
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: devices[:1])
    alone = generate(tiny_model, tmp_path / "b", "bs=1", "num=5")
    assert len(together) == len(alone) == 5
    assert len(devices) == 4
    assert np.abs(np.stack(together) - np.stack(alone)).max() <= 1  # sums in another order
    assert np.abs(together[4] - together[3]).max() > 20


def test_info_file_makes_the_image_again_alone(tiny_model, tmp_path):
    images = generate(tiny_model, tmp_path / "a", "seed=5")
    info = next((tmp_path / "a").glob("1-6-info.yaml"))
    assert sample.main(["--cfg", str(info), f"save.out_dir={tmp_path / 'b'}"]) == 0
    again = np.asarray(Image.open(next((tmp_path / "b").glob("0-6-*.png")))).astype(int)
    assert np.abs(again - images[1]).max() <= 1  # a batch of another size rounds otherwise


def test_files_carry_their_settings(tiny_model, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "7-3-other.png")
    (tmp_path / "99 notes.txt").touch()
    generate(tiny_model, tmp_path, "seed=null", "prompt=[a photo/../of, of]")
    first = next(tmp_path.glob("8-*.png"))
    assert first.name.endswith("-a photo_.._of.png")
    assert len(list(tmp_path.iterdir())) == 2 + 2 * 2
    with Image.open(first) as image:
        text = image.info["parameters"]
        tree = json.loads(image.info["jaxft"])
    seed = first.name.split("-")[1]
    assert text.startswith("a photo/../of\nNegative prompt: on\nSteps: 4, Sampler: DDIM, ")
    assert f"CFG scale: 7.5, Seed: {seed}, Size: 64x48, Model: tiny" in text
    info = yaml.safe_load((tmp_path / f"8-{seed}-info.yaml").read_text())
    assert info == tree
    assert (info["seed"], info["prompt"], info["bs"]) == (int(seed), "a photo/../of", 1)


@pytest.mark.parametrize("image_type", ["png", "jpg", "webp"])
def test_image_files_hold_the_pixels(tmp_path, image_type):
    pixels = np.full((HEIGHT, WIDTH, 3), (200, 100, 50), np.uint8)
    path = tmp_path / f"0-0-x.{image_type}"
    gallery.write_image(path, pixels, {"key": "ä"}, quality=95)
    with Image.open(path) as image:
        difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels)
        assert image_type != "png" or image.info["key"] == "ä"
    assert difference.max() <= (0 if image_type == "png" else 4)
    assert list(tmp_path.iterdir()) == [path]


def test_merged_part_replaces_weights_and_is_saved(tiny_model, tmp_path):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    model = diffusers_folder.read(str(tiny_model))
    name = "conv_out.weight"
    part = {name: model.parts["unet"].params[name] + 1}
    hcp.write_part(tmp_path / "unet-1.safetensors", part)
    arguments = [
        "--cfg=cfgs/infer/t2i_part.yaml",
        f"pretrained_model={tiny_model}",
        f"part_path={tmp_path / 'unet-1.safetensors'}",
        f"save_model.path={tmp_path / 'merged'}",
        "save_model.dtype=fp32",
    ]
    assert sample.main(arguments) == 0
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged").unet.state_dict()
    np.testing.assert_array_equal(merged[name], part[name])
    np.testing.assert_array_equal(
        merged["conv_in.weight"], model.parts["unet"].params["conv_in.weight"]
    )
    assert not (tmp_path / "output").exists()


def test_components_are_replaced(tiny_model, tiny_pipeline, tmp_path):
    tiny_pipeline.vae.save_pretrained(tmp_path / "any" / "vae")
    vae = {
        "_target_": "diffusers.AutoencoderKL.from_pretrained",
        "pretrained_model_name_or_path": str(tmp_path / "any"),
        "subfolder": "vae",
    }
    model = diffusers_folder.read(str(tiny_model))
    model = model._replace(scheduler={"prediction_type": "v_prediction"})
    model = model.replace(vae=model.parts["unet"])
    new = ConfigDict({"vae": vae, "scheduler": {"_target_": "diffusers.DDIMScheduler"}})
    replaced = sample.replace_components(model, new)
    # Which the network predicts is the model's, whatever the sampler.
    expected = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    assert replaced.scheduler == expected
    theirs = tiny_pipeline.vae.state_dict()
    assert replaced.parts["vae"].params.keys() == theirs.keys()
    assert all(np.array_equal(replaced.parts["vae"].params[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["infer_args.width=60"], "infer_args.width"),
        (["infer_args.num_inference_steps=0"], "num_inference_steps"),
        (["seed=[1,2,3]"], "seed"),
        (["seed=-1"], "seed"),
        (["prompt=[a]"], "prompt"),
        (["bs=0"], "bs"),
        (["prompt=a {photo"], "{"),
        (["infer_args.latents=nowhere.npy"], "nowhere.npy"),
        (["part_path=x.safetensors"], "t2i_part.yaml"),
        (["pretrained_model=nowhere"], "nowhere"),
        (["new_components.scheduler={_target_: diffusers.LCMScheduler}"], "EulerDiscrete"),
        (["new_components.scheduler={_target_: diffusers.DDIMScheduler, eta: 1}"], "eta"),
        (["new_components.vae={_target_: VQModel}"], "AutoencoderKL"),
        (["save_model.path=x.ckpt"], "to-webui"),
    ],
)
def test_mistakes_are_named(tiny_model, tmp_path, overrides, words):
    with pytest.raises(UserError) as error:
        generate(tiny_model, tmp_path / "out", *overrides)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_latents_of_another_size_are_refused(tiny_model, noise, tmp_path):
    with pytest.raises(UserError, match=r"\(2, 4, 6, 8\).*\(2, 4, 8, 8\)"):
        generate(tiny_model, tmp_path, f"infer_args.latents={noise}", "infer_args.height=64")


# ------------------------------------------------------------------------------------- prompts


def test_weights_of_braces():
    assert parse("a {cat:1.3}") == ("a cat", [1, 1, 1.3, 1.3, 1.3])
    assert parse("{x}").weights == [1.1]
    text, weights = parse("{in the {city}:1.2}")
    assert text == "in the city"
    np.testing.assert_allclose(weights, [1.2] * 7 + [1.32] * 4)
    for mistake in ("{a", "a}", "{a:b}", "{a:nan}", "}{"):
        with pytest.raises(UserError):
            parse(mistake)


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_characters="{}"), max_size=20))
def test_text_without_braces_is_unchanged(text):
    assert parse(text) == (text, [1.0] * len(text))


def test_a_weight_lands_on_its_tokens(tiny_model):
    tokenizer = WeightedTokenizer(tiny_model / "tokenizer")
    ids, weights = tokenizer.encode_weighted(parse("a photo {of:1.5}"))
    np.testing.assert_array_equal(ids, tokenizer.encode("a photo of"))
    count = int((ids != ids[0, -1]).sum())  # start, and tokens of text
    alone = int((tokenizer.encode("of") != ids[0, -1]).sum()) - 1
    expected = np.ones(77)
    expected[count - alone : count] = 1.5
    np.testing.assert_array_equal(weights, expected)


def test_long_prompts_are_joined_rows(tiny_model):
    component = diffusers_folder.read(str(tiny_model)).parts["text_encoder"]
    structure, _ = abstract(lambda: CLIPTextModel(component.config))
    text_encoder = bind(structure, jax.tree.map(jnp.asarray, component.params))
    tokenizer = WeightedTokenizer(tiny_model / "tokenizer")
    ids = jnp.asarray(tokenizer.encode("a photo of " * 40, 2)[None])
    joined, first, second = (
        np.asarray(encode_text([text_encoder], [part])[0]) for part in (ids, ids[:, :1], ids[:, 1:])
    )
    assert joined.shape[1] == 152
    np.testing.assert_allclose(joined[:, :76], first[:, :76], atol=1e-5)
    np.testing.assert_allclose(joined[:, 76:], second[:, 1:], atol=1e-5)


def test_weighing_keeps_the_mean_and_1_changes_nothing(rng):
    states = rng.normal(size=(2, 77, 8)).astype(np.float32)
    weights = np.ones((2, 77), np.float32)
    weights[1, 3:6] = 1.5
    weighed = np.asarray(weigh(jnp.asarray(states), jnp.asarray(weights)))
    np.testing.assert_array_equal(weighed[0], states[0])
    np.testing.assert_allclose(weighed[1].mean(), states[1].mean(), rtol=1e-4)
    ratio = weighed[1, 4] / weighed[1, 0] / (states[1, 4] / states[1, 0])
    np.testing.assert_allclose(ratio, 1.5, rtol=1e-4)


# --------------------------------------------------------------------------------- file names


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=400), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_names_are_safe_and_numbers_go_on(tmp_path_factory, prompt, seed, number):
    name = gallery.image_name(number, seed, prompt, "png")
    assert len(name.encode("utf-8", "surrogatepass")) <= 200
    folder = tmp_path_factory.mktemp("names")
    (folder / name).touch()
    assert [path.name for path in folder.iterdir()] == [name]
    assert gallery.next_number(folder) == number + 1


# -------------------------------------------------------------------------------- command line


def test_programs_end_with_codes_and_without_tracebacks(capsys):
    def fail(error: BaseException):
        def program(argv):
            raise error

        return program

    endings = {2: fail(UserError("no such key")), 130: fail(KeyboardInterrupt()), 0: lambda _: 0}
    for code, program in endings.items():
        with pytest.raises(SystemExit) as ended:
            cli.run(program, [])
        assert ended.value.code == code
    assert capsys.readouterr().err == "error: no such key\n"
