"""Losses of held-out images and previews: PyTorch's, the sampler's, and no part of the run."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from jaxft import (
    assembly,
    caches,
    datasets,
    plan,
    sample,
    tensor_file,
    train,
    validation,
)
from jaxft import config as configs
from jaxft.data import latents, source
from jaxft.data.records import Records
from jaxft.errors import UserError
from jaxft.formats import embeddings
from tests.data_fixtures import photo_folder

STEPS, WORD = 3, "pt-x1"


@pytest.fixture(scope="module")
def recipe(nano_model, tmp_path_factory) -> Path:
    """A LoRA that drops values, a word and an average; one data set is never trained on."""
    folder = tmp_path_factory.mktemp("recipe")

    def data(name: str, count: int, **more: Any) -> dict[str, Any]:
        photos = str(photo_folder(folder / name, count))
        return {
            "batch_size": 1,
            "source": {
                "photos": {
                    "img_root": photos,
                    "caption_file": photos,
                    "prompt_template": "prompt_tuning_template/caption.txt",
                }
            },
            "bucket": {"target_area": 4096, "step_size": 32, "num_bucket": 1},
            **more,
        }

    infer = {
        "_base_": ["configs/infer/text2img.yaml"],
        "prompt": ["a photo of", f"the {{{WORD}:1.2}} of"],
        "neg_prompt": "on",
        "bs": 2,
        "seed": 3,
        "dtype": "fp32",
        "infer_args": {"width": 64, "height": 64, "num_inference_steps": 3},
    }
    (folder / "infer.yaml").write_text(yaml.safe_dump(infer))
    lora = {"lr": 1e-2, "rank": 2, "dropout": 0.5, "layers": [r"re:down_blocks.*\.attn1$"]}
    tree = {
        "_base_": ["configs/train/train_base.yaml", "configs/train/tuning_base.yaml"],
        "lora_unet": [lora],
        "tokenizer_pt": {"train": [{"name": WORD, "lr": 1e-2, "init_text": "*[0.1, 2]"}]},
        "mixed_precision": "no",
        "train": {
            "train_steps": STEPS,
            "log_step": 1,
            "scheduler": {"name": "constant", "num_warmup_steps": 0},
            "validation": {"every": 2, "timesteps": 4},
            "profile": [2, STEPS],
        },
        "model": {
            "pretrained_model_name_or_path": str(nano_model),
            "gradient_checkpointing": False,
            "tokenizer_repeats": 1,
            "ema": {"_target_": "ModelEMA", "decay_max": 0.5, "power": None},
        },
        "data": {"trained": data("trained", 4), "seen": data("seen", 5, held_out=1)},
        "export": None,
        "previewer": {"infer_cfg": str(folder / "infer.yaml"), "every": 2, "weights": "both"},
    }
    tree["data"]["trained"]["source"]["photos"]["word_names"] = {"pt1": WORD}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def watched(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "watched"
    assert train.main(["--config", str(recipe), f"exp_dir={folder}"]) == 0
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """Those of a run, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("time", "images_per_s", "input_share")
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def test_a_run_is_the_same_bit_for_bit_when_nobody_watches(recipe, watched, tmp_path):
    folder = tmp_path / "alone"
    overrides = ["data.seen=---", "previewer=null", "train.profile=null"]
    assert train.main(["--config", str(recipe), f"exp_dir={folder}", *overrides]) == 0
    assert [line for line in records(watched) if "total" in line] == records(folder)
    for name in ("unet", WORD):  # of the UNet the average too
        file = f"ckpts/{name}-{STEPS}.safetensors"
        assert (watched / file).read_bytes() == (folder / file).read_bytes()
    assert not (folder / "preview").exists()


