"""docs/hcp-diffusion.md says of HCP-Diffusion's examples what jaxft does with them."""

import json
import os
import re
from pathlib import Path

import hcp_table
import numpy as np
import pytest

from jaxft import config, foreign, plan
from jaxft.errors import UserError
from jaxft.formats import embeddings
from tests.conftest import ROOT
from tests.data_fixtures import photo_folder

EXAMPLES = Path(os.environ.get("HCP_EXAMPLES", ROOT.parent / "shared/reference/hcp-examples"))
"""A folder with HCP-Diffusion's `cfgs`, which are no part of jaxft."""

REASONS = {
    *((key, f"ignored: {reason}") for key, reason in foreign.IGNORED.items()),
    *((key, f"not supported: {reason}") for key, (_, reason) in foreign.REFUSED.items()),
}


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="HCP-Diffusion's examples are not here")
def test_the_table_is_what_the_files_do():
    page = hcp_table.PAGE.read_text("utf-8")
    assert hcp_table.replaced(page, hcp_table.table(EXAMPLES)) == page, (
        f"python scripts/hcp_table.py {EXAMPLES}"
    )


SOURCE = "data.dataset1.source.data_source1"
DEMO = "model.pretrained_model_name_or_path=builtin:demo"
CHANGED = {
    "CustomDiffusion": [DEMO, f"{SOURCE}.word_names.pt1=pt-dog1"],  # which it trains and never says
    "FT_sdxl": [f"{SOURCE}.caption_file=captions.json", "tokenizer_pt.emb_dir=embs_sdxl"],
    "lora_anime_character": [DEMO, "dataset_dir=imgs"],
    "lora_sdxl": ["tokenizer_pt.emb_dir=embs_sdxl"],
}
"""What is changed in some of the examples, besides the model."""


def trained() -> list[str]:
    """The examples that load, and train something."""
    rows = re.findall(
        r"^\| `(train/examples\w*/.+)\.yaml` \| yes", hcp_table.PAGE.read_text(), re.M
    )
    alone = ("add_logger_tensorboard_wandb", "preview_in_training")  # over train_base.yaml
    return [name for name in rows if not name.endswith(alone)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with the examples, and with all that they name but the model."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "cfgs").symlink_to(EXAMPLES / "cfgs")
    for name in ("imgs", "imgs/db_class", "cond_imgs"):
        photo_folder(folder / name, 5, captions=name != "cond_imgs")
    names = [path.name for path in (folder / "imgs").glob("*.*g")]
    (folder / "captions.json").write_text(json.dumps(dict.fromkeys(names, "a caption")))
    for word in ("pt-cat1", "pt-dog1", "pt-catgirl1", "pt-catgirl1-neg", "surtr_arknights"):
        embeddings.write(folder / f"embs/{word}.safetensors", np.ones((1, 64), np.float32), [64])
    return folder


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="HCP-Diffusion's examples are not here")
@pytest.mark.parametrize("name", trained())
def test_an_example_that_loads_is_planned(desk, folders, monkeypatch, name):
    monkeypatch.chdir(desk)
    changes = CHANGED.get(name.rpartition("/")[2], [DEMO])
    if "sdxl" in name:
        changes = [*changes, f"model.pretrained_model_name_or_path={folders('sdxl')[1]}"]
    made = plan.prepare(*config.load(f"cfgs/{name}.yaml", changes))
    groups = [*made.config.unet, *made.config.lora_unet, *made.config.controlnet]
    assert groups or made.config.tokenizer_pt.train
    assert [dataset.num_batches > 0 for dataset in made.datasets] == [True] * len(made.config.data)


def test_every_reason_in_the_table_is_one_that_jaxft_gives():
    """A feature that arrives takes its reason along, and the table is then to be written anew."""
    page = hcp_table.PAGE.read_text("utf-8")
    cells = re.findall(r"`([^`]+)`: ((?:ignored|not supported): .*?)(?=; `| \|\n)", page)
    assert len(cells) > 10
    assert set(cells) <= REASONS


NEEDED = {"train": "model.pretrained_model_name_or_path=m", "infer": "pretrained_model=m"}


@pytest.mark.parametrize(
    ("schema", "text", "key"),
    [
        ("train", "train: {resume: {start_step: 3}}", "train.resume.start_step"),
        ("train", "logger: [{_target_: hcpdiff.loggers.WebUILogger}]", "logger.0"),
        (
            "train",
            "data: {d: {source: {s: {img_root: i, image_transforms: {_target_: x}}}}}",
            "data.d.source.s.image_transforms",
        ),
        ("infer", "infer_args: {crop_coord: [0, 0, 8, 8]}", "infer_args.crop_coord"),
        ("infer", "merge: {g: {lora: [{path: a, mask: [0.2, 1]}]}}", "merge.g.lora.0.mask"),
    ],
)
def test_keys_of_hcp_diffusion_are_refused_with_a_reason(tmp_path, schema, text, key):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(str(own), [NEEDED[schema]], schema)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{own}: {key}: not supported: ")


def test_a_list_of_loggers_says_whether_weights_and_biases_is_one_and_when_each_writes(tmp_path):
    own = tmp_path / "own.yaml"
    lines = "{_target_: hcpdiff.loggers.CLILogger, out_path: train.log, log_step: 20}"
    far = "{_target_: hcpdiff.loggers.WanDBLogger, _partial_: true, log_step: 5}"
    for loggers, project in ((lines, None), (f"{lines}, {far}", "hcp-diffusion")):
        own.write_text(f"logger: [{loggers}]")
        loaded, (notice,) = config.load(str(own), [NEEDED["train"]])
        assert loaded.logger.wandb == project
        steps = {"text": 20, "metrics": None, "tensorboard": None, "wandb": project and 5}
        assert loaded.logger.log_step.to_dict() == steps
        assert notice.endswith("train.log, metrics.jsonl and tblog/ are always written")


def test_conditioning_images_have_the_names_of_the_example_and_of_the_code(tmp_path):
    own = tmp_path / "own.yaml"
    for key in ("cond_root", "cond_dir"):
        own.write_text(
            "data: {d: {_target_: hcpdiff.data.TextImageCondPairDataset, source: {s: {"
            f"_target_: hcpdiff.data.source.Text2ImageCondSource, img_root: i, {key}: c}}}}}}}}\n"
        )
        loaded, notices = config.load(str(own), [NEEDED["train"]])
        assert (loaded.data.d.source.s.cond_dir, notices) == ("c", [])


def test_the_dataset_of_xl_and_an_empty_resume_mean_what_happens_anyway(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "train: {resume: {ckpt_path: {}, start_step: 0}}\n"
        "data: {d: {_target_: hcpdiff.data.CropInfoPairDataset, source: {s: {img_root: i}}}}\n"
    )
    loaded, notices = config.load(str(own), [NEEDED["train"]])
    assert (list(loaded.data), loaded.train.resume, notices) == (["d"], None, [])
