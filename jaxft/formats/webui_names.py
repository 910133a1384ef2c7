"""Names of Stable Diffusion's weights in diffusers and in the single file, side by side.

Made from the architecture, module by module: each pair is written once, so the table is one to
one. The file's names are those of CompVis' latent-diffusion, which numbers the UNet's blocks
through (`input_blocks.7.1`) and counts the VAE's decoder levels from the image's side; larger text
encoders have OpenCLIP's names.
"""

import enum
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from jaxft.formats.families import Family
from jaxft.models import clip, encoder, unet, vae
from jaxft.models.options import per_level


class Form(enum.Enum):
    """How a weight lies in the file."""

    SAME = "as in diffusers"
    CONV = "a matrix [o, i] as a 1x1 convolution [o, i, 1, 1]"
    TRANSPOSED = "a matrix with its axes exchanged"
    FIRST_ROWS = "the first third of the rows"
    SECOND_ROWS = "the second third of the rows"
    THIRD_ROWS = "the last third of the rows"


class Place(NamedTuple):
    """Where in the file a weight is."""

    key: str
    form: Form = Form.SAME


PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}

UNET_START = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
}
UNET_END = {"conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
VAE_ENDS = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
}
UNET_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}

# Both sides name the inner parts of the UNet's transformers and of CLIP alike.
TRANSFORMER_BLOCK = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff.net.0.proj", "ff.net.2")
TEXT_LAYER = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"),
)
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPENCLIP_ROWS = {
    "self_attn.q_proj": Form.FIRST_ROWS,
    "self_attn.k_proj": Form.SECOND_ROWS,
    "self_attn.v_proj": Form.THIRD_ROWS,
}
"""Layers that OpenCLIP keeps in one, `attn.in_proj`."""

OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
VAE_MATRICES = frozenset(
    f"{half}.mid_block.attentions.0.{layer}.weight"
    for half in ("encoder", "decoder")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
)
"""Linear in diffusers, 1x1 convolutions in the file."""

Pairs = Iterator[tuple[str, str]]


def names(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
    """Diffusers' name -> place in the file, for every weight; one to one.

    Diffusers' names carry the network: `unet.conv_in.weight`, `vae.…`, `text_encoder.…`.

    Args:
        family: of the pipeline.
        configs: folder -> `config.json`, of its networks.
    """
    table = {
        f"unet.{ours}": Place(PREFIXES["unet"] + theirs)
        for ours, theirs in _unet({**unet.FREE, **configs["unet"]})
    }
    for ours, theirs in _vae({**vae.FREE, **configs["vae"]}):
        form = Form.CONV if ours in VAE_MATRICES else Form.SAME
        table[f"vae.{ours}"] = Place(PREFIXES["vae"] + theirs, form)
    for part, prefix in family.text_prefixes.items():
        config = {**clip.FREE, **configs[part]}
        projected = family.networks[part] is clip.CLIPTextModelWithProjection
        listing = _openclip(config, projected) if part in family.openclip else _clip(config)
        for ours, place in listing:
            table[f"{part}.{ours}"] = place._replace(key=prefix + place.key)
    return table


def layer(ours: str, theirs: str) -> Pairs:
    """Weight and bias of a layer."""
    yield f"{ours}.weight", f"{theirs}.weight"
    yield f"{ours}.bias", f"{theirs}.bias"


def _layers(ours: str, theirs: str, table: Mapping[str, str]) -> Pairs:
    for mine, other in table.items():
        yield from layer(f"{ours}.{mine}", f"{theirs}.{other}")


def _unet(config: Mapping[str, Any]) -> Pairs:
    widths = config["block_out_channels"]
    last = len(widths) - 1
    layers = per_level(config["layers_per_block"], len(widths))
    depths = per_level(config["transformer_layers_per_block"], len(widths))
    yield from way_down(config)
    # Channels at hand, and those of the skip connections; the file's counter.
    width, skips, n = widths[last], encoder.skip_widths(SimpleNamespace(**config)), 0
    for i, kind in enumerate(config["up_block_types"]):
        block, level = f"up_blocks.{i}", last - i
        crossed = kind == "CrossAttnUpBlock2D"
        for j in range(layers[level] + 1):
            narrows = width + skips.pop() != widths[level]
            yield from _resnet(f"{block}.resnets.{j}", f"output_blocks.{n}.0", narrows)
            if crossed:
                ours, theirs = f"{block}.attentions.{j}", f"output_blocks.{n}.1"
                yield from _transformer(ours, theirs, depths[level])
            width, n = widths[level], n + 1
        if i < last:
            place = 2 if crossed else 1  # after the transformer, where there is one
            theirs = f"output_blocks.{n - 1}.{place}.conv"
            yield from layer(f"{block}.upsamplers.0.conv", theirs)
    for ours, theirs in UNET_END.items():
        yield from layer(ours, theirs)


def way_down(config: Mapping[str, Any]) -> Pairs:
    """The part of a UNet that a ControlNet copies: (diffusers' name, the file's), no prefixes."""
    widths = config["block_out_channels"]
    last = len(widths) - 1
    layers = per_level(config["layers_per_block"], len(widths))
    depths = per_level(config["transformer_layers_per_block"], len(widths))
    ends = UNET_START | (UNET_ADDED if config["addition_embed_type"] else {})
    for ours, theirs in ends.items():
        yield from layer(ours, theirs)
    width, n = widths[0], 1  # channels at hand; the file's counter
    for level, kind in enumerate(config["down_block_types"]):
        block = f"down_blocks.{level}"
        for j in range(layers[level]):
            widens = width != widths[level]
            yield from _resnet(f"{block}.resnets.{j}", f"input_blocks.{n}.0", widens)
            if kind == "CrossAttnDownBlock2D":
                ours, theirs = f"{block}.attentions.{j}", f"input_blocks.{n}.1"
                yield from _transformer(ours, theirs, depths[level])
            width, n = widths[level], n + 1
        if level < last:
            yield from layer(f"{block}.downsamplers.0.conv", f"input_blocks.{n}.0.op")
            n += 1
    yield from _resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", depths[last])
    yield from _resnet("mid_block.resnets.1", "middle_block.2", False)


def _resnet(ours: str, theirs: str, shortcut: bool) -> Pairs:
    yield from _layers(ours, theirs, UNET_RESNET)
    if shortcut:
        yield from layer(f"{ours}.conv_shortcut", f"{theirs}.skip_connection")


def _transformer(ours: str, theirs: str, depth: int) -> Pairs:
    layers = ["norm", "proj_in", "proj_out"]
    layers += [f"transformer_blocks.{d}.{name}" for d in range(depth) for name in TRANSFORMER_BLOCK]
    for name in _parameters(layers):
        yield f"{ours}.{name}", f"{theirs}.{name}"


def _parameters(layers: Iterable[str]) -> Iterator[str]:
    """Weight and bias of each layer; attention's four matrices, of which one has a bias."""
    for layer in layers:
        if layer.endswith(("attn1", "attn2")):
            yield from (f"{layer}.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0"))
            yield f"{layer}.to_out.0.bias"
        else:
            yield from (f"{layer}.weight", f"{layer}.bias")


