"""Layer patterns against PyTorch's own module tree and the counts in HCP-Diffusion's guide."""

import re

import pytest

from jaxft.errors import UserError
from jaxft.formats.published import SD15
from jaxft.formats.webui_names import names
from jaxft.patterns import match, modules

UNET = [
    name.removeprefix("unet.")
    for name in names(SD15.family, SD15.parts)
    if name.startswith("unet.")
]


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "conv_in",
        "down_blocks.0.resnets",
        "mid_block.attentions.0.transformer_blocks.0.ff",
        r"re:.*\.to_k$",
        r"re:.*\.attn.?$",
        r"re:.*resnets$",
        r"re:(?:up|down)_blocks\.1",  # the colon is part of the regex
        "re:",
    ],
)
def test_takes_what_torch_modules_hold(tiny_pipeline, pattern):
    network = tiny_pipeline.unet
    wanted = set()
    for name, module in network.named_modules():
        regex = pattern.removeprefix("re:")
        if re.match(regex, name) if pattern.startswith("re:") else name == pattern:
            wanted |= {f"{name}.{p}".lstrip(".") for p, _ in module.named_parameters()}
    parameters = [name for name, _ in network.named_parameters()]
    assert set(match([pattern], parameters, "unet")) == wanted


@pytest.mark.parametrize(
    ("pattern", "count"), [(r"re:.*\.to_k$", 32), (r"re:.*\.ff$", 16), (r"re:.*resnets$", 9)]
)
def test_guides_patterns_select_as_many_modules_of_sd15(pattern, count):
    regex = re.compile(pattern[3:])
    assert sum(bool(regex.match(name)) for name in modules(UNET)) == count


def test_order_and_repetition_of_patterns_change_nothing():
    patterns = ["conv_out", r"re:.*\.to_q$", "conv_in", "conv_out"]
    chosen = match(patterns, UNET, "unet")
    assert chosen == match(patterns[::-1], UNET, "unet")
    assert chosen == [name for name in UNET if name in set(chosen)]


def test_a_match_ends_at_a_dot():
    parameters = ["blocks.1.weight", "blocks.10.weight", "blocks.1x.weight"]
    assert match(["blocks.1"], parameters, "unet") == ["blocks.1.weight"]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("down_block.0.resnets", "'down_blocks.0.resnets'"),
        (r"re:.*\.to_kk$", r"to_k'"),
        ("conv_in.weight", "'conv_in'"),
        ("re:zzz", "'conv_in'"),
        ("re:zzz.*", "'conv_in'"),
    ],
)
def test_pattern_without_match_names_near_ones(pattern, near):
    with pytest.raises(UserError, match=re.escape(near)) as error:
        match(["conv_in", pattern], UNET, "unet.0.layers")
    assert "unet.0.layers" in str(error.value)
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize("pattern", ["re:(", "re:*", 3])
def test_pattern_that_is_none(pattern):
    with pytest.raises(UserError, match="lora_unet"):
        match([pattern], UNET, "lora_unet")
