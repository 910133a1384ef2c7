"""A user's mistake ends training before step 1: one message, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jaxft import cli, planning, train
from tests.data_fixtures import photo_folder

NUM_IMAGES = 6


@pytest.fixture
def photos(tmp_path) -> Path:
    return photo_folder(tmp_path / "photos", NUM_IMAGES)


@pytest.fixture
def recipe(nano_model, photos, tmp_path) -> Path:
    """A configuration without a mistake."""
    path = tmp_path / "recipe.yaml"
    bucket = {"target_area": 64 * 64, "step_size": 32, "num_bucket": 2}
    source = {"img_root": str(photos)}
    tree = {
        "_base_": ["configs/train/examples/fine-tuning.yaml"],
        "exp_dir": str(tmp_path / "run"),
        "train": {"scheduler": {"num_warmup_steps": 5}},
        "model": {"pretrained_model_name_or_path": str(nano_model)},
        "data": {"dataset1": {"source": {"data_source1": source}, "bucket": bucket}},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def ends(capsys, argv: list[str], program=train.main) -> tuple[int, str]:
    """Exit code and what stands on stderr behind the progress bars."""
    with pytest.raises(SystemExit) as ended:
        cli.run(program, argv)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert isinstance(ended.value.code, int)
    return ended.value.code, text[text.find("error: ") :]


@pytest.fixture
def refused(recipe, tmp_path, capsys) -> Callable[..., str]:
    """Runs training with overrides; the message with which it ends."""

    def run(*overrides: str) -> str:
        code, text = ends(capsys, ["--config", str(recipe), *overrides])
        assert code == 2
        assert text.startswith("error: ")
        assert not (tmp_path / "run").exists()
        return text

    return run


def test_without_a_mistake_there_is_a_plan(recipe, tmp_path, capsys):
    """The other tests fail for the mistake they make, and for nothing else."""
    with pytest.raises(SystemExit) as ended:
        cli.run(planning.main, ["--config", str(recipe)])
    assert ended.value.code == 0
    assert f"{NUM_IMAGES} images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- images, captions


def test_image_folder_that_does_not_exist(refused):
    where = "data.dataset1.source.data_source1"
    text = refused(f"{where}.img_root=nowhere/photos", f"{where}.caption_file=null")
    assert f"{where}: " in text
    assert "nowhere/photos does not exist" in text


def test_empty_image_folder(refused, photos):
    shutil.rmtree(photos)
    photos.mkdir()
    text = refused()
    assert f"{photos} holds no images" in text
    assert ".png" in text


def test_all_files_that_cannot_be_used_are_in_one_message(refused, photos):
    """Truncated, no image, gone (a dangling link); a caption missing, another undecodable."""
    whole = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(whole[: len(whole) // 2])
    (photos / "1.jpg").write_text("not an image")
    (photos / "2.png").unlink()
    (photos / "2.png").symlink_to("nowhere.png")
    (photos / "3.txt").unlink()
    (photos / "4.txt").write_bytes(b"caf\xe9")
    text = refused()
    assert "5 of its images and captions cannot be used; mend or remove these files" in text
    lines = text.splitlines()
    for name, word in {
        "0.png": "",
        "1.jpg": "",
        "2.png": "no such file",
        "3.jpg": "no caption",
        "4.txt": "byte 3 (0xe9) is not UTF-8: save it as UTF-8",
    }.items():
        assert any(line.startswith(f"  {name}") and word in line for line in lines), name
    assert "5.jpg" not in text


def test_caption_json_that_does_not_decode(refused, photos):
    captions = photos.parent / "captions.json"
    captions.write_text('{"0": "a cat", ')
    text = refused(f"data.dataset1.source.data_source1.caption_file={captions}")
    assert "captions.json" in text
    assert "line 1" in text
    captions.write_text(json.dumps({str(n): "a cat" for n in range(NUM_IMAGES - 1)}))
    text = refused(f"data.dataset1.source.data_source1.caption_file={captions}")
    assert f"{NUM_IMAGES - 1}.jpg: no caption" in text


def test_more_buckets_than_images(refused):
    text = refused(f"data.dataset1.bucket.num_bucket={NUM_IMAGES + 1}")
    assert f"num_bucket: {NUM_IMAGES + 1} buckets for {NUM_IMAGES} images; choose 1 to" in text


# ------------------------------------------------------------------------------------------ layers


def test_pattern_that_matches_nothing(refused):
    text = refused(r"unet=[{lr: 1e-5, layers: ['re:.*\.to_j$']}]")
    assert r"unet.0.layers: 're:.*\\.to_j$' matches no layer; near names: " in text
    assert ".to_" in text.partition("near names")[2]


def test_group_of_which_a_later_one_takes_everything(refused):
    text = refused("unet=[{lr: 1e-5, layers: [conv_in]}, {lr: 1e-6, layers: ['']}]")
    assert "unet.0: later groups claim every weight of it; remove it or put it last" in text


def test_nothing_to_train(refused):
    assert "unet: nothing is trained; add a group" in refused("unet=null")


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_model_folder_that_lacks_a_file(refused, nano_model, tmp_path, name):
    model = shutil.copytree(nano_model, tmp_path / "model")
    (model / name).unlink()
    text = refused(f"model.pretrained_model_name_or_path={model}")
    assert name in text


def test_model_folder_without_a_tokenizer(refused, nano_model, tmp_path):
    model = shutil.copytree(nano_model, tmp_path / "model")
    shutil.rmtree(model / "tokenizer")
    text = refused(f"model.pretrained_model_name_or_path={model}")
    assert "vocab.json" in text
    assert "merges.txt" in text


def test_model_that_does_not_exist(refused):
    text = refused("model.pretrained_model_name_or_path=nowhere/near/here")
    assert "nowhere/near/here" in text


# ------------------------------------------------------------------------------------- run folders


def test_resume_folder_that_is_no_run(tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        code, text = ends(capsys, ["--resume", str(folder)])
        assert code == 2
        assert f"--resume: {folder} is not the folder of a run" in text
        assert "it lacks cfg.yaml and state" in text


def test_resume_of_a_run_without_a_checkpoint(recipe, tmp_path, capsys):
    run = tmp_path / "killed"
    (run / "state" / "7.tmp").mkdir(parents=True)
    shutil.copy(recipe, run / "cfg.yaml")
    code, text = ends(capsys, ["--resume", str(run)])
    assert code == 2
    assert f"{run}: no complete checkpoint in it; start anew" in text


def test_run_folder_that_is_not_empty(recipe, tmp_path, capsys):
    kept = tmp_path / "full" / "ckpts" / "unet-7.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    code, text = ends(capsys, ["--config", str(recipe), f"exp_dir={tmp_path / 'full'}"])
    assert code == 2
    assert f"exp_dir: {tmp_path / 'full'} is not empty; choose another, or go on there with" in text
    assert kept.read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["ckpts"]


def test_no_configuration(capsys):
    code, text = ends(capsys, [])
    assert code == 2
    assert "--config FILE" in text
    assert "--resume RUN" in text


# ---------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.train_step=9", ["train.train_step: unknown key", "train.train_steps"]),
        ("train.train_steps=many", ["train.train_steps: must be a whole number", "'many'"]),
        ("train.train_steps=0", ["train.train_steps", "from 1"]),
        ("seed=-1", ["seed: must be a whole number from 0"]),
        ("mixed_precision=bf61", ["mixed_precision: must be bf16 or"]),
        ("mesh.data=3", ["mesh: data 3", "number of devices, 4"]),
        ("train.scheduler.name=cosin", ["train.scheduler.name: 'cosin'", "cosine"]),
        ("train.scheduler.num_warmup_steps=5000", ["num_warmup_steps: 5000", "lower it"]),
        ("train.optimizer._target_=AdaW", ["train.optimizer._target_: AdaW", "torch.optim.AdamW"]),
        ("train.optimizer.beta=[0.9,0.99]", ["train.optimizer.beta: unknown option", "betas"]),
        ("data.dataset1.bucket.targt_area=9", ["bucket.targt_area: unknown option", "target_area"]),
        ("data.dataset1.batch_size=0", ["data.dataset1.batch_size", "from 1"]),
        ("data=---", ["data: no data set"]),
        ("nonsense", ["'nonsense' is no key=value"]),
    ],
)
def test_keys_and_values_that_cannot_be(refused, override, words):
    text = refused(override)
    assert all(word in text for word in words), text


def test_configuration_file_that_does_not_exist_or_is_no_yaml(tmp_path, capsys):
    code, text = ends(capsys, ["--config", "nowhere.yaml"])
    assert code == 2
    assert "no such configuration: nowhere.yaml" in text
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1, 2")
    code, text = ends(capsys, ["--config", str(broken)])
    assert code == 2
    assert f"{broken}: cannot be read as YAML" in text
