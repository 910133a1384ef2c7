"""LoRA files: diffusers and PEFT load what is written, and what they write is read."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from jaxft import low_rank, tensor_file
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, lora, published
from jaxft.low_rank import LowRank

TARGETS = {
    "unet": (
        ".to_q",
        ".to_k",
        ".to_v",
        ".to_out.0",
        ".net.0.proj",
        ".net.2",
        "proj_in",
        "proj_out",
    ),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
"""kohya's default targets: the transformers' layers, the text encoders' attention and MLP."""


def chosen(configs, part: str) -> dict[str, tuple[int, ...]]:
    ends = TARGETS["unet" if part == "unet" else "text"]
    every = lora.modules(configs)[part]
    return {
        module: shape
        for module, shape in every.items()
        if module.endswith(ends) and ("attentions" in module or part != "unet")
    }


def random_lora(configs, rng, ranks=(2, 3), alphas=(1.0, 2.0)) -> low_rank.Lora:
    """Factors for all default targets, of changing rank and alpha."""
    made: low_rank.Lora = {}
    for part in lora.modules(configs):
        for number, (module, shape) in enumerate(chosen(configs, part).items()):
            rank = ranks[number % len(ranks)]
            down = rng.standard_normal((rank, *shape[1:]), np.float32) / np.sqrt(shape[1])
            up = rng.standard_normal((shape[0], rank, *(1,) * (len(shape) - 2)), np.float32)
            made.setdefault(part, {})[module] = LowRank(down, up, alphas[number // 2 % len(alphas)])
    return made


def same(one: low_rank.Lora, other: low_rank.Lora) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(
            np.array_equal(low.down, other[part][module].down)
            and np.array_equal(low.up, other[part][module].up)
            and np.isclose(low.alpha, other[part][module].alpha)
            for module, low in layers.items()
        )
        for part, layers in one.items()
    )


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("SD15", {"unet": 192, "text_encoder": 72}),
        ("SD21", {"unet": 192, "text_encoder": 138}),
        ("SDXL", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_default_targets_are_as_many_modules_as_in_kohyas_trainer(name, counts):
    configs = published.ALL[name]
    assert {part: len(chosen(configs, part)) for part in lora.modules(configs)} == counts
    keys = lora.kohya_names(configs)
    assert len(set(keys.values())) == len(keys)


def test_kohyas_names_are_those_that_webuis_know():
    first, xl = (lora.kohya_names(published.ALL[name]) for name in ("SD15", "SDXL"))
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert first["unet", f"{block}.to_q"] == (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    )
    assert xl["unet", f"{block}.to_q"] == (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert xl["unet", "up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    layer = "text_model.encoder.layers.3.self_attn.q_proj"
    assert first["text_encoder", layer].startswith("lora_te_text_model_encoder_layers_3")
    assert xl["text_encoder", layer].startswith("lora_te1_text_model_")
    assert xl["text_encoder_2", layer].startswith("lora_te2_text_model_")


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_every_form_keeps_factors_rank_and_alpha(folders, kind, tmp_path, rng):
    _, folder = folders(kind)
    configs = diffusers_folder.read_configs(folder)
    made = random_lora(configs, rng)
    lora.write_kohya(tmp_path / "kohya.safetensors", made, configs)
    lora.write_peft(tmp_path / "peft.safetensors", made)
    assert same(lora.read(tmp_path / "kohya.safetensors", configs), made)
    assert same(lora.read(tmp_path / "peft.safetensors", configs), made)
    lora.write_hcp(tmp_path, made)
    unet, text = (
        lora.read(tmp_path / f"{name}.safetensors", configs) for name in ("unet", "text_encoder")
    )
    assert same(unet, {"unet": made.pop("unet")})
    assert same(text, made)


def fused(pipeline: Any, file, strength: float) -> dict[str, Any]:
    """The networks' weights after diffusers has loaded a file and fused it."""
    pipeline.load_lora_weights(str(file), adapter_name="x", local_files_only=True)
    pipeline.fuse_lora(lora_scale=strength)
    pipeline.unload_lora_weights()
    return {
        part: {name: value.detach().numpy() for name, value in network.named_parameters()}
        for part, network in pipeline.components.items()
        if isinstance(network, torch.nn.Module)
    }


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_loads_at_a_strength_what_is_merged_at_it(
    folders,
    kind,
    form,
    tmp_path,
    rng,
):
    pipeline, folder = folders(kind)
    model = diffusers_folder.read(str(folder))
    configs = diffusers_folder.read_configs(folder)
    # diffusers mistakes the layers of a kohya file where their alphas differ.
    made = random_lora(configs, rng, alphas=(2.0,) if form == "kohya" else (1.0, 2.0))
    file = tmp_path / "x.safetensors"
    if form == "kohya":
        lora.write_kohya(file, made, configs)
    else:
        lora.write_peft(file, made)
    opened = type(pipeline).from_pretrained(folder, local_files_only=True)
    theirs = fused(opened, file, 0.7)
    for part, layers in made.items():
        ours = low_rank.merge(model.parts[part].params, layers, 0.7)
        for module in layers:
            name = f"{module}.weight"
            other = theirs[part].get(name, theirs[part].get(name.removeprefix("text_model.")))
            np.testing.assert_allclose(ours[name], other, atol=2e-6, err_msg=f"{part}.{name}")
            assert np.abs(ours[name] - model.parts[part].params[name]).max() > 1e-3


def test_what_peft_writes_is_read(folders, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline, folder = folders("sd2")
    opened = type(pipeline).from_pretrained(folder, local_files_only=True)
    settings = LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False
    )
    opened.unet.add_adapter(settings)
    theirs = get_peft_model_state_dict(opened.unet)
    opened.save_lora_weights(
        tmp_path,
        unet_lora_layers=theirs,
        unet_lora_adapter_metadata={"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "to_v"]},
    )
    (file,) = tmp_path.glob("*.safetensors")
    ours = lora.read(file, diffusers_folder.read_configs(folder))["unet"]
    assert {f"{m}.lora_A.weight" for m in ours} | {f"{m}.lora_B.weight" for m in ours} == set(
        theirs
    )
    for module, low in ours.items():
        assert (low.rank, low.alpha) == (3, 5)
        np.testing.assert_array_equal(low.down, theirs[f"{module}.lora_A.weight"])


def test_kohyas_metadata_is_what_webuis_look_at(folders, tmp_path, rng):
    for kind, version, second in (("sd2", "sd_v2_v", "True"), ("sdxl", "sdxl_base_v1-0", "False")):
        _, folder = folders(kind)
        configs = diffusers_folder.read_configs(folder)
        lora.write_kohya(tmp_path / "x.safetensors", random_lora(configs, rng, (4,)), configs)
        found = tensor_file.read_header(tmp_path / "x.safetensors").metadata
        assert found["ss_base_model_version"] == version
        assert found["ss_v2"] == second
        assert found["ss_network_dim"] == "4"
        assert found["ss_network_alpha"] == "Dynamic"
        assert json.loads(found["ss_network_args"]) == {}


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3), (6, 5, 1, 1)])
def test_extraction_gives_back_a_difference_of_that_rank(shape, rng):
    base = rng.standard_normal(shape, np.float32)
    flat = rng.standard_normal((6, 2)) @ rng.standard_normal((2, base[0].size))
    tuned = base + flat.reshape(shape).astype(np.float32)
    low = low_rank.extract(tuned, base, 2)
    assert low.rank == 2
    np.testing.assert_allclose(base + low.delta(), tuned, atol=1e-4)
    # No factors of rank 1 do better: what is left has the next singular value as its norm.
    left = (tuned - base - low_rank.extract(tuned, base, 1).delta()).reshape(6, -1)
    values = np.linalg.svd(flat.reshape(6, -1), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(left, 2), values[1], rtol=1e-4)


def test_a_lora_for_another_base_is_named(folders, tmp_path, rng):
    _, sd2 = folders("sd2")
    _, xl = folders("sdxl")
    configs = diffusers_folder.read_configs(sd2)
    lora.write_kohya(tmp_path / "a.safetensors", random_lora(configs, rng), configs)
    lora.write_peft(tmp_path / "b.safetensors", random_lora(configs, rng))
    for name in "ab":
        with pytest.raises(UserError, match="another model than Stable Diffusion XL"):
            lora.read(tmp_path / f"{name}.safetensors", diffusers_folder.read_configs(xl))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_unet_conv_in.dora_scale", "dora without down"),
        ("lora_unet_conv_in.hada_w1_a", "loha without hada_w1_b"),
        ("lora_unet_conv_in.oft_blocks", "not supported: BOFT"),
        ("lora_unet_conv_in.w_norm", "not supported: trained norms"),
        ("model.diffusion_model.out.2.bias", "holds no LoRA"),
    ],
)
def test_other_files_are_named(folders, tmp_path, key, said):
    _, folder = folders("sd2")
    tensor_file.write(tmp_path / "x.safetensors", {key: np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=said):
        lora.read(tmp_path / "x.safetensors", diffusers_folder.read_configs(folder))
