"""HCP-Diffusion's part files: its keys, its formula."""

import numpy as np
import pytest

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import hcp
from tests.test_formats import same_bits


@pytest.fixture
def base(rng) -> dict[str, np.ndarray]:
    layers = ("blocks.1.weight", "blocks.10.weight", "out.bias")
    return {name: rng.standard_normal((3, 4)).astype(np.float32) for name in layers}


def test_part_file_has_hcps_keys_and_comes_back(base, tmp_path):
    hcp.write_part(tmp_path / "unet-1.safetensors", base)
    assert set(params.load(tmp_path / "unet-1.safetensors")) == {f"base:{name}" for name in base}
    assert same_bits(hcp.read_part(tmp_path / "unet-1.safetensors"), base)


def test_merge_of_the_whole_is_the_part_itself(base):
    part = {name: -array for name, array in base.items()}
    spoilt = {name: np.full_like(array, np.nan) for name, array in base.items()}
    assert same_bits(hcp.merge_part(spoilt, part, alpha=1.0), part)


def test_merge_is_linear(base, rng):
    part = {name: rng.standard_normal((3, 4)).astype(np.float32) for name in list(base)[:2]}
    merged = hcp.merge_part(base, part, alpha=0.3, base_model_alpha=0.6)
    for name in part:
        wanted = 0.6 * base[name].astype(np.float64) + 0.3 * part[name].astype(np.float64)
        np.testing.assert_allclose(merged[name], wanted, atol=1e-6)  # float32's rounding
    assert merged["out.bias"] is base["out.bias"]


def test_merge_of_layers_ends_at_a_dot(base):
    part = {name: array + 1 for name, array in base.items()}
    merged = hcp.merge_part(base, part, alpha=1.0, layers=["blocks.1"])
    assert {name for name in base if merged[name] is not base[name]} == {"blocks.1.weight"}


def test_merge_keeps_the_precision_of_the_part(base):
    half = params.cast(base, np.float16)
    assert same_bits(hcp.merge_part(half, base, alpha=1.0), base)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lora:conv_in.___.layer.W_up", "not supported yet: LoRA part"),
        ("plugin:x.___.weight", "not supported yet: plugin part"),
        ("base_ema:conv_in.weight", "no weights"),
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
        hcp.merge_part(base, wrong, alpha=1.0, source="other.safetensors")
    assert "out.bias (3,), expected (3, 4)" in str(error.value)
    assert "other.safetensors" in str(error.value)


def test_layers_without_trained_weights(base):
    with pytest.raises(UserError, match=r"blocks\.1"):
        hcp.merge_part(base, {"out.bias": base["out.bias"]}, alpha=1.0, layers="blocks.1")
