"""The diffusers folder: all its forms read, what is written opens, nothing is lost on the way."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, layout
from jaxft.formats.diffusers_folder import Model
from jaxft.formats.published import SD15

TEXTS = ["a photo of the sea", "Ünïcode & 12 <|endoftext|> dots ...", ""]


@pytest.fixture
def copy(tiny_model, tmp_path) -> Path:
    """A model folder of the test's own."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return diffusers_folder.read(str(tiny_model))


def same_bits(ours, theirs) -> bool:
    """Two dicts of arrays: same keys, dtypes, shapes and bytes."""
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype
        and ours[k].shape == theirs[k].shape
        and ours[k].tobytes() == theirs[k].tobytes()
        for k in ours
    )


def in_torch(part: str, module) -> dict[str, np.ndarray]:
    """A torch network's weights, under the names of the files."""
    prefix = "text_model." if part == "text_encoder" else ""
    return {
        prefix + name.removeprefix(prefix): value.detach().numpy()
        for name, value in module.named_parameters()
    }


# --- there and back --------------------------------------------------------------------------


def test_read_gives_torchs_weights(model, tiny_pipeline):
    for part, ours in model.parts.items():
        assert same_bits(ours.params, in_torch(part, getattr(tiny_pipeline, part)))


def test_diffusers_opens_the_folder(model, tiny_pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline

    diffusers_folder.write(tmp_path / "m", model)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    for part in model.parts:
        theirs = in_torch(part, getattr(opened, part))
        assert same_bits(theirs, in_torch(part, getattr(tiny_pipeline, part)))
    assert opened.tokenizer(TEXTS).input_ids == tiny_pipeline.tokenizer(TEXTS).input_ids
    assert type(opened.scheduler) is type(tiny_pipeline.scheduler)
    assert opened.scheduler.betas.equal(tiny_pipeline.scheduler.betas)


def test_written_vocabulary_alone_is_the_tokenizer(model, tiny_pipeline, tmp_path):
    """transformers 4 reads `vocab.json` and `merges.txt`, which transformers 5 does not write."""
    from transformers import CLIPTokenizer

    source = tmp_path / "source"
    tiny_pipeline.tokenizer.save_pretrained(source)
    for name in ("vocab.json", "merges.txt"):
        (source / name).unlink(missing_ok=True)
    diffusers_folder.write(tmp_path / "m", model._replace(tokenizers={"text_encoder": source}))
    files = [tmp_path / "m" / "tokenizer" / name for name in ("vocab.json", "merges.txt")]
    tokenizer = CLIPTokenizer(*map(str, files))
    assert tokenizer(TEXTS).input_ids == tiny_pipeline.tokenizer(TEXTS).input_ids


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_written_dtype_rounds_as_torch_does(model, tiny_pipeline, tmp_path, dtype):
    diffusers_folder.write(tmp_path / "m", model, dtype)
    stored = diffusers_folder.read(str(tmp_path / "m")).parts["unet"].params
    rounded = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, value in tiny_pipeline.unet.named_parameters():
        theirs = value.detach().to(rounded).to(torch.float32).numpy()
        np.testing.assert_array_equal(stored[name].astype(np.float32), theirs)


# --- forms of a folder -------------------------------------------------------------------------


def test_shards_and_variant_and_old_names_read_alike(tiny_pipeline, copy, model):
    for part in ("unet", "vae"):
        for file in (copy / part).glob("*.safetensors"):
            file.unlink()
    tiny_pipeline.unet.save_pretrained(copy / "unet", max_shard_size="200KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {}
    for name, array in model.parts["vae"].params.items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        vae[name] = array
    tensor_file.write(copy / "vae" / "diffusion_pytorch_model.fp16.safetensors", vae)

    text = dict(model.parts["text_encoder"].params)  # with the prefix; transformers 5 writes none
    text["text_model.embeddings.position_ids"] = np.arange(77, dtype=np.int64)[None]
    tensor_file.write(copy / "text_encoder" / "model.safetensors", text)

    again = diffusers_folder.read(str(copy))
    for part, own in again.parts.items():
        assert same_bits(own.params, model.parts[part].params)


def test_sharded_variant_as_diffusers_writes_it(tiny_pipeline, copy, model):
    for file in (copy / "unet").glob("*.safetensors"):
        file.unlink()
    tiny_pipeline.unet.save_pretrained(copy / "unet", variant="fp16", max_shard_size="200KB")
    again = diffusers_folder.read(str(copy), variant="fp16")
    assert same_bits(again.parts["unet"].params, model.parts["unet"].params)


def test_variant_is_preferred_where_it_exists(copy, model):
    half = params.cast(model.parts["unet"].params, np.float16)
    tensor_file.write(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    assert (
        diffusers_folder.read(str(copy)).parts["unet"].params["conv_in.weight"].dtype == np.float32
    )
    chosen = diffusers_folder.read(str(copy), variant="fp16")
    assert same_bits(chosen.parts["unet"].params, half)
    assert same_bits(chosen.parts["vae"].params, model.parts["vae"].params)
    with pytest.raises(UserError, match="'fp61'"):
        diffusers_folder.read(str(copy), variant="fp61")


# --- folders that cannot be read ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer",
    ],
)
def test_missing_file_is_named(copy, name):
    if (copy / name).is_dir():
        shutil.rmtree(copy / name)
    else:
        (copy / name).unlink()
    with pytest.raises(UserError, match=re.escape(str(copy / name))):
        diffusers_folder.read(str(copy))


def test_every_misfit_is_listed(copy, model):
    wrong = dict(model.parts["unet"].params)
    wrong["conv_inn.weight"] = wrong.pop("conv_in.weight")
    wrong["conv_out.bias"] = np.zeros(7, np.float32)
    tensor_file.write(copy / "unet" / "diffusion_pytorch_model.safetensors", wrong)
    with pytest.raises(UserError, match=r"conv_in\.weight") as error:
        diffusers_folder.read(str(copy))
    for text in ("conv_inn.weight", "conv_out.bias (7,), expected (4,)", str(copy)):
        assert text in str(error.value)


def test_pickled_weights_are_refused_with_the_remedy(copy):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="to-diffusers"):
        diffusers_folder.read(str(copy))


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd"])
def test_index_cannot_leave_its_folder(copy, shard):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    with pytest.raises(UserError, match=re.escape(shard)):
        diffusers_folder.read(str(copy))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("_class_name", "StableDiffusionXLPipeline", "StableDiffusionXLPipeline"),
        ("vae", ["diffusers", "AsymmetricAutoencoderKL"], "AsymmetricAutoencoderKL"),
        ("unet", [None, None], "unet"),
    ],
)
def test_other_pipelines_are_named(copy, key, value, named):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {key: value}))
    with pytest.raises(UserError, match=named):
        diffusers_folder.read(str(copy))


