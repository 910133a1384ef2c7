"""Whole configurations: the guide's, HCP-Diffusion's style, the shipped ones, `cfg.yaml`."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from jaxft import config
from jaxft import schema as schemas
from jaxft.errors import UserError

SHIPPED = config.shipped_folder()
REFERENCES = set(config.REFERENCES.values())
MODEL = "model.pretrained_model_name_or_path=here"

# The guide's three files for training (fine-tuning-guide.zh.md); changed: paths, and `unet` for
# `lora_unet` in the second, which is about fine-tuning.
GUIDE_FINE_TUNING = """
_base_:
  - cfgs/train/examples/fine-tuning.yaml

unet:
  -
    lr: 1e-6
    layers:
      - ''

train:
  train_epochs: 20

model:
  pretrained_model_name_or_path: 'stable-diffusion-v1-5/stable-diffusion-v1-5'
  tokenizer_repeats: 1

data:
  dataset1:
    batch_size: 4

    source:
      data_source1:
        img_root: 'train_data/'
        caption_file: 'train_data/'
        word_names:
          pt1: pt-cat1

    bucket:
      target_area: ${hcp.eval:"512*768"}
      num_bucket: 5
"""
GUIDE_LAYER_WISE = r"""
_base_: [cfgs/train/examples/fine-tuning.yaml]
unet:
  -
    lr: 1e-6
    layers:
      - 're:.*\.to_k$'
      - 're:.*\.to_v$'
      - 're:.*\.ff$'
  -
    lr: 1e-5
    layers:
      - 're:.*resnets$'
"""
GUIDE_DREAMBOOTH = """
_base_: [cfgs/train/examples/fine-tuning.yaml]
data:
  dataset1:
    batch_size: 4
    cache_latents: True

    source:
      data_source1:
        img_root: 'train_data/'
        caption_file: 'train_data'
        word_names:
          pt1: sks
          class: dog
    bucket:
      _target_: hcpdiff.data.bucket.RatioBucket.from_files # aspect ratio bucket
      target_area: ${hcp.eval:"512*512"}
      num_bucket: 1

  dataset_class:
    batch_size: 1
    cache_latents: True
    loss_weight: 1.0

    source:
      data_source1:
        img_root: 'da_data/'
        caption_file: null
        word_names:
          class: dog
    bucket:
      _target_: hcpdiff.data.bucket.FixedBucket
      target_size: [512, 512]
"""
GUIDE_INFERENCE = """
_base_:
  - cfgs/infer/t2i_part.yaml

infer_args:
  width: 768
  height: 768
  guidance_scale: 9.0
  num_inference_steps: 25

new_components:
  scheduler:
    _target_: diffusers.DPMSolverMultistepScheduler # change Sampler
    beta_start: 0.00085
    beta_end: 0.012
    beta_schedule: 'scaled_linear'
    algorithm_type: 'dpmsolver++'
    use_karras_sigmas: True
  vae:
    _target_: diffusers.AutoencoderKL.from_pretrained
    pretrained_model_name_or_path: 'any3.0/vae' # path to vae model
"""
# As HCP-Diffusion's files have it, with features of its training that jaxft does not need to hear.
HCP_STYLE = """
mixed_precision: 'fp16'
allow_tf32: False
vis_info: {prompt: null, negative_prompt: ''}
train:
  set_grads_to_none: False
  cfg_scale: '1.0'
  loss:
    criterion: {_target_: torch.nn.MSELoss, _partial_: True, reduction: none}
    type: eps
  optimizer: {_target_: torch.optim.AdamW, _partial_: True, weight_decay: 1e-3}
  scheduler: {num_warmup_steps: 7}
  scheduler_pt: ${.scheduler}
logger: [{_target_: hcpdiff.loggers.CLILogger, _partial_: True, out_path: train.log, log_step: 20}]
model: {enable_xformers: True, ema: null, ema_unet: 0, vae: null, pretrained_model_name_or_path: m}
previewer: null
tokenizer_pt: {emb_dir: embs/, replace: False, train: null}
lora_unet: null
text_encoder: null
plugin_TE: null
data:
  dataset1:
    _target_: hcpdiff.data.TextImagePairDataset
    _partial_: True
    att_mask_encode: False
    source:
      data_source1:
        _target_: hcpdiff.data.source.Text2ImageAttMapSource
        img_root: imgs
        att_mask: null
        word_names: {pt1: sks}
        text_transforms:
          _target_: torchvision.transforms.Compose
          transforms:
            - _target_: hcpdiff.utils.caption_tools.TemplateFill
              word_names: ${....word_names}