def test_updates_are_traced_for_tensorboard_and_perfetto(watched):
    assert f"profile   updates 2 to {STEPS}, into profile/" in (watched / "plan.txt").read_text()
    (folder,) = (watched / "profile/plugins/profile").iterdir()  # as TensorBoard looks for it
    assert [*folder.glob("*.xplane.pb")]
    (file,) = folder.glob("*perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any("update" in event.get("name", "") for event in events)


@pytest.mark.parametrize("updates", [[2], [0, 1], [3, 2], [1, STEPS + 1]])
def test_updates_that_a_run_does_not_have_are_not_traced(recipe, updates):
    with pytest.raises(UserError, match=r"train\.profile: .*(has 3, such as|a list of count)"):
        plan.prepare(*configs.load(str(recipe), [f"train.profile={updates}"]))


def test_losses_are_logged_with_curve_and_picture(watched):
    judged = {line["step"]: line for line in records(watched) if "total" not in line}
    assert [*judged] == [0, 2, STEPS]
    for step, line in judged.items():
        own = line["validation"]["seen"]
        assert own.keys() == {"trained", "average"}
        assert (own["trained"] == own["average"]) == (step == 0)
        for which, mean in own.items():
            assert mean == pytest.approx(np.mean(line["curves"]["seen"][which]))
        picture = Image.open(watched / "validation" / f"seen-{step}.png")
        assert len(set(picture.get_flattened_data())) > 3
    assert judged[0]["timesteps"] == [125, 375, 625, 875]
    assert judged[0]["validation"] != judged[STEPS]["validation"]
    assert "validation seen: trained" in (watched / "train.log").read_text()
    told = (watched / "plan.txt").read_text()
    assert "2 images, 64 × 64, of the weights and their average" in told
    assert "seen: 5 images; their loss is computed before step 1, every 2 updates" in told


@pytest.mark.parametrize("average", [False, True])
def test_previews_are_the_samplers_images_of_the_part_files(recipe, watched, tmp_path, average):
    paths = {step: watched / "preview" / f"{step}{'-ema' * average}.png" for step in (0, 2, STEPS)}
    shown = {step: np.asarray(Image.open(path)).astype(int) for step, path in paths.items()}
    assert len({*(watched / "preview").iterdir()}) == 2 * len(shown)
    made = plan.prepare(*configs.load(str(recipe)))
    for step in (0, STEPS):
        embs = tmp_path / str(step)
        group: dict[str, Any] = {}
        rows = made.words.rows[WORD]
        if step:
            file = watched / "ckpts" / f"unet-{step}.safetensors"
            group = {"unet": {"lora": [{"path": str(file)}]}, "load_ema": average}
            rows = tensor_file.read(watched / "ckpts" / f"{WORD}-{step}.safetensors")["emb_params"]
        embeddings.write(embs / f"{WORD}.safetensors", rows, [16])
        config, _ = configs.load(
            str(recipe.parent / "infer.yaml"),
            [
                f"pretrained_model={made.model.folder}",
                f"emb_dir={embs}",
                f"merge={yaml.safe_dump(group, default_flow_style=True, width=10**6).strip()}",
            ],
            "infer",
        )
        images = sample.paint(sample.make_requests(config), sample.load_model(config), config)
        wanted = np.concatenate([pixels for pixels, _ in images], axis=1).astype(int)
        # Beside the weights and in them, a LoRA adds up in another order; the word's average is
        # in no file.
        same = shown[step][:, :64] if average and step else shown[step]
        assert np.abs(same - wanted[:, : same.shape[1]]).max() <= 2
    assert np.abs(shown[0] - shown[STEPS]).max() > 2


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def judged(recipe: Path, *overrides: str) -> tuple[plan.Plan, np.ndarray, np.ndarray]:
    """The plan, and the curve of the weights before step 1, computed twice."""
    made = caches.fill(plan.prepare(*configs.load(str(recipe), list(overrides))))
    assembled = assembly.assemble(made)
    state = assembled.programs.init(assembly.put(made, assembly.initial(made)))
    silent: Any = Silent()
    judge = validation.Validation(assembled, Path(), silent).judge
    first, second = (judge(made.held_out[0], state.trainable) for _ in range(2))
    return made, first, second


def test_the_curve_is_pytorchs_and_does_not_depend_on_batches_or_seed(recipe, nano_model):
    made, curve, again = judged(recipe)
    np.testing.assert_array_equal(curve, again)
    _, other, _ = judged(recipe, "data.seen.batch_size=2", "seed=1")
    np.testing.assert_allclose(other, curve, rtol=1e-5)  # sums in another order

    unet = UNet2DConditionModel.from_pretrained(nano_model, subfolder="unet")
    text = CLIPTextModel.from_pretrained(nano_model, subfolder="text_encoder")
    noising: Any = DDPMScheduler.from_pretrained(nano_model, subfolder="scheduler")
    (held,), wanted = made.held_out, []
    assert held.moments is not None
    with torch.no_grad():
        for timestep in (125, 375, 625, 875):
            errors = []
            for record, size in zip(held.records, held.sizes, strict=True):
                seed = jnp.uint32(int(record.digest[:8], 16))
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), timestep)
                latent_key, noise_key = jax.random.split(key)
                mean, log_variance = np.split(held.moments[latents.key(record, size)], 2, axis=-1)
                spread = np.exp(0.5 * np.clip(log_variance, -30, 20))
                drawn = mean + spread * jax.random.normal(latent_key, mean.shape)
                latent, noise = (
                    torch.tensor(np.moveaxis(np.asarray(x), -1, 0)[None].copy())
                    for x in (drawn * 0.18215, jax.random.normal(noise_key, mean.shape))
                )
                noisy = noising.add_noise(latent, noise, torch.tensor([timestep]))
                ids = torch.tensor(held.ids(source.prompt(record, 0))[0]).long()
                states = text(ids).last_hidden_state
                predicted: Any = unet(noisy, timestep, states).sample
                errors.append(float(torch.nn.functional.mse_loss(predicted, noise)))
            wanted.append(np.mean(errors))
    np.testing.assert_allclose(curve, wanted, rtol=1e-4)