# --- the hub --------------------------------------------------------------------------------

SD15_FILES = [
    ".gitattributes",
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "model_index.json",
    "safety_checker/config.json",
    "safety_checker/model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned.safetensors",
    "v1-inference.yaml",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
"""The files of stable-diffusion-v1-5/stable-diffusion-v1-5 on the hub."""


SD15_INDEX = json.dumps(diffusers_folder.model_index(SD15))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the hub with the files in `hub["files"]`; notes what was asked for."""
    state = {"files": SD15_FILES, "taken": []}

    def snapshot_download(name, *, revision, allow_patterns):
        chosen = list(filter_repo_objects(state["files"], allow_patterns=allow_patterns))
        state["taken"] += chosen
        for file in chosen:
            (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub" / file).write_text(SD15_INDEX if file == "model_index.json" else "")
        return str(tmp_path / "hub")

    monkeypatch.setattr(layout, "snapshot_download", snapshot_download)
    return state


@pytest.mark.parametrize(("variant", "dot"), [(None, ""), ("fp16", ".fp16")])
def test_hub_gives_one_set_of_weights(hub, variant, dot):
    layout.locate("stable-diffusion-v1-5/stable-diffusion-v1-5", variant=variant)
    weights = {name for name in hub["taken"] if name.endswith((".safetensors", ".bin", ".ckpt"))}
    stem = f"diffusion_pytorch_model{dot}.safetensors"
    assert weights == {f"unet/{stem}", f"vae/{stem}", f"text_encoder/model{dot}.safetensors"}
    assert {"tokenizer/vocab.json", "scheduler/scheduler_config.json"} < set(hub["taken"])


def test_hub_model_with_only_half_precision(hub):
    hub["files"] = [n for n in SD15_FILES if not re.search(r"(model|ema)\.safetensors$", n)]
    layout.locate("someone/half")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub["taken"]


def test_local_names_do_not_touch_the_network(hub, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "file.safetensors").touch()
    assert layout.locate(str(tiny_model)) == tiny_model
    for name in ("ckpts/none", "./a", "/a/b", "../a", "a", "a/b/c", "file.safetensors", "~/a/b"):
        with pytest.raises(UserError, match=re.escape(Path(name).name)):
            layout.locate(name)
    assert hub["taken"] == []


def test_hub_that_does_not_answer(tiny_model):
    with pytest.raises(UserError, match="nobody/nothing"):  # the tests run with HF_HUB_OFFLINE
        layout.locate("nobody/nothing")


# --- writing ----------------------------------------------------------------------------------


def test_write_replaces_a_model_and_nothing_else(model, copy, tmp_path):
    (copy / "unet" / "left_over").touch()
    diffusers_folder.write(copy, diffusers_folder.read(str(copy)), "fp16")  # also onto itself
    assert not (copy / "unet" / "left_over").exists()
    assert (
        diffusers_folder.read(str(copy)).parts["vae"].params["quant_conv.bias"].dtype == np.float16
    )

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").touch()
    for place in (photos, photos / "a.png"):
        with pytest.raises(UserError, match=re.escape(str(place))):
            diffusers_folder.write(place, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "photos"]


def test_failed_write_leaves_what_was_there(model, copy, tmp_path, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(OSError, match="No space"):
        diffusers_folder.write(copy, model)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