def _vae(config: Mapping[str, Any]) -> Pairs:
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    last = len(widths) - 1
    for ours, theirs in VAE_ENDS.items():
        yield from layer(ours, theirs)
    for half in ("encoder", "decoder"):
        ours, theirs = f"{half}.mid_block", f"{half}.mid"
        yield from _layers(f"{ours}.resnets.0", f"{theirs}.block_1", VAE_RESNET)
        yield from _layers(f"{ours}.attentions.0", f"{theirs}.attn_1", VAE_ATTENTION)
        yield from _layers(f"{ours}.resnets.1", f"{theirs}.block_2", VAE_RESNET)
    for level, width in enumerate(widths):
        ours, theirs = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        yield from _vae_level(ours, theirs, layers, widths[max(level - 1, 0)] != width)
        if level < last:
            yield from layer(f"{ours}.downsamplers.0.conv", f"{theirs}.downsample.conv")
        ours, theirs = f"decoder.up_blocks.{last - level}", f"decoder.up.{level}"
        yield from _vae_level(ours, theirs, layers + 1, widths[min(level + 1, last)] != width)
        if level > 0:
            yield from layer(f"{ours}.upsamplers.0.conv", f"{theirs}.upsample.conv")


def _vae_level(ours: str, theirs: str, layers: int, shortcut: bool) -> Pairs:
    for j in range(layers):
        yield from _layers(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", VAE_RESNET)
    if shortcut:
        yield from layer(f"{ours}.resnets.0.conv_shortcut", f"{theirs}.block.0.nin_shortcut")


def _clip(config: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    """A text encoder under the names that transformers has too."""
    count = config["num_hidden_layers"]
    layers = [f"encoder.layers.{i}.{name}" for i in range(count) for name in TEXT_LAYER]
    for name in (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        *_parameters([*layers, "final_layer_norm"]),
    ):
        yield f"text_model.{name}", Place(f"text_model.{name}")


def _openclip(config: Mapping[str, Any], projected: bool) -> Iterator[tuple[str, Place]]:
    """A text encoder under OpenCLIP's names."""
    for ours, theirs in OPENCLIP_ENDS.items():
        yield ours, Place(theirs)
    for i in range(config["num_hidden_layers"]):
        layer, block = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for ours, theirs in _layers(layer, block, OPENCLIP_LAYER):
            yield ours, Place(theirs)
        for name, rows in OPENCLIP_ROWS.items():
            for leaf in ("weight", "bias"):
                yield f"{layer}.{name}.{leaf}", Place(f"{block}.attn.in_proj_{leaf}", rows)
    if projected:
        yield "text_projection.weight", Place("text_projection", Form.TRANSPOSED)
