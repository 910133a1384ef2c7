"""What HCP-Diffusion's files say and jaxft does not do: keys without a meaning here, and keys of
features that are not supported. A feature that arrives takes its line with it.

Each key is either taken out of a configuration with a notice, or, unless it asks for what happens
anyway, refused. Patterns are as in `jaxft.schema`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxft import spellings
from jaxft.schema import Path, Problem, Schema, Unknown, nearest, pop

IGNORED: dict[str, str] = {
    "allow_tf32": "the precision follows from mixed_precision",
    "vis_info": "it has no effect in HCP-Diffusion either",
    "train.set_grads_to_none": "gradients are not kept between updates",
    "model.enable_xformers": "the attention kernel is chosen by the device",
    "model.force_cast_precision": "weights are float32, mixed_precision is what computes",
    "model.ema.device": "the average lies where the weights lie",
    "model.vae_dtype": "the precision of the VAE is chosen by jaxft",
    "data.*.att_mask_encode": "it has no effect in HCP-Diffusion either",
    "data.*.cache_path": "cache_dir is the folder that latents are kept in",
    "data.*.return_path": "batches are not seen by users",
    "data.*.bucket.pre_build_bucket": "a run keeps its buckets in buckets.json, for its resumes",
    "encoder_attention_mask": "the padding of a prompt is seen, as it is in training",
    "merge.*.lora.*.dropout": "nothing is dropped while sampling",
    "interface": "images are written to save.out_dir",
    "offload": "parts of the model are not moved between devices",
    "infer_args.strength": "images begin as noise alone",
    "infer_args.output_type": "images are written to save.out_dir",
    "vae_optimize": "the VAE runs in one piece",
}
"""Pattern -> why it does nothing."""

REPLACED: dict[tuple[str, Any], tuple[Any, str]] = {
    ("mixed_precision", "fp16"): ("bf16", "bfloat16 needs no scaling of the loss"),
    ("dtype", "amp"): ("bf16", "the precision that is computed in, over float32 weights"),
}
"""(key, value) -> what is taken instead, and why."""


def _one_of(*harmless: Any) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, siblings: any(value == one for one in harmless)


_NOTHING = _one_of(None, [], {}, 0)
_LOSS = "the loss is that of what the model predicts"
_COMPONENT = "the model's own is used"

REFUSED: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    **{
        f"{groups}.*.{key}": (_one_of(*harmless), reason)
        for groups in ("lora_unet", "lora_text_encoder")
        for key, (harmless, reason) in {
            "bias": ((False,), "the files of LoRAs have no biases; `unet:` trains them"),
            "alpha_auto_scale": ((True,), "alpha is divided by the rank"),
        }.items()
    },
    "plugin_TE": (_NOTHING, "no plugins"),
    "previewer._target_": (
        _one_of("hcpdiff.loggers.preview.ImagePreviewer", "ImagePreviewer"),
        "the previewer is hcpdiff.loggers.preview.ImagePreviewer",
    ),
    "train.resume.start_step": (
        _NOTHING,
        "a warm start begins with step 1; --resume RUN takes up a run's whole state, step and all",
    ),
    "train.loss.type": (_one_of("eps"), _LOSS),
    "train.loss.target_type": (_one_of("x0", "eps"), _LOSS),
    "train.loss.pred_type": (_one_of("eps"), _LOSS),
    "model.tokenizer": (_NOTHING, _COMPONENT),
    "model.noise_scheduler": (
        _NOTHING,
        "the model's own is used; for coarser noise added, set train.noise.pyramid",
    ),
    "model.unet": (_NOTHING, _COMPONENT),
    "model.text_encoder": (_NOTHING, _COMPONENT),
    "model.vae": (_NOTHING, _COMPONENT),
    "model.wrapper": (_NOTHING, _COMPONENT),
    "data.*._target_": (
        _one_of(
            "hcpdiff.data.TextImagePairDataset",
            "TextImagePairDataset",
            "hcpdiff.data.CropInfoPairDataset",  # what XL is told of sizes and crops it always is
            "CropInfoPairDataset",
            "hcpdiff.data.TextImageCondPairDataset",
            "TextImageCondPairDataset",
        ),
        "datasets are hcpdiff.data.TextImagePairDataset, TextImageCondPairDataset or "
        "CropInfoPairDataset",
    ),
    "data.*.encoder_attention_mask": (_one_of(False), "the padding of a caption is seen"),
    "data.*.source.*._target_": (
        _one_of(
            "hcpdiff.data.source.Text2ImageAttMapSource",
            "hcpdiff.data.source.Text2ImageCondSource",
            "hcpdiff.data.source.Text2ImageSource",
            "hcpdiff.data.Text2ImageAttMapSource",
            "hcpdiff.data.Text2ImageCondSource",
            "hcpdiff.data.Text2ImageSource",
            "Text2ImageAttMapSource",
            "Text2ImageCondSource",
            "Text2ImageSource",
        ),
        "sources are hcpdiff.data.source.Text2ImageSource, Text2ImageAttMapSource or "
        "Text2ImageCondSource",
    ),
    "data.*.source.*.image_transforms": (_NOTHING, "images are resized and cropped, nothing else"),
    "condition.type": (
        _one_of("inpaint", None),
        "no image to begin from; type: inpaint is for inpainting models",
    ),
    "ex_input.cond._target_": (
        _one_of("hcpdiff.data.data_processor.ControlNetProcessor", "ControlNetProcessor"),
        "what is seen besides is the image of a ControlNet",
    ),
    "infer_args.crop_coord": (_NOTHING, "XL is asked for the whole picture"),
    "infer_args.eta": (_NOTHING, "samplers draw no noise of their own"),
    "merge.*.lora.*.alpha_auto_scale": (_one_of(True), "alpha is divided by the rank, as stored"),
}
"""Pattern -> (whether a value, beside its siblings, asks for no more than jaxft does; what it
does)."""

_PATTERNS = {tuple(key.split(".")) for key in (*IGNORED, *REFUSED)} | spellings.PATTERNS


def known(path: Path) -> bool:
    """Whether a path leads to a key of the tables, or lies below one."""
    return any(
        all(step in ("*", key) for step, key in zip(pattern, path, strict=False))
        for pattern in _PATTERNS
    )


def names(parent: Path) -> list[str]:
    """The keys of the tables that lie directly in a place."""
    depth = len(parent)
    return [
        pattern[depth]
        for pattern in _PATTERNS
        if len(pattern) > depth
        and all(step in ("*", key) for step, key in zip(pattern, parent, strict=False))
    ]


def unknown(key: Unknown, schema: Schema) -> Problem:
    """What to say of a key that neither the schema nor the tables have."""
    path, value, here = key
    if "." in path[-1]:
        return path, "a name must not hold a dot"
    while known(path) and isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        path, here = (*path, name), []
    meant = nearest(schema, path, here + names(path[:-1]))
    hint = f"did you mean {meant}?" if meant else f"known here: {', '.join(here)}"
    return path, f"unknown key; {hint}"


def take_out(tree: dict[str, Any], notices: list[Problem], problems: list[Problem]) -> None:
    """Takes the tables' keys out of a resolved configuration, in place.

    What is ignored or replaced is added to `notices`, what is refused to `problems`.
    """
    for key, reason in IGNORED.items():
        for path, _, _ in pop(tree, tuple(key.split(".")), ()):
            notices.append((path, f"ignored: {reason}"))
    for key, (harmless, reason) in REFUSED.items():
        for path, value, siblings in pop(tree, tuple(key.split(".")), ()):
            if not harmless(value, siblings):
                problems.append((path, f"not supported: {reason}"))
    spellings.take(tree, notices, problems)
    for (key, value), (instead, reason) in REPLACED.items():
        if tree.get(key) == value:
            tree[key] = instead
            notices.append(((key,), f"{value} is taken as {instead}: {reason}"))