# -------------------------------------------------------------------------------- what is held out


def test_an_images_content_says_whether_it_is_held_out(tmp_path):
    folder = photo_folder(tmp_path / "photos", 40)
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(folder.glob("*.*"))[20:]:
        (few / f"x{path.name}").symlink_to(path)

    def split(share: float, *folders: Path, **options) -> list[list[str]]:
        parts = [part for one in folders for part in source.index(one, **options).records.parts]
        halves = datasets._held_out("d", Records(parts), share)
        assert {(r.crop, r.flip) for r in halves[1]} <= {("center", False)}
        return [[record.digest for record in half] for half in halves]

    (whole,) = (source.index(folder).records,)
    places = {record.digest: int(record.digest[:16], 16) / 2**64 for record in whole}
    for share in (0.3, 0.6):
        used, spared = split(share, folder, repeat=2)
        once = [digest for digest in places if places[digest] >= share]
        assert used == 2 * once
        assert spared == [digest for digest in places if places[digest] < share]
        assert split(share, folder, few, crop="random", flip=True)[1] == spared  # judged once
        _, of_fewer = split(share, few)
        assert set(of_fewer) == {record.digest for record in source.index(few).records} & {*spared}
    assert split(1e-9, folder)[1] == [min(places, key=lambda digest: places[digest])]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["data.trained.held_out=1.5"], "data.trained.held_out: 1.5 must be a share"),
        (["data.trained.held_out=0.999999"], "leaves none of its 4 images to train on"),
        (["data.trained.held_out=1"], "everything is held out"),
    ],
)
def test_a_share_that_cannot_be_is_refused(recipe, changes, told):
    with pytest.raises(UserError, match=told):
        plan.prepare(*configs.load(str(recipe), changes))


def test_held_out_images_are_no_part_of_an_epoch_and_have_its_sizes(recipe):
    made = plan.prepare(*configs.load(str(recipe), ["data.trained.held_out=0.3"]))
    (trained,) = made.datasets
    (held,) = (one for one in made.held_out if one.name == "trained")
    assert len(trained.records) + len(held.records) == 4
    assert {*held.buckets.sizes} <= {*trained.buckets.sizes}
    assert made.images_per_step == trained.plan.batch_size


# ------------------------------------------------------------------------------------- previews


def test_prompts_come_from_a_file(recipe, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  the dog \nof\n")
    made = plan.prepare(*configs.load(str(recipe), [f"previewer.prompt_file={file}"])).preview
    assert made is not None
    requests = [(one.prompt, one.negative_prompt, one.seed) for one in made.requests]
    assert requests == [("a cat", "on", 3), ("the dog", "on", 4), ("of", "on", 5)]


@pytest.mark.parametrize(
    ("text", "changes", "told"),
    [
        ("merge: {u: {lora: [{path: a}]}}", [], "infer_cfg: .*merge: nothing is merged"),
        ("emb_dir: embs", [], "infer_cfg: .*emb_dir: prompts may say the words of tokenizer_pt"),
        ("infer_args: {width: 63}", [], "infer_cfg: .*infer_args.width must be a multiple"),
        ("prompt: [a]", [], "prompt: a list needs one entry for each of the num × bs = 2"),
        ("prompt: 'a }'", [], "infer_cfg: .*prompt: } without {"),
        ("{}", ["previewer.prompt_file=nowhere.txt"], "prompt_file: nowhere.txt: .*No such file"),
        ("{}", ["previewer.infer_cfg=null", "previewer.prompt_file=a"], "prompt_file: has no ef"),
        ("{}", ["previewer.infer_cfg=nowhere.yaml"], "no such configuration: nowhere.yaml"),
        ("{}", ["model.ema=null"], "previewer.weights: both: no average is kept"),
        ("{}", ["previewer._target_=hcpdiff.Other"], "previewer._target_: not supported"),
    ],
)
def test_what_cannot_be_painted_is_refused(recipe, tmp_path, text, changes, told):
    own = tmp_path / "own.yaml"
    own.write_text(f"_base_: [{recipe.parent / 'infer.yaml'}]\n" + (text if text != "{}" else ""))
    with pytest.raises(UserError, match=told):
        plan.prepare(*configs.load(str(recipe), [f"previewer.infer_cfg={own}", *changes]))
