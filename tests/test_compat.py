"""The table of `_target_`: names of other libraries, and errors that name key and choice."""

import importlib
from pathlib import Path

import pytest

from jaxft import compat, config
from jaxft.diffusion import scheduler_config
from jaxft.errors import UserError

SIZES = [(640, 480), (480, 640), (512, 512), (1024, 512), (512, 1024)]


def test_the_names_are_those_of_torch_and_diffusers():
    for name in compat.TARGETS:
        package, *attributes = name.split(".")
        if package not in ("hcpdiff", "jaxft", "bitsandbytes"):  # the last is large, and for GPUs
            thing = importlib.import_module(package)
            for attribute in attributes:
                thing = getattr(thing, attribute)
            assert callable(thing)


@pytest.mark.parametrize("name", ["fine-tuning", "layer-wise", "DreamBooth"])
def test_what_the_examples_name_is_built(name):
    loaded, _ = config.load(f"configs/train/examples/{name}.yaml")
    for key, dataset in loaded.data.items():
        buckets = compat.build(dataset.bucket, "bucket", f"data.{key}.bucket", sizes=SIZES)
        area = dataset.bucket.get("target_area", 512 * 512)
        assert all(0.7 * area < width * height < 1.4 * area for width, height in buckets.sizes)
    compat.build(loaded.train.optimizer, "optimizer", "train.optimizer", learning_rate=1e-3)


def test_a_short_name_means_the_same():
    for name in ("hcpdiff.data.bucket.FixedBucket", "bucket.FixedBucket", "FixedBucket"):
        node = {"_target_": name, "_partial_": True, "target_size": [256, 512]}
        built = compat.build(node, "bucket", "data.d.bucket", sizes=SIZES)
        assert built.sizes == [(256, 512)]


def test_every_bucket_of_hcp_diffusion_is_there():
    options = {"LongEdgeBucket.from_files": {"target_edge": 512, "num_bucket": 2}}
    options["FixedBucket"] = {"target_size": 512}
    areas = ("RatioBucket.from_files", "RatioBucket.from_ratios")
    for name in (*areas, "SizeBucket.from_files", "RatioSizeBucket.from_files", *options):
        for spelled in (name, f"bucket.{name}", f"hcpdiff.data.bucket.{name}"):
            node = {"_target_": spelled, **options.get(name, {"num_bucket": 2})}
            built = compat.build(node, "bucket", "w", sizes=SIZES, known=())
            assert len(built.assignment) == len(SIZES)
            assert built.scaled == (name != "SizeBucket.from_files")
            if name in areas:
                node["target_area"] = [256 * 256, 512 * 512]
                assert len(compat.build(node, "bucket", "w", sizes=SIZES, known=()).sizes) >= 2


def test_every_text_transform_and_caption_loader_is_there():
    options = {"Prefix": {"text": "x"}, "Suffix": {"text": "x"}}
    drawn = ("TagShuffle", "TagDropout", "TagErase", "CaptionDropout", "Wildcards")
    for name in (*drawn, *options, "TemplateFill"):
        hcps = name.startswith("T")
        for start in ("", "hcpdiff.utils.caption_tools." if hcps else "jaxft."):
            node = {"_target_": start + name, **options.get(name, {})}
            assert compat.build(node, "text transform", "w") is not None
    for name, form in {"TXT": "text", "Json": "json", "Yaml": "yaml"}.items():
        for start in ("", "hcpdiff.data.", "hcpdiff.data.caption_loader."):
            node = {"_target_": f"{start}{name}CaptionLoader", "path": "imgs/"}
            assert compat.build(node, "caption loader", "w") == (Path("imgs"), form)


def test_a_sampler_is_built_as_diffusers_writes_its_configuration(tmp_path: Path):
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    node = {"_target_": "diffusers.DDIMScheduler", **options}
    built = compat.build(node, "sampler", "new_components.scheduler")
    diffusers = importlib.import_module("diffusers")
    diffusers.DDIMScheduler(**options).save_pretrained(tmp_path)
    theirs = config._plain(diffusers.DDIMScheduler.load_config(tmp_path))
    ours, wanted = (scheduler_config.table(one, 5).steps for one in (built, theirs))
    assert [column.tolist() for column in ours] == [column.tolist() for column in wanted]


@pytest.mark.parametrize(
    ("node", "kind", "says"),
    [
        ({}, "bucket", "w._target_: None is no bucket"),
        ({"_target_": "os.system"}, "bucket", "hcpdiff.data.bucket.FixedBucket"),
        ({"_target_": "FixedBuket"}, "bucket", "did you mean hcpdiff.data.bucket.FixedBucket?"),
        ({"_target_": "from_file"}, "bucket", "choose one of"),
        ({"_target_": "torch.optim.AdamW"}, "bucket", "w._target_: torch.optim.AdamW is no bucket"),
        (
            {"_target_": "FixedBucket", "taget_size": 3},
            "bucket",
            "w.taget_size: unknown option; did you mean target_size?",
        ),
        (
            {"_target_": "from_files"},
            "bucket",
            "w._target_: from_files may be hcpdiff.data.bucket.",
        ),
        ({"_target_": "LongEdgeBucket.from_files"}, "bucket", "w: target_edge must be given"),
        (
            {"_target_": "RatioBucket.from_files", "target_area": [1, "x"]},
            "bucket",
            "w.target_area",
        ),
        (
            {"_target_": "RatioBucket.from_files", "target_area": "512*768"},
            "bucket",
            "w.target_area: '512*768' must be a number or a list, each a number; a sum is written "
            '${hcp.eval:"512*768"}',
        ),
        ({"_target_": "FixedBucket", "sizes": []}, "bucket", "w.sizes: unknown option"),
        ({"_target_": "FixedBucket", "_args_": []}, "bucket", "w._args_: unknown option"),
        ({"_target_": "DDIMScheduler", "_args_": []}, "sampler", "w._args_: unknown option"),
        ({"_target_": "AdamW", "weight_decay": "much"}, "optimizer", "w.weight_decay: 'much'"),
        ({"_target_": "AdamW", "weight_decay": True}, "optimizer", "w.weight_decay: True"),
        ({"_target_": "AdamW", "betas": [0.9, "x"]}, "optimizer", "w.betas: [0.9, 'x']"),
        ({"_target_": "RatioBucket.from_files", "num_bucket": 1.5}, "bucket", "w.num_bucket: 1.5"),
        ({"_target_": "AutoencoderKL.from_pretrained"}, "vae", "pretrained_model_name_or_path"),
        ({"_target_": "x.TagShuffle"}, "text transform", "w._target_: x.TagShuffle is no text tra"),
        ({"_target_": "TagDropout", "p": "1"}, "text transform", "w.p: '1'"),
        ({"_target_": "TagDropout", "p": 2}, "text transform", "w: p: 2 must be from 0 to 1"),
        ({"_target_": "TagShuffle", "p": 1}, "text transform", "w.p: unknown option"),
        ({"_target_": "TagDropout", "keep": [1]}, "text transform", "w.keep: [1]"),
        ({"_target_": "JsonCaptionLoader"}, "caption loader", "w: path must be given"),
    ],
)
def test_a_refusal_names_key_and_choice(node, kind, says):
    extra = {"bucket": {"sizes": SIZES}, "optimizer": {"learning_rate": 1.0}}.get(kind, {})
    with pytest.raises(UserError) as error:
        compat.build(node, kind, "w", **extra)
    assert says in str(error.value)
