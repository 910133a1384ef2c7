"""HCP-Diffusion's fine-tuning guide: its three files for training run, only paths changed.

On the command line, for time: two steps without warm-up, on small images; the second and third
also in float32 and without gradient checkpointing, which compiles faster.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxft import params, train
from tests.data_fixtures import photograph

FINE_TUNING = """\
# 继承 fine-tuning.yaml
_base_:
  - cfgs/train/examples/fine-tuning.yaml


unet:
  -
    # 修改学习率
    lr: 1e-6
    layers:
      - '' # 微调unet所有层

train:
  # 设置训练轮数
  train_epochs: 20

model:
  # 底模路径，需要diffusers格式，支持huggingface在线模型
  pretrained_model_name_or_path: 'stable-diffusion-v1-5/stable-diffusion-v1-5'
  # 句子长度拓展倍数，1倍最长75个词，如果标注很长可以适当调大
  tokenizer_repeats: 1

data:
  dataset1:
    # 每一批的图像数量，根据显存大小调整
    batch_size: 4

    source:
      data_source1:
        # 训练图片路径
        img_root: 'train_data/'
        # 图片标注路径，null则表示没有标注
        # 可以直接填写标注文件所在文件夹，或填写具体的标注文件路径
        caption_file: 'train_data/'
        
        # 设置lora的触发词
        word_names:
          pt1: pt-cat1

    bucket:
      # 预期训练分辨率
      target_area: ${hcp.eval:"512*768"}
      # 按宽高比分组数量，不要超过训练图片数量
      num_bucket: 5
"""

LAYER_WISE = r"""
unet: # lora_unet in the guide
  -
    lr: 1e-6
    layers:
      # k,v层和ff层 (使用正则表达式指定层的名称)
      - 're:.*\.to_k$'
      - 're:.*\.to_v$'
      - 're:.*\.ff$'
  -
    lr: 1e-5
    layers:
      - 're:.*resnets$'
"""

DREAMBOOTH = """
data:
  dataset1:
    batch_size: 4
    cache_latents: True

    source:
      data_source1:
        img_root: 'train_data/'
        caption_file: 'train_data'

        # DreamBooth的触发词
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

        # DreamBooth的触发词，正则化数据集不保留pt1
        word_names:
          class: dog
    bucket:
      _target_: hcpdiff.data.bucket.FixedBucket
      target_size: [512, 512]
"""

FAST = (
    "train.train_epochs=1",
    "train.scheduler.num_warmup_steps=0",
    "data.dataset1.bucket.target_area=4096",
)

PLAIN = ("mixed_precision=no", "model.gradient_checkpointing=false")

BATCH = 4 * jax.device_count()


def square_photos(folder: Path, count: int) -> Path:
    """Photographs of one shape, so that any number of buckets is one, each with its `.txt`."""
    folder.mkdir(parents=True)
    for n in range(count):
        image = photograph(n, (72, 72)).copy()
        image.putpixel((0, 0), (n, 0, 0))
        image.save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"photo {n} of the cat\n")
    return folder


@pytest.fixture
def start(tmp_path, nano_model) -> Callable[..., Path]:
    """`start(name of a file -> its text, overrides…)`: trains with the last one; the folder."""

    def run(files: dict[str, str], *overrides: str) -> Path:
        for name, text in files.items():
            text = text.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(nano_model))
            for folder in ("train_data", "da_data"):
                text = text.replace(f"'{folder}", f"'{tmp_path / folder}")
            (tmp_path / name).write_text(text, encoding="utf-8")
        square_photos(tmp_path / "train_data", 2 * BATCH)
        square_photos(tmp_path / "da_data", 3)
        argv = ["--config", str(tmp_path / list(files)[-1]), f"exp_dir={tmp_path / 'run'}"]
        assert train.main([*argv, *FAST, *overrides]) == 0
        return tmp_path / "run"

    return run


def assert_trained(run: Path, rates: dict[str, float], datasets: set[str]) -> None:
    """Two steps were made, with finite losses, and the model is there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["lr"] == pytest.approx(rates)
        assert set(line["loss"]) == datasets
        assert np.isfinite(line["total"])
    assert (run / "ckpts" / "unet-2.safetensors").exists()
    assert (run / "export" / "run.safetensors").exists()


def test_fine_tuning(start):
    run = start({"ft1.yaml": FINE_TUNING})
    assert_trained(run, {"unet.0": 1e-6}, {"dataset1"})
    assert "(100.0 %)" in (run / "plan.txt").read_text()
    assert "'pt-cat1, photo 0 of the cat'" in (run / "plan.txt").read_text()


def test_layer_wise(start, nano_model):
    run = start({"ft1.yaml": FINE_TUNING, "ft2.yaml": "_base_: [ft1.yaml]" + LAYER_WISE}, *PLAIN)
    assert_trained(run, {"unet.0": 1e-6, "unet.1": 1e-5}, {"dataset1"})
    base = params.load(nano_model / "unet" / "diffusion_pytorch_model.safetensors")
    trained = {name.removeprefix("base:") for name in params.load(run / "ckpts/unet-2.safetensors")}
    inside = ("to_k", "to_v", "ff", "resnets")
    assert trained == {name for name in base if not set(inside).isdisjoint(name.split("."))}


def test_dreambooth_with_a_class_set(start, nano_model):
    model = f"model.pretrained_model_name_or_path={nano_model}"
    text = "_base_: [cfgs/train/examples/DreamBooth.yaml]\n" + DREAMBOOTH
    run = start({"db.yaml": text}, "data.dataset_class.bucket.target_size=[64,64]", model, *PLAIN)
    assert_trained(run, {"unet.0": 1e-6}, {"dataset1", "dataset_class"})
    plan = (run / "plan.txt").read_text()
    assert "sks dog" in plan
    assert "dataset_class: 3 images" in plan
