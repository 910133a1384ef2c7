"""HCP-Diffusion's part files: its keys, its formula."""

import numpy as np
import pytest

from jaxft import merging, params, tensor_file
from jaxft.convert import main
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, hcp, lora
from jaxft.formats.hcp import Share, merge_parts
from jaxft.merging import Addition
from tests.test_formats import same_bits


@pytest.fixture
def base(rng) -> dict[str, np.ndarray]:
    layers = ("blocks.1.weight", "blocks.10.weight", "out.bias")
    return {name: rng.standard_normal((3, 4)).astype(np.float32) for name in layers}


def test_part_file_has_hcps_keys_and_comes_back(base, tmp_path):
    hcp.write_part(tmp_path / "unet-1.safetensors", base)
    assert set(params.load(tmp_path / "unet-1.safetensors")) == {f"base:{name}" for name in base}
    assert same_bits(hcp.read_part(tmp_path / "unet-1.safetensors"), base)


def test_files_of_hcp_diffusion_with_averages_loras_and_hosts(base, tmp_path):
    """As its trainer writes one file: full training and a LoRA on one layer, with EMA."""
    file = tmp_path / "text_encoder-9.safetensors"
    ones = np.ones((1, 4), np.float32)
    stored = {"base:out.bias": base["out.bias"], "base_ema:out.bias": base["out.bias"] + 1}
    stored |= {"base_ema:text_model.embeddings.position_ids": np.arange(4)[None]}
    for kind in ("base", "base_ema"):
        stored[f"{kind}:blocks.1._host.weight"] = base["blocks.1.weight"]
    for kind in ("lora", "lora_ema"):
        stored[f"{kind}:blocks.1.___.layer.W_down"] = ones
        stored[f"{kind}:blocks.1.___.layer.W_up"] = ones.T
        stored[f"{kind}:blocks.1.___.alpha"] = np.float32(0.5)
    tensor_file.write(file, stored)
    wanted = {name: base[name] for name in ("out.bias", "blocks.1.weight")}
    assert same_bits(hcp.read_part(file), wanted)
    averaged = hcp.read_part(file, average=True)
    assert same_bits(averaged, wanted | {"out.bias": base["out.bias"] + 1})


def test_merge_of_the_whole_is_the_part_itself(base):
    part = {name: -array for name, array in base.items()}
    spoilt = {name: np.full_like(array, np.nan) for name, array in base.items()}
    assert same_bits(merge_parts(spoilt, [Share(part, 1.0)]), part)


def test_merge_is_the_formula(base, rng):
    """W ← a·W + Σ αᵢ·Vᵢ, over the parts that have the weight and whose layers take it."""
    one, other = (
        {name: rng.standard_normal((3, 4)).astype(np.float32) for name in list(base)[:count]}
        for count in (2, 1)
    )
    shares = [Share(one, 0.3), Share(other, -0.2), Share(one, 0.5, ["blocks.10"])]
    merged = merge_parts(base, shares, base_model_alpha=0.6)
    w, v, u = ({k: a.astype(np.float64) for k, a in d.items()} for d in (base, one, other))
    wanted = {
        "blocks.1.weight": 0.6 * w["blocks.1.weight"]
        + 0.3 * v["blocks.1.weight"]
        - 0.2 * u["blocks.1.weight"],
        "blocks.10.weight": 0.6 * w["blocks.10.weight"] + (0.3 + 0.5) * v["blocks.10.weight"],
    }
    for name, array in wanted.items():
        np.testing.assert_allclose(merged[name], array, atol=1e-6)  # float32's rounding
    assert merged["out.bias"] is base["out.bias"]


def test_merge_of_layers_ends_at_a_dot(base):
    part = {name: array + 1 for name, array in base.items()}
    merged = merge_parts(base, [Share(part, 1.0, ["blocks.1"])])
    assert {name for name in base if merged[name] is not base[name]} == {"blocks.1.weight"}


def test_merge_keeps_the_precision_of_the_part(base):
    half = params.cast(base, np.float16)
    assert same_bits(merge_parts(half, [Share(base, 1.0)]), base)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lora:conv_in.___.layer.W_up", "it holds a LoRA"),
        ("plugin:x.___.weight", "plugin \\(not supported"),
        ("base_ema:conv_in.weight", "it holds averaged weights"),
        ("conv_in.weight", "base:"),
        (None, "no weights"),
    ],
)
def test_files_that_are_no_part(tmp_path, key, named):
    file = tmp_path / "part.safetensors"
    tensor_file.write(file, {key: np.zeros(1, np.float32)} if key else {})
    with pytest.raises(UserError, match=named) as error:
        hcp.read_part(file)
    assert str(file) in str(error.value)


