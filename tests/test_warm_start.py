"""A run that begins with what another left: every number of its files is there before step 1."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxft import config as configs
from jaxft import low_rank, plan, selection, tensor_file, train
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, hcp, lora
from tests.data_fixtures import photo_folder

ATTENTION, WORD = r"re:down_blocks.*\.attn1$", "pt-new1"
GROUPS: dict[str, Any] = {
    "unet": [{"lr": 1e-3, "layers": ["conv_in"]}],
    "text_encoder": [{"lr": 1e-3, "layers": [r"re:.*mlp$"]}],
    "lora_unet": [
        {"lr": 1e-2, "rank": 2, "alpha": 2, "layers": [ATTENTION]},
        {"lr": 1e-2, "rank": 3, "alpha": 1, "layers": [ATTENTION]},  # adds to the one before
        {"lr": 1e-2, "rank": 2, "type": "loha", "layers": [r"re:down_blocks.*\.attn2$"]},
    ],
    "lora_text_encoder": [{"lr": 1e-2, "rank": 2, "alpha": 2, "layers": ["re:.*self_attn$"]}],
    "tokenizer_pt": {"train": [{"name": WORD, "lr": 1e-2, "init_text": "*[0.01, 2]"}]},
}
AT_REST = [
    *(
        f"{kind}.{n}.lr=0"
        for kind, own in GROUPS.items()
        if "_pt" not in kind
        for n in range(len(own))
    ),
    "tokenizer_pt.train.0.lr=0",
]


@pytest.fixture(scope="module")
def recipe(nano_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    source = {"img_root": str(photo_folder(folder / "photos", 2)), "word_names": {"pt1": WORD}}
    tree = {
        "_base_": ["configs/train/examples/fine-tuning.yaml"],
        **GROUPS,
        "mixed_precision": "no",
        "train": {"train_steps": 1, "scheduler": {"name": "constant", "num_warmup_steps": 0}},
        "model": {
            "pretrained_model_name_or_path": str(nano_model),
            "gradient_checkpointing": False,
        },
        "data": {
            "dataset1": {
                "batch_size": 1,
                "source": {"data_source1": source},
                "bucket": {"target_area": 4096, "step_size": 32, "num_bucket": 1},
            }
        },
        "export": None,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def left(recipe, tmp_path_factory) -> Path:
    """`ckpts/` of a run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert train.main(["--config", str(recipe), f"exp_dir={folder}"]) == 0
    return folder / "ckpts"


def files(left: Path) -> dict[str, Any]:
    return {
        "unet": [str(left / "unet-1.safetensors")],
        "TE": [str(left / "text_encoder-1.safetensors")],
        "words": {WORD: str(left / f"{WORD}-1.safetensors")},
    }


def prepared(recipe: Path, *overrides: str, **begin: Any) -> plan.Plan:
    text = yaml.safe_dump(begin, default_flow_style=True, width=10**6).strip()
    return plan.prepare(*configs.load(str(recipe), [f"train.warm_start={text}", *overrides]))


def test_a_run_at_rate_0_leaves_the_files_that_it_began_with(recipe, left, tmp_path):
    """HCP-Diffusion's spelling, through the whole program."""
    own = {"train": {"resume": {"ckpt_path": files(left), "start_step": 0}}}
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump({"_base_": [str(recipe)], **own}))
    argv = ["--config", str(again), f"exp_dir={tmp_path / 'run'}", *AT_REST]
    assert train.main(argv) == 0
    names = sorted(path.name for path in left.iterdir())
    assert sorted(path.name for path in (tmp_path / "run" / "ckpts").iterdir()) == names
    for name in names:
        ours, theirs = (tensor_file.read(at / name) for at in (tmp_path / "run" / "ckpts", left))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-6, err_msg=key)  # alpha is divided
    text = (tmp_path / "run" / "plan.txt").read_text()
    assert "unet-1.safetensors: begins with 2 weights and the LoRAs of" in text
    # A resume begins with the same weights under what is trained: both keys have their own place.
    for file in (again, tmp_path / "run" / "cfg.yaml"):
        config, _ = configs.load(str(file), ["train.resume.run=exps/x"])
        assert config.train.resume == "exps/x"
        assert list(config.train.warm_start.unet) == files(left)["unet"]


