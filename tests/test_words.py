"""Training of words: PyTorch's gradients, nothing else moves, what runs write and refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import yaml

from jaxft import config as configs
from jaxft import convert, plan, step, tensor_file, train, words
from jaxft.diffusion.conditioning import TOKEN_TABLE
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, embeddings
from jaxft.tuning import optimizers
from tests.data_fixtures import photo_folder
from tests.test_step import TEXT, Setup

STEPS = 4
EXAMPLE = "configs/train/examples/textual_inversion.yaml"
SMALL = (
    "data.dataset1.batch_size=2",
    "data.dataset1.bucket={target_area: 4096, step_size: 32, num_bucket: 1}",
    "mixed_precision=no",
    "model.gradient_checkpointing=false",
    "train.scheduler.num_warmup_steps=0",
)

# ------------------------------------------------------------------------------------ the gradient

FIRST = TEXT["vocab_size"]
ROWS = {"b-word": 2, "a-word": 1}
"""In the order of their names: ids FIRST, then FIRST + 1 and FIRST + 2."""


def said(setup: Setup) -> dict[str, np.ndarray]:
    """A batch whose prompts say both words, one of them twice."""
    batch = setup.batch(0)
    batch["input_ids"][0, 0, 3:6] = FIRST, FIRST + 1, FIRST + 2
    batch["input_ids"][1, 0, 8:10] = FIRST + 1, FIRST + 2
    return batch


def test_the_gradient_of_the_rows_is_pytorchs_and_no_table_is_formed():
    setup = Setup()
    rng = np.random.default_rng(3)
    rows = {word: rng.standard_normal((n, 16), np.float32) for word, n in ROWS.items()}
    frozen, batch = jax.tree.map(
        jnp.asarray,
        (
            {"unet": setup.trainable["unet"], "text_encoder": setup.frozen["text_encoder"]},
            said(setup),
        ),
    )

    def loss(own):
        return step.loss(setup.objective, {"words": own}, frozen, batch, setup.key)

    rows = jax.tree.map(jnp.asarray, rows)
    ours = jax.jit(jax.grad(loss))(rows)

    table = setup.text.get_input_embeddings()
    joined = np.concatenate([table.weight.detach().numpy(), rows["a-word"], rows["b-word"]])
    bigger = torch.nn.Embedding(*joined.shape)
    bigger.weight = torch.nn.Parameter(torch.tensor(joined))
    setup.text.set_input_embeddings(bigger)

    _, noise, times, noisy = setup.noised(batch, step.draw(setup.key, (4, 4, 6, 4), 1000))
    states = setup.text(torch.tensor(np.asarray(batch["input_ids"])[:, 0]).long()).last_hidden_state
    predicted = setup.unet(noisy, times, states).sample
    torch.nn.functional.mse_loss(predicted, noise).backward()
    assert bigger.weight.grad is not None
    theirs = bigger.weight.grad[FIRST:].numpy()
    found = np.concatenate([ours["a-word"], ours["b-word"]])
    assert np.abs(theirs).max() > 1e-6
    np.testing.assert_allclose(found, theirs, atol=1e-5 * np.abs(theirs).max())

    # Nothing that the gradient computes has as many rows as the table of tokens.
    program = str(jax.make_jaxpr(jax.grad(loss))(rows))
    made = {line.split(" = ")[0].strip() for line in program.splitlines() if " = " in line}
    assert not [name for name in made if f"f32[{FIRST},16]" in name]
    assert f"f32[{FIRST},16]" in program  # as an input


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def overrides(nano_model, tmp_path_factory) -> list[str]:
    photos = photo_folder(tmp_path_factory.mktemp("photos"), 4)
    model = f"model.pretrained_model_name_or_path={nano_model}"
    return [*SMALL, model, f"data.dataset1.source.data_source1.img_root={photos}"]


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> Path:
    """The shipped example, beside a word of `emb_dir` that stays as it is."""
    folder = tmp_path_factory.mktemp("runs")
    embeddings.write(folder / "embs" / "girl7.safetensors", np.ones((2, 16), np.float32), [16])
    argv = ["--config", EXAMPLE, f"exp_dir={folder / 'run'}", *overrides]
    argv += [f"tokenizer_pt.emb_dir={folder / 'embs'}", "tokenizer_pt.replace=true"]
    argv += ["data.dataset1.source.data_source1.word_names.class=girl7"]
    argv += [f"train.train_steps={STEPS}", "train.save_step=2", "train.log_step=1"]
    assert train.main([*argv, "tokenizer_pt.train.0.lr=0.05"]) == 0
    return folder / "run"


def state(folder: Path) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as reader:
        return jax.tree.map(np.asarray, reader.restore(folder / "state" / str(STEPS) / "arrays"))


def test_only_the_words_rows_are_kept_written_and_exported(run):
    names = {path.name for path in (run / "ckpts").iterdir()}
    assert names == {f"pt-catgirl1-{n}.safetensors" for n in (2, STEPS)}
    last = tensor_file.read(run / "ckpts" / f"pt-catgirl1-{STEPS}.safetensors")["emb_params"]
    assert last.shape == (4, 16)
    sizes = [leaf.size for leaf in jax.tree.leaves(state(run)) if leaf.ndim]
    assert sorted(sizes) == [last.size, *2 * [optimizers.WHOLE]]  # rows, and two packed moments
    exported = [path.name for path in (run / "export").iterdir()]
    assert exported == ["pt-catgirl1.safetensors"]
    for file in (run / "export" / exported[0], run.parent / "embs" / exported[0]):
        np.testing.assert_array_equal(tensor_file.read(file)["emb_params"], last)
    other = tensor_file.read(run.parent / "embs" / "girl7.safetensors")["emb_params"]
    np.testing.assert_array_equal(other, 1)
    before = words.create(diffusers_folder_of(run), "pt-catgirl1", "*[0.017, 4]", seed=114514)
    assert np.abs(last - before).max() > 0.05  # a step of Adam is as large as its rate


def diffusers_folder_of(run: Path) -> diffusers_folder.Model:
    config, _ = configs.load(str(run / "cfg.yaml"))
    return diffusers_folder.read(config.model.pretrained_model_name_or_path)


def test_diffusers_loads_the_word(run, tiny_pipeline, nano_model):
    from diffusers import StableDiffusionPipeline

    file = run / "export" / "pt-catgirl1.safetensors"
    opened: Any = StableDiffusionPipeline.from_pretrained(nano_model, local_files_only=True)
    opened.load_textual_inversion(str(file), token="pt-catgirl1")
    rows = tensor_file.read(file)["emb_params"]
    table = opened.text_encoder.get_input_embeddings().weight[-len(rows) :]
    np.testing.assert_array_equal(table.detach().numpy(), rows)


def test_the_plan_tells_the_word_and_the_loss_is_logged_with_its_rate(run):
    text = (run / "plan.txt").read_text()
    assert "export.webui: not written: words alone are trained" in text
    assert "64 weights in the word 'pt-catgirl1' (4 rows), rate 0.05" in text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("tokenizer_pt.train.0" in json.dumps(line) for line in lines)


def test_a_resumed_run_ends_bit_for_bit_as_the_unbroken_one(run, tmp_path):
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "state" / str(STEPS))
    file = again / "ckpts" / f"pt-catgirl1-{STEPS}.safetensors"
    file.unlink()
    assert train.main(["--resume", str(again), "export=null", "tokenizer_pt.replace=false"]) == 0
    assert file.read_bytes() == (run / "ckpts" / file.name).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, state(again), state(run))


# ------------------------------------------------------------------------------------- beginnings


def test_a_word_begins_as_its_text_and_random_rows(nano_model, tmp_path):
    argv = ["create-embedding", str(nano_model), "pt-x1", "4"]
    text = ["--init_text", "the of*[0.5, 3]", "--root", str(tmp_path)]
    assert convert.main([*argv, *text]) == 0
    rows = tensor_file.read(tmp_path / "pt-x1.safetensors")["emb_params"]
    model = diffusers_folder.read(str(nano_model))
    tokenizer = words.Tokenizer(next(iter(model.tokenizers.values())))
    table = np.asarray(model.parts["text_encoder"].params[TOKEN_TABLE])
    np.testing.assert_array_equal(rows[:2], table[tokenizer.ids("the of")])
    assert rows.shape == (4, 16)
    assert 0.3 < rows[2:].std() < 0.8
    with pytest.raises(UserError, match="--replace"):
        convert.main([*argv, *text])
    with pytest.raises(UserError, match="'the' is in the model's vocabulary"):
        convert.main(["create-embedding", str(nano_model), "the", "1", "--root", str(tmp_path)])


def test_of_xl_the_columns_of_both_encoders_lie_side_by_side(folders):
    _, folder = folders("sdxl")
    model = diffusers_folder.read(str(folder))
    rows = words.create(model, "x", "the")
    tables = [np.asarray(model.parts[part].params[TOKEN_TABLE]) for part in model.tokenizers]
    (token,) = words.Tokenizer(model.tokenizers["text_encoder"]).ids("the")
    np.testing.assert_array_equal(rows[0], np.concatenate([table[token] for table in tables]))


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["tokenizer_pt.train.0.name=pt-other1"], "no prompt says 'pt-other1'"),
        (["tokenizer_pt.train.0.init_text=null"], "there is no pt-catgirl1.safetensors in embs/"),
        (["tokenizer_pt.train.0.name=unet"], "can name no file in ckpts/"),
        (["tokenizer_pt.train.0.name=a/b"], "can name no file in ckpts/"),
        (["tokenizer_pt.train.0.name=the"], "'the' is in the model's vocabulary already"),
        (["tokenizer_pt.train.0.n_word=9"], "makes 4 of 9 rows"),
        (["tokenizer_pt.train.0.init_text=*[x]"], r"\*\[x\] must be a standard deviation"),
        (
            ["tokenizer_pt.train.1={name: pt-catgirl1, init_text: a}"],
            "train.0 trains 'pt-catgirl1'",
        ),
        (["data.dataset1.cache_text=true"], "words are trained, so it must be false"),
        (["tokenizer_pt.replace=true", "tokenizer_pt.emb_dir=null"], "tokenizer_pt.replace: "),
        (["tokenizer_pt.train=null"], "nothing is trained"),
    ],
)
def test_mistakes_are_told_before_the_first_step(overrides, changes, told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        plan.prepare(*configs.load(EXAMPLE, [*overrides, *changes]))


def test_an_embedding_of_another_width_is_named(overrides, tmp_path):
    embeddings.write(tmp_path / "pt-y1.safetensors", np.ones((1, 768), np.float32), [768])
    with pytest.raises(UserError, match=r"emb_dir: .*pt-y1.*768 wide, of Stable Diffusion 1.x"):
        plan.prepare(*configs.load(EXAMPLE, [*overrides, f"tokenizer_pt.emb_dir={tmp_path}"]))


def test_a_word_of_a_caption_is_found_whatever_the_template_draws(overrides):
    where = "data.dataset1.source.data_source1"
    changes = [
        f"{where}.prompt_template=prompt_tuning_template/caption.txt",
        f"{where}.word_names={{pt1: ''}}",
        f"{where}.caption_file={overrides[-1].partition('=')[2]}",
        f"{where}.text_transforms=[{{_target_: Suffix, text: ' PT-CATGIRL1'}}]",
    ]
    prepared = plan.prepare(*configs.load(EXAMPLE, [*overrides, *changes]))
    assert prepared.selection.labels == {"words": {"pt-catgirl1": "tokenizer_pt.train.0"}}
    assert jnp.shape(prepared.words.rows["pt-catgirl1"]) == (4, 16)


# --------------------------------------------------------------------------------------- learning

DEMO: dict[str, Any] = {
    "_base_": ["configs/train/train_base.yaml", "configs/train/tuning_base.yaml"],
    "mixed_precision": "no",
    "tokenizer_pt": {"train": [{"name": "sks", "lr": 0.05, "init_text": "figure *[0.1, 3]"}]},
    "train": {
        "train_steps": 20,
        "save_step": 20,
        "validation": {"every": 20, "timesteps": 4},
        "loss": {"low_discrepancy": True},
        "scheduler_pt": {"name": "constant", "num_warmup_steps": 0},
    },
    "model": {
        "pretrained_model_name_or_path": "builtin:demo",
        "tokenizer_repeats": 1,
        "gradient_checkpointing": False,
    },
    "data": {
        "subject": {
            "batch_size": 4,
            "held_out": 0.25,
            "source": {
                "pictures": {
                    "img_root": "builtin:demo/subject",
                    "caption_file": "${.img_root}",
                    "prompt_template": "prompt_tuning_template/caption.txt",
                }
            },
            "bucket": {"target_area": 128 * 128, "step_size": 32, "num_bucket": 1},
        }
    },
    "export": None,
}


def test_the_demo_model_learns_what_a_word_is(tmp_path):
    """Of pictures that were held out, whose captions say the word: their loss falls by a tenth."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(DEMO))
    run = tmp_path / "run"
    assert train.main(["--config", str(tmp_path / "recipe.yaml"), f"exp_dir={run}"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (
        np.mean(line["validation"]["subject"]["trained"])
        for line in lines
        if line.get("validation")
    )
    assert after < 0.9 * before
    assert [path.name for path in (run / "ckpts").iterdir()] == ["sks-20.safetensors"]