def test_part_of_another_network(base):
    wrong = {"nowhere.weight": np.zeros(1), "out.bias": np.zeros(3)}
    with pytest.raises(UserError, match=r"nowhere\.weight") as error:
        merge_parts(base, [Share(wrong, 1.0, source="other.safetensors")])
    assert "out.bias (3,), expected (3, 4)" in str(error.value)
    assert "other.safetensors" in str(error.value)


def test_layers_without_trained_weights(base):
    with pytest.raises(UserError, match=r"blocks\.1"):
        merge_parts(base, [Share({"out.bias": base["out.bias"]}, 1.0, "blocks.1")])


# ------------------------------------------------------------------------------ Stable Diffusion XL

LAYER = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture
def xl_files(folders, tmp_path, rng):
    """Folder of XL, a part file of both text encoders and a LoRA of them, as HCP-Diffusion's
    trainer names their keys, each with its average."""
    _, folder = folders("sdxl")
    model = diffusers_folder.read(str(folder))
    part, low = {}, {}
    for prefix, network in (("clip_B", "text_encoder"), ("clip_bigG", "text_encoder_2")):
        weight = model.parts[network].params[f"{LAYER}.weight"]
        outputs, inputs = weight.shape
        for ema, factor in (("", 1), ("_ema", 2)):
            part[f"base{ema}:{prefix}.{LAYER}.weight"] = factor * np.ones_like(weight)
            start = f"lora{ema}:{prefix}.{LAYER}.___."
            low[f"{start}layer.W_down"] = np.ones((2, inputs), np.float32)
            low[f"{start}layer.W_up"] = factor * np.ones((outputs, 2), np.float32)
            low[f"{start}alpha"] = np.float32(0.25)
    tensor_file.write(tmp_path / "part.safetensors", part)
    tensor_file.write(tmp_path / "lora.safetensors", low)
    return folder, tmp_path


@pytest.mark.parametrize(("flags", "factor"), [([], 1), (["--ema"], 2)])
def test_files_of_xls_text_encoders_are_merged(xl_files, flags, factor):
    folder, files = xl_files
    what = [
        "--part",
        f"{files / 'part.safetensors'}=0.5",
        "--lora",
        f"{files / 'lora.safetensors'}",
    ]
    paths = ["--model_path", str(folder), "--save_path", str(files / "merged")]
    assert main(["merge", *paths, *what, "--base_model_alpha", "2", *flags]) == 0
    before, after = (diffusers_folder.read(str(path)).parts for path in (folder, files / "merged"))
    for network in ("text_encoder", "text_encoder_2"):
        # 2 · W + 0.5 · V, and 0.25 · up · down, whose products of two ones are 2.
        wanted = 2 * before[network].params[f"{LAYER}.weight"] + 0.5 * factor + 0.25 * 2 * factor
        found = after[network].params[f"{LAYER}.weight"]
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert same_bits(before["unet"].params, after["unet"].params)


def test_files_of_xls_text_encoders_come_back(xl_files):
    folder, files = xl_files
    configs = diffusers_folder.read_configs(folder)
    read = lora.read(files / "lora.safetensors", configs)
    lora.write_hcp(files / "again", read)
    again = tensor_file.read(files / "again" / "text_encoder.safetensors")
    stored = tensor_file.read(files / "lora.safetensors")
    assert same_bits(again, {k: v for k, v in stored.items() if k.startswith("lora:")})

    stored = hcp.read_part(files / "part.safetensors")
    networks = {}
    for name, array in stored.items():
        network, own = hcp.place(name, "unet")
        networks.setdefault(network, {})[own] = array
    assert networks.keys() == {"text_encoder", "text_encoder_2"}
    assert same_bits(hcp.by_file(networks)["text_encoder"], stored)


def test_a_file_of_another_network_than_asked_for(xl_files):
    folder, files = xl_files
    model = diffusers_folder.read(str(folder))
    for kind, merge in (("part", merging.merge_parts), ("lora", merging.merge_loras)):
        file = str(files / f"{kind}.safetensors")
        with pytest.raises(UserError, match=r"text_encoder.*asked for is unet"):
            merge(model, [Addition(file)], networks=("unet",))