"""


def load(path: str, *overrides: str, schema: str = "train") -> config.Config:
    return config.load(path, overrides, schema)[0]


def test_the_guides_files_load(write):
    fine_tuning = load(write("cfgs/train/ft1.yaml", GUIDE_FINE_TUNING), "train.train_epochs=10")
    assert fine_tuning.unet.to_dict() == {"0": {"lr": 1e-6, "layers": ("",), "optimizer": {}}}
    assert fine_tuning.train.train_epochs == 10
    source = fine_tuning.data.dataset1.source.data_source1
    assert source.prompt_template.endswith("caption.txt")
    assert fine_tuning.data.dataset1.bucket.target_area == 512 * 768

    layer_wise = load(write("cfgs/train/ft2.yaml", GUIDE_LAYER_WISE))
    assert [group.lr for group in layer_wise.unet.values()] == [1e-6, 1e-5]
    shipped = load("configs/train/examples/layer-wise.yaml", f"exp_dir={layer_wise.exp_dir}")
    assert shipped == layer_wise

    dreambooth = load(write("cfgs/train/db.yaml", GUIDE_DREAMBOOTH))
    assert list(dreambooth.data) == ["dataset1", "dataset_class"]
    assert dreambooth.data.dataset_class.bucket.target_size == (512, 512)
    for dataset in dreambooth.data.values():
        assert dataset.source.data_source1.word_names["class"] == "dog"

    asked = ("pretrained_model=m", "part_path=exps/a/ckpts/unet-1000.safetensors")
    inference = load(write("cfgs/infer/a.yaml", GUIDE_INFERENCE), *asked, schema="infer")
    assert inference.merge.unet_part.part["0"].path == inference.part_path
    assert inference.new_components.scheduler.use_karras_sigmas is True


def test_every_notice_is_about_a_key_that_is_set_and_has_no_meaning_here(write):
    own = write("own.yaml", HCP_STYLE)
    loaded, notices = config.load(own)
    assert loaded.mixed_precision == "bf16"
    assert {notice.split(": ")[1] for notice in notices} == {
        "allow_tf32",
        "vis_info",
        "logger",
        "train.set_grads_to_none",
        "model.enable_xformers",
        "data.dataset1.att_mask_encode",
        "mixed_precision",
    }
    assert all(notice.startswith("own.yaml: ") for notice in notices)


def test_a_variable_whose_use_is_set_otherwise_is_named_and_nothing_else(write):
    write("base.yaml", "folder: a\ndata: {d: {source: {s: {img_root: '${folder}'}}}}")
    own = write("own.yaml", "_base_: base.yaml\ndata: {d: {source: {s: {img_root: b}}}}")
    loaded, notices = config.load(own, [MODEL])
    assert loaded.data.d.source.s.img_root == "b"
    assert notices == ["base.yaml: folder: has no effect: what it stood for is set otherwise"]
    with pytest.raises(UserError, match="command line: flder: unknown key"):
        load(own, MODEL, "flder=c")


@pytest.mark.parametrize(
    "path",
    sorted({str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml")} - REFERENCES),
)
def test_shipped_files_load_without_a_word_and_come_back_from_cfg_yaml(write, path):
    schema = "infer" if path.startswith("infer/") else "train"
    needed = ["pretrained_model=m", "part_path=p", "lora_path=l"] if schema == "infer" else [MODEL]
    loaded, notices = config.load(f"configs/{path}", needed, schema)
    assert notices == []
    again, notices = config.load(write("cfg.yaml", config.to_yaml(loaded)), (), schema)
    assert (again, again.to_dict(), notices) == (loaded, loaded.to_dict(), [])
    assert config.to_yaml(again) == config.to_yaml(loaded)


def test_cfg_yaml_keeps_texts_that_look_like_something_else(write):
    texts = ["${seed}", "1e-6", "no", "null", "a: b", "#x", "猫", "\\${x}", "[a]", " "]
    needed = [MODEL, "data.d.source.s.img_root=i"]
    path = write("own.yaml", "seed: 1")
    quoted = ["'" + text.replace("${", "\\${") + "'" for text in texts if text[0] != "\\"]
    loaded = load(
        path,
        *needed,
        f"data.d.source.s.word_names={{{', '.join(f'w{i}: {q}' for i, q in enumerate(quoted))}}}",
    )
    words = loaded.data.d.source.s.word_names
    assert list(words.values()) == [text for text in texts if text[0] != "\\"]
    assert load(write("cfg.yaml", config.to_yaml(loaded))) == loaded


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_the_reference_shows_or_declares_every_type_and_explains_every_key(name):
    text = (SHIPPED / name).read_text()
    reference: Any = OmegaConf.to_container(OmegaConf.load(SHIPPED / name))
    schema = schemas.from_reference(reference)
    for pattern in schema.types:
        assert schemas.find(schema, pattern), f"{pattern} is declared and does not exist"
    explained = text.split("_types_:\n")[0].splitlines()
    for pattern in schemas._patterns(schema.tree, ()):
        found = schemas.find(schema, pattern)
        if found is None:
            continue
        kinds = schemas.kinds_of(schema, *found)
        if "mapping" not in kinds and pattern[-1] != "*":
            lines = [line for line in explained if line.lstrip().startswith(f"{pattern[-1]}:")]
            assert any("#" in line for line in lines), f"{name}: {pattern} has no comment"


def test_train_base_is_what_the_reference_says():
    base = load("configs/train/train_base.yaml", MODEL)
    empty = load("configs/train/tuning_base.yaml", MODEL, f"exp_dir={base.exp_dir}")
    assert base == empty
