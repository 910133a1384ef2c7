"""Configurations: what beats what, what is refused and how it says so, what a user's files give."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft import config
from jaxft.errors import UserError

SHIPPED = config.shipped_folder()
REFERENCES = set(config.REFERENCES.values())
MODEL = "model.pretrained_model_name_or_path=here"


def load(path: str, *overrides: str, schema: str = "train") -> config.Config:
    return config.load(path, overrides, schema)[0]


def refused(path: str, *overrides: str, schema: str = "train") -> str:
    with pytest.raises(UserError) as error:
        config.load(path, overrides, schema)
    return str(error.value)


# -------------------------------------------------------------------------------- what beats what


def test_the_command_line_beats_the_file_which_beats_later_and_earlier_bases(write):
    write("one.yaml", "train: {workers: 1, save_step: 1, log_step: 1, keep_last: 1}")
    write("two.yaml", "train: {workers: 2, save_step: 2, log_step: 2}")
    own = write("own.yaml", "_base_: [one.yaml, two.yaml]\ntrain: {workers: 3, save_step: 3}")
    train = load(own, MODEL, "train.workers=4").train
    assert (train.workers, train.save_step, train.log_step, train.keep_last) == (4, 3, 2, 1)
    assert train.train_steps == 1000  # of the reference


def test_a_base_is_looked_up_beside_the_file_then_from_the_working_directory_then_shipped(write):
    own = write("sub/own.yaml", "_base_: a.yaml")
    with pytest.raises(UserError) as error:
        load(own, MODEL)
    message = str(error.value)
    assert message.index("sub/a.yaml") < message.index(", a.yaml") < message.index(f"{SHIPPED}")
    write("a.yaml", "seed: 1")
    assert load(own, MODEL).seed == 1
    write("sub/a.yaml", "seed: 2")
    assert load(own, MODEL).seed == 2


@pytest.mark.parametrize("folder", ["cfgs", "configs"])
def test_shipped_files_are_found_from_anywhere_under_both_names(write, folder):
    assert load(f"{folder}/train/examples/fine-tuning.yaml").unet["0"].lr == 1e-6
    assert config.find_shipped("prompt_tuning_template/caption.txt").read_text()
    write("prompt_tuning_template/caption.txt", "mine")
    assert config.find_shipped("prompt_tuning_template/caption.txt").read_text() == "mine"


def test_a_circle_of_bases_is_named(write):
    write("a.yaml", "_base_: b.yaml")
    assert "b.yaml" in refused(write("b.yaml", "_base_: a.yaml"))


def test_three_dashes_take_back_what_a_base_says(write):
    write("base.yaml", "train: {workers: 9}\nunet: [{layers: [a, b, c, d]}, {layers: [x]}]")
    own = write("own.yaml", "_base_: base.yaml\ntrain: {workers: ---}")
    assert load(own, MODEL).train.workers == load(write("e.yaml", "{}"), MODEL).train.workers
    assert list(load(own, MODEL, "unet.0=---").unet) == ["1"]
    assert load(own, MODEL, "unet.0.layers=[a, ---, ---, d]").unet["0"].layers == ("a", "d")


def test_another_target_starts_anew_and_the_same_one_is_merged(write):
    write("base.yaml", "data: {d: {bucket: {_target_: RatioBucket.from_files, step_size: 8}}}")
    own = write("own.yaml", "_base_: base.yaml\ndata: {d: {source: {s: {img_root: i}}}}")
    same = load(own, MODEL, "data.d.bucket._target_=hcpdiff.data.bucket.RatioBucket.from_files")
    assert same.data.d.bucket.step_size == 8
    anew = load(own, MODEL, "data.d.bucket={_target_: FixedBucket, target_size: 64}").data.d.bucket
    assert anew.to_dict() == {"_target_": "FixedBucket", "target_size": 64}
    alone = load(own, MODEL, "data.d.bucket._target_=FixedBucket").data.d.bucket
    assert alone.to_dict() == {"_target_": "FixedBucket"}


def test_paths_at_home_and_places_in_lists_are_written_in_the_usual_ways(write, monkeypatch):
    """A folder that is called ~ is what nobody wants, and a shell leaves `key=~/path` as it is."""
    monkeypatch.setenv("HOME", "/somewhere")
    own = write("own.yaml", "home: ~/a\nexp_dir: ${home}/run\nunet: [{lr: 1, layers: ['']}]")
    loaded = load(own, MODEL, "data.d.source.s.img_root=~/imgs", "unet[0].lr=1e-5")
    assert loaded.exp_dir == "/somewhere/a/run"
    assert loaded.data.d.source.s.img_root == "/somewhere/imgs"
    assert loaded.unet["0"].lr == 1e-5
    assert loaded.index_cache.startswith("/somewhere/")


def test_another_kind_of_dataset_keeps_what_its_bases_say(write):
    """All that HCP-Diffusion has are the same here, so that nothing depends on which it is."""
    source = "{s: {_target_: hcpdiff.data.source.Text2ImageSource, img_root: i, flip: true}}"
    write("base.yaml", f"data: {{d: {{_target_: TextImagePairDataset, source: {source}}}}}")
    other = "{s: {_target_: hcpdiff.data.source.Text2ImageCondSource, cond_root: c}}"
    text = f"data: {{d: {{_target_: hcpdiff.data.CropInfoPairDataset, source: {other}}}}}"
    merged = load(write("own.yaml", f"_base_: base.yaml\n{text}"), MODEL).data.d.source.s
    assert (merged.img_root, merged.cond_dir, merged.flip) == ("i", "c", True)


def test_items_of_lists_have_names_on_the_command_line(write):
    base = "unet: [{lr: 1e-6, layers: [a]}, {lr: 2e-6, layers: [b]}]"
    own = write("own.yaml", "_base_: base.yaml")
    write("base.yaml", base)
    changed = load(own, MODEL, "unet.1.lr=1e-5").unet["1"]
    assert changed.to_dict() == {"lr": 1e-5, "layers": ("b",), "optimizer": {}}
    assert load(own, MODEL, "unet.late.layers=[c]").unet.late.layers == ("c",)
    whole = load(own, MODEL, "unet=[{lr: 3e-6, layers: ['']}]").unet
    assert whole.to_dict() == {"0": {"lr": 3e-6, "layers": ("",), "optimizer": {}}}
    replaced = write("list.yaml", "_base_: base.yaml\nunet: [{layers: [c]}]")
    assert list(load(replaced, MODEL).unet) == ["0"]
    place = write("place.yaml", "_base_: base.yaml\nunet: {1: {lr: 1}}")
    assert [group.lr for group in load(place, MODEL).unet.values()] == [1e-6, 1.0]


@given(st.lists(st.text("abcxyz", min_size=1), unique=True, min_size=1))
@settings(max_examples=20, deadline=None)
def test_groups_keep_their_order(names):
    groups = ", ".join(f"{name}: {{layers: ['']}}" for name in names)
    frozen = load("configs/train/train_base.yaml", MODEL, f"unet={{{groups}}}")
    assert list(frozen.unet) == list(frozen.to_dict()["unet"]) == names


def test_the_command_line_takes_text_as_it_stands():
    shown = "masterpiece, 1girl: solo #1, {surtr:1.2}"
    loaded = load(
        "configs/infer/text2img.yaml",
        "pretrained_model=2024",
        f"prompt={shown}",
        "neg_prompt=[a, 'b, c']",
        "save.out_dir='x y'",
        "merge=null",
        schema="infer",
    )
    assert (loaded.pretrained_model, loaded.prompt) == ("2024", shown)
    assert (loaded.neg_prompt, loaded.save.out_dir) == (("a", "b, c"), "x y")
    assert loaded.merge.to_dict() == {"load_ema": False}
    empty = load("configs/infer/text2img.yaml", "pretrained_model=m", "prompt={a}", schema="infer")
    assert empty.prompt == "{a}"


def test_a_python_file_gives_the_same_configuration_but_only_where_it_is_asked_for(write):
    code = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({})\n"
    body = "{'_base_': ['cfgs/train/examples/fine-tuning.yaml'], 'seed': 5}"
    own = write("own.py", code.replace("{}", body))
    loaded = load(own)  # once: its exp_dir is the time to the second
    assert loaded == load(
        "cfgs/train/examples/fine-tuning.yaml", "seed=5", f"exp_dir={loaded.exp_dir}"
    )
    assert "Python" in refused(write("own.yaml", "_base_: own.py"), MODEL)
    assert "get_config" in refused(write("none.py", "x = 1"), MODEL)


# ---------------------------------------------------------------------------------- interpolation


def test_interpolation(write):
    own = write(
        "own.yaml",
        """
        area: 512*768
        exp_dir: exps/${hcp.time:}/${hcp.time:%Y}
        seed: ${eval:2**4}
        mixed_precision: ${hcp.dtype:bf16}
        train: {workers: "${times:2,3}", save_step: "${train.train_steps}"}
        model: {pretrained_model_name_or_path: '\\${hcp.time:}'}
        data:
          one: {source: {s: {img_root: i}}, bucket: {target_area: '${hcp.eval:"${area}"}'}}
          two: ${data.one}
        """,
    )
    loaded = load(own, "data.two.batch_size=1")
    assert loaded.data.one.bucket.target_area == 512 * 768
    assert loaded.exp_dir.split("/")[1][:4] == loaded.exp_dir.split("/")[2]
    assert (loaded.seed, loaded.mixed_precision) == (16, "bf16")
    assert (loaded.train.workers, loaded.train.save_step) == (6, 1000)
    assert loaded.model.pretrained_model_name_or_path == "${hcp.time:}"
    assert (loaded.data.one.batch_size, loaded.data.two.batch_size) == (4, 1)
    assert loaded.data.two.source == loaded.data.one.source
    assert "area" not in loaded  # a variable of the file's own


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${train.nothing}", "train.nothing"),
        ("${nothing:1}", "nothing"),
        ("${hcp.eval:\"__import__('os')\"}", "not allowed"),
        ("${seed}", "seed"),
        ("${hcp.dtype:fp17}", "fp17"),
        ("${", "seed"),
    ],
)
def test_a_faulty_interpolation_is_named(write, value, says):
    own = write("own.yaml", f"seed: '{value}'".replace("'os'", "''os''"))
    message = refused(own, MODEL)
    assert message.startswith("own.yaml: seed: ")
    assert says in message


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "train: {train_epoch: 3}",
            "train.train_epoch: unknown key; did you mean train.train_epochs?",
        ),
        ("batch_size: 3", "batch_size: unknown key; did you mean data.<name>.batch_size?"),
        ("data: {d: {sauce: {}}}", "data.d.sauce: unknown key; did you mean data.d.source?"),
        (
            "tokenizer_pt: {trian: []}",
            "tokenizer_pt.trian: unknown key; did you mean tokenizer_pt.train?",
        ),
        ("quux: 1", "quux: unknown key; known here: exp_dir, seed"),
        (
            "train: {workers: many}",
            "train.workers: must be a whole number from 0, not the text 'many'",
        ),
        ("train: {workers: -1}", "train.workers: must be a whole number from 0, not -1"),
        ("data: {d: {batch_size: 0}}", "data.d.batch_size: must be a whole number from 1, not 0"),
        ("train: {workers: true}", "train.workers: must be a whole number from 0, not true"),
        ("train: {workers: 1.5}", "train.workers: must be a whole number from 0, not 1.5"),
        ("train: {scale_lr: 1}", "train.scale_lr: must be true or false, not 1"),
        (
            "train: {max_grad_norm: .nan}",
            "train.max_grad_norm: must be a number from 0 or null, not nan",
        ),
        ("train: {train_epochs: []}", "train.train_epochs: must be a whole number from 1 or null"),
        ("train: 3", "train: must be a mapping, not 3"),
        ("unet: {lr: 3}", "unet.lr: must be a mapping, not 3"),
        ("unet: [{lr: 3}]", "unet.0.layers: must be given (text or a list of text)"),
        ("unet: [{layers: [1]}]", "unet.0.layers: must be text or a list of text"),
        ("mixed_precision: fp8", "mixed_precision: must be bf16 or fp16 or no, not the text 'fp8'"),
        ("ckpt_type: torch", "ckpt_type: must be safetensors"),
        (
            "data: {d: {source: {s: {word_names: {a: no}}}}}",
            "data.d.source.s.word_names.a: must be text or a list of text, not false",
        ),
        ("data: {d.e: {batch_size: 1}}", "data.d.e: a name must not hold a dot"),
        ("train: {optimizer: 3}", "train.optimizer: must be a mapping with `_target_`"),
        ("lora_unet: [{layers: [], bias: true}]", "lora_unet.0.bias: not supported: "),
        ("lora_text_encoder: [{layers: [], bias: true}]", "lora_text_encoder.0.bias: not support"),
        ("lora_unet: [{rank: x, layers: []}]", "lora_unet.0.rank: must be a number from 0, not"),
        ("plugin_unet: {c: {_target_: x}}", "plugin_unet.c: not supported: "),
        ("model: {ema: {decay_max: 0.9}}", "model.ema: must be a mapping with `_target_` or null"),
        ("model: {ema_unet: 0.9, ema_text_encoder: 0.8}", "model.ema_text_encoder: model.ema, of "),
        ("previewer: {_target_: x}", "previewer._target_: not supported: "),
        (
            "train: {loss: {criterion: 3}}",
            "train.loss.criterion: must be a mapping with `_target_`",
        ),
        ("train: {loss: {type: sample}}", "train.loss.type: not supported: "),
        ("data: {d: {_target_: a.CropInfoPairDataset}}", "data.d._target_: not supported: "),
        (
            "data: {d: {source: {s: {text_transforms: [3]}}}}",
            "data.d.source.s.text_transforms.0: must be a mapping with `_target_`",
        ),
        (
            "data: {d: {source: {s: {caption_file: {path: x}}}}}",
            "data.d.source.s.caption_file: must be text or a mapping with `_target_` or null",
        ),
    ],
)
def test_a_refusal_names_key_file_and_remedy(write, text, says):
    write("base.yaml", text)
    message = refused(write("own.yaml", "_base_: base.yaml"), MODEL)
    assert f"base.yaml: {says}" in message


def test_a_colon_without_a_blank_is_named(write):
    message = refused(write("own.yaml", "seed: 1"), MODEL, "train.optimizer={_target_:AdamW.x}")
    assert "'_target_:AdamW.x' cannot be a name" in message
    assert "a blank stands behind the colon" in message


def test_all_mistakes_are_told_at_once(write):
    own = write("own.yaml", "train: {workers: x, stepz: 1}")
    lines = refused(own, "seed=y").splitlines()
    assert sorted(line.split(": ")[:2] for line in lines) == [
        ["command line", "seed"],
        ["own.yaml", "model.pretrained_model_name_or_path"],
        ["own.yaml", "train.stepz"],
        ["own.yaml", "train.workers"],
    ]


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: b: c", "\ta: 1"])
def test_a_file_that_is_no_yaml_is_named(write, text):
    assert refused(write("own.yaml", text)).startswith("own.yaml: ")


def test_what_is_not_there_or_no_assignment_is_named(write):
    assert "nowhere.yaml" in refused("nowhere.yaml")
    assert "--resume" in refused(write("own.yaml", "{}"), MODEL, "--resume")


def test_numbers_are_floats_where_floats_are_wanted(write):
    own = write("own.yaml", "unet: [{lr: '1e-6', layers: []}]\ntrain: {max_grad_norm: 1}")
    loaded = load(own, MODEL, "mixed_precision=no")
    assert loaded.unet["0"].lr == 1e-6
    assert isinstance(loaded.train.max_grad_norm, float)
    assert loaded == load(
        write("no.yaml", "_base_: own.yaml\nmixed_precision: no"),
        MODEL,
        f"exp_dir={loaded.exp_dir}",
    )