def test_loras_of_one_layer_share_the_ranks_of_the_file(recipe, left, nano_model):
    """Together they change each weight as the file's LoRA does."""
    made = prepared(recipe, unet=files(left)["unet"])
    trained = selection.initial(made.selection, made.model, 0)
    ours = selection.lora(made.selection, trained)["unet"]
    base = diffusers_folder.read(str(nano_model))
    wanted = lora.read(left / "unet-1.safetensors", base.configs)["unet"]
    weights = base.parts["unet"].params
    assert ours.keys() == wanted.keys()
    first, second = (
        low_rank.merge({name: np.zeros_like(weights[name]) for name in weights}, layers)
        for layers in (ours, wanted)
    )
    for name, weight in second.items():
        np.testing.assert_allclose(first[name], weight, atol=1e-7, err_msg=name)
    assert any(np.abs(weight).max() > 1e-4 for weight in second.values())


def test_weights_that_are_not_trained_begin_so_too(recipe, left):
    made = prepared(recipe, "unet=[]", unet=files(left)["unet"])
    part = hcp.read_part(left / "unet-1.safetensors")
    for name, weight in part.items():
        np.testing.assert_array_equal(made.model.parts["unet"].params[name], weight)
    assert "unet" not in made.selection.labels


def test_layers_that_no_file_has_are_told(recipe, left):
    made = prepared(recipe, "lora_unet.2.layers=['re:.*attn2$', 're:.*ff$']", **files(left))
    assert any("layers are in no file, and begin anew" in notice for notice in made.notices)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["lora_unet.1.rank=4"], "attn1.to_q: lora_unet.0.rank makes 6 ranks, the file has 5"),
        (["lora_unet.0.alpha=1"], "lora_unet.0.alpha makes a scale of 0.5, the file has 1"),
        (["lora_unet.2.type=lora"], "attn2.to_q: lora_unet.2.type is lora, the file has loha"),
        (["lora_unet.2.rank=1"], "lora_unet.2.rank or .factor makes"),
        (["lora_unet=[]"], "unet-1.safetensors: unet: .*the configuration has no LoRA there"),
        (["tokenizer_pt.train=[]"], "words.pt-new1: no word 'pt-new1' is trained"),
        (["tokenizer_pt.train.0.n_word=3"], "n_word: the file of 'pt-new1' has 2 rows"),
        (["train.warm_start.unet=[nowhere.safetensors]"], "warm_start.unet: nowhere.safetensors"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(recipe, left, changes, told):
    with pytest.raises(UserError, match=told):
        prepared(recipe, *changes, **files(left))


def test_a_file_of_another_network_or_model_is_named(recipe, left, tmp_path):
    swapped = files(left)["TE"]
    with pytest.raises(UserError, match=r"warm_start.unet: .*text_encoder-1"):
        prepared(recipe, unet=swapped)
    hcp.write_part(tmp_path / "part.safetensors", {"conv_in.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(UserError, match=r"warm_start.unet: .*part(.|\n)*conv_in.weight \(3, 3\)"):
        prepared(recipe, unet=[str(tmp_path / "part.safetensors")])


def test_hcp_diffusions_groups_are_files_put_in_whole(recipe, tmp_path):
    def loaded(group: dict[str, Any]) -> Any:
        own = tmp_path / "own.yaml"
        tree = {"_base_": [str(recipe)], "train": {"resume": {"ckpt_path": {"unet": group}}}}
        own.write_text(yaml.safe_dump(tree))
        return configs.load(str(own))[0].train

    items = {"part": [{"path": "a", "alpha": 1.0}], "lora": [{"path": "b"}]}
    taken = loaded({"base_model_alpha": 0.0, **items})
    assert (taken.resume, taken.warm_start.unet) == (None, ("a", "b"))
    for group, key in (
        ({"base_model_alpha": 0.5, **items}, "unet.base_model_alpha"),
        ({"part": [{"path": "a", "alpha": 0.5}]}, "unet.part.0.alpha"),
        ({"parts": []}, "unet.parts"),
    ):
        with pytest.raises(UserError, match=f"train.resume.ckpt_path.{key}"):
            loaded(group)
