"""What HCP-Diffusion's files say and jaxft does not do: keys without a meaning here, and keys of
features that are not supported. A feature that arrives takes its line with it.

Each key is either taken out of a configuration with a notice, or, unless it asks for what happens
anyway, refused. Patterns are as in `jaxft.schema`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxft.schema import Path, Problem, Schema, Unknown, nearest

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
    "infer_args.strength": "there is no image to begin from",
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
_WHOLE = (
    "a file is put in whole; merge files into the model before, with save_model of jaxft sample"
)
_COMPONENT = "the model's own is used"
_MERGED = "only `part` and `lora` are merged"

REFUSED: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    **{
        f"{groups}.*.{key}": (_one_of(*harmless), reason)
        for groups in ("lora_unet", "lora_text_encoder")
        for key, (harmless, reason) in {
            "bias": ((False,), "the files of LoRAs have no biases; `unet:` trains them"),
            "alpha_auto_scale": ((True,), "alpha is divided by the rank"),
            "branch": ((None,), "a LoRA has one branch"),
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
    "condition": (_NOTHING, "images are made from text alone"),
    "ex_input": (_NOTHING, "images are made from text alone"),
    "infer_args.crop_coord": (_NOTHING, "XL is asked for the whole picture"),
    "infer_args.eta": (_NOTHING, "samplers draw no noise of their own"),
    "merge.plugin_cfg": (_NOTHING, _MERGED),
    "merge.*.lora.*.alpha_auto_scale": (_one_of(True), "alpha is divided by the rank, as stored"),
    "merge.*.lora.*.branch": (_NOTHING, "a LoRA has one branch"),
    "merge.*.lora.*.mask": (_NOTHING, "a LoRA serves prompt and negative prompt alike"),
    "merge.*.plugin": (_NOTHING, _MERGED),
}
"""Pattern -> (whether a value, beside its siblings, asks for no more than jaxft does; what it
does)."""

OLDER: dict[str, str] = {
    "data.*.source.*.tag_transforms": "text_transforms",
    "data.*.source.*.cond_root": "cond_dir",
}
"""Pattern of an older spelling -> the key that it stands for, beside it."""

AVERAGES = ("model.ema_unet", "model.ema_text_encoder")
"""Older spellings of `model.ema`: a decay each, 0 for none."""

LOGGERS = {"CLILogger": "text", "TBLogger": "tensorboard", "WanDBLogger": "wandb"}
"""HCP-Diffusion's, without their module -> key of `logger.log_step`."""

ALWAYS = "train.log, metrics.jsonl and tblog/"

RESUME = ("train", "resume", "ckpt_path")
"""HCP-Diffusion's spelling of `train.warm_start`."""

PLUGINS = ("plugin_unet",)
"""HCP-Diffusion's spelling of `controlnet`, whose plugin of a UNet it is."""

CONTROLNET = {
    "from_layers": ["pre_hook:", "pre_hook:conv_in"],
    "to_layers": [
        *(f"down_blocks.{level}" for level in range(4)),
        "mid_block",
        "pre_hook:up_blocks.3.resnets.2",
    ],
    "train": True,
}
"""The options of that plugin, besides its rate."""

_PATTERNS = {tuple(key.split(".")) for key in (*IGNORED, *REFUSED, *OLDER, *AVERAGES)}
_PATTERNS |= {RESUME, PLUGINS}


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
        for path, _, _ in _pop(tree, tuple(key.split(".")), ()):
            notices.append((path, f"ignored: {reason}"))
    for key, (harmless, reason) in REFUSED.items():
        for path, value, siblings in _pop(tree, tuple(key.split(".")), ()):
            if not harmless(value, siblings):
                problems.append((path, f"not supported: {reason}"))
    for key, newer in OLDER.items():
        for path, value, siblings in _pop(tree, tuple(key.split(".")), ()):
            if value is not None and siblings[newer] not in (None, {}, value):
                problems.append((path, f"{newer}, which it stands for, is given too; keep one"))
            elif value is not None:
                siblings[newer] = value
    _take_averages(tree, notices, problems)
    _take_resume(tree, problems)
    _take_controlnet(tree, problems)
    _take_loggers(tree, notices, problems)
    for (key, value), (instead, reason) in REPLACED.items():
        if tree.get(key) == value:
            tree[key] = instead
            notices.append(((key,), f"{value} is taken as {instead}: {reason}"))


def _take_averages(tree: dict[str, Any], notices: list[Problem], problems: list[Problem]) -> None:
    """Makes `model.ema` of its older spellings, with the power that HCP-Diffusion gives them."""
    for path, value, siblings in [
        found for key in AVERAGES for found in _pop(tree, tuple(key.split(".")), ())
    ]:
        if value in (None, 0):
            continue
        average = {"_target_": "hcpdiff.utils.ema.ModelEMA", "decay_max": value, "power": 0.85}
        if siblings["ema"] in (None, average):
            siblings["ema"] = average
            text = f"taken as model.ema, of all that is trained: decay_max {value}, power 0.85"
            notices.append((path, text))
        else:
            problems.append((path, "model.ema, of all that is trained, says otherwise; keep one"))


def _take_resume(tree: dict[str, Any], problems: list[Problem]) -> None:
    """Makes `train.warm_start` of HCP-Diffusion's `train.resume.ckpt_path`, in both of its forms;
    and of `train.resume.run`, which can stand beside it, `train.resume`."""
    for path, files, _ in _pop(tree, RESUME, ()):
        own = tree["train"]["warm_start"]
        if not isinstance(own, dict) or not isinstance(files, dict):
            continue
        for kind, value in files.items():
            if kind not in own:
                problems.append(((*path, kind), f"unknown key; known here: {', '.join(own)}"))
            elif value and own[kind]:
                problems.append(((*path, kind), f"train.warm_start.{kind} is given too; keep one"))
            elif value:
                own[kind] = _files(value, (*path, kind), problems) if kind != "words" else value
    for _, run, _ in _pop(tree, ("train", "resume", "run"), ()):
        tree["train"].setdefault("resume", run)


def _take_controlnet(tree: dict[str, Any], problems: list[Problem]) -> None:
    """Makes a group of `controlnet` of HCP-Diffusion's plugin, all of which is trained."""
    for path, plugins, _ in _pop(tree, PLUGINS, ()):
        for name, node in plugins.items() if isinstance(plugins, dict) else ():
            options = dict(node) if isinstance(node, dict) else {}
            if not str(options.pop("_target_", None)).endswith("ControlNetPlugin"):
                known = "hcpdiff.models.controlnet.ControlNetPlugin"
                problems.append(((*path, name), f"not supported: no plugins but {known}"))
                continue
            group = {"lr": options.pop("lr", 1e-5), "layers": [""]}
            for key, value in options.items():
                if key not in CONTROLNET or value != CONTROLNET[key]:
                    reason = "a ControlNet is a copy of all of the UNet's way down"
                    problems.append(((*path, name, key), f"not supported: {reason}"))
            tree["controlnet"] = {**(tree.get("controlnet") or {}), name: group}


def _take_loggers(tree: dict[str, Any], notices: list[Problem], problems: list[Problem]) -> None:
    """Makes `logger` of HCP-Diffusion's list of loggers; those of lines and of TensorBoard are
    always there."""
    loggers, steps = tree.get("logger"), dict.fromkeys([*LOGGERS.values(), "metrics"])
    own: dict[str, Any] = {"wandb": None, "log_step": steps}
    if not isinstance(loggers, list):
        return
    for number, node in enumerate(loggers):
        name = str(node.get("_target_")).rpartition(".")[2] if isinstance(node, dict) else ""
        if name not in LOGGERS:
            choices = ", ".join(f"hcpdiff.loggers.{one}" for one in LOGGERS)
            problems.append((("logger", str(number)), f"not supported: choose of {choices}"))
            continue
        steps[LOGGERS[name]] = node.get("log_step")
        if name == "WanDBLogger":
            own["wandb"] = node.get("project", "hcp-diffusion")
    notices.append((("logger",), f"{ALWAYS} are always written"))
    tree["logger"] = own


def _files(value: Any, path: Path, problems: list[Problem]) -> Any:
    """The files of a list, or of a group as in `merge`, of which they are put in whole."""
    if not isinstance(value, dict):
        return value
    group, found = dict(value), []
    if group.pop("base_model_alpha", 0) != 0:
        problems.append(((*path, "base_model_alpha"), f"not supported: {_WHOLE}"))
    for kind in ("part", "lora"):
        for number, item in enumerate(group.pop(kind, None) or ()):
            options = dict(item) if isinstance(item, dict) else {"path": item}
            found.append(options.pop("path", None))
            usual = {"alpha": (1,), "layers": ("all",), "alpha_auto_scale": (True,)}
            for key, one in options.items():
                if one not in usual.get(key, ()):
                    problems.append(((*path, kind, str(number), key), f"not supported: {_WHOLE}"))
    problems.extend(((*path, key), "unknown key; known here: part, lora") for key in group)
    return found


def unwrap(tree: dict[str, Any]) -> None:
    """Takes what is packed in a resolved configuration out of its packing, in place.

    Of text transforms: torchvision's `Compose` of several, or one by itself, becomes a list. Of the
    loss: a list of one, or of one and SSIM, and `WeightedLoss`, which makes the error of x0 that of
    the noise.
    """
    for loss in [node for node in _children([tree], "train") if "criterion" in node]:
        node = loss["criterion"]
        node = node[0] if isinstance(node, list) and len(node) == 1 else node
        if isinstance(node, list) and len(node) == 2:
            node = _with_ssim(*node)
        if isinstance(node, dict) and str(node.get("_target_")).endswith("WeightedLoss"):
            extra = {key: node[key] for key in ("ssim",) if key in node}
            inner = node.get("loss")
            node = inner | extra if isinstance(inner, dict) else inner
        elif isinstance(node, dict) and str(node.get("_target_")).endswith("Weight"):
            node = {
                key: value for key, value in node.items() if key != "loss" or not _is_mse(value)
            }
        loss["criterion"] = node
    for source in _children(_children([tree], "data"), "source"):
        node = source.get("text_transforms")
        if isinstance(node, dict) and isinstance(node.get("transforms"), list):
            source["text_transforms"] = node["transforms"]
        elif isinstance(node, dict) and isinstance(node.get("_target_"), str):
            source["text_transforms"] = [node]


def _is_mse(node: Any) -> bool:
    return isinstance(node, dict) and str(node.get("_target_")).endswith("MSELoss")


def _with_ssim(first: Any, second: Any) -> Any:
    """Of two criteria whose sum is taken, the second SSIM: the first, with that much of it."""
    named = isinstance(first, dict) and isinstance(second, dict)
    if not named or not str(second.get("_target_")).endswith("SSIMLoss"):
        return [first, second]
    return first | {"ssim": second.get("weight", 1.0)}


def _children(nodes: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The mappings in the mappings or lists of that key."""
    found: list[dict[str, Any]] = []
    for node in nodes:
        inner = node.get(key)
        if isinstance(inner, dict):
            inner = list(inner.values())
        items = inner if isinstance(inner, list) else []
        found += [item for item in items if isinstance(item, dict)]
    return found


def _pop(node: Any, pattern: Path, path: Path) -> list[tuple[Path, Any, dict[str, Any]]]:
    """Takes out what matches: path, value and siblings of each. Emptied mappings go as well."""
    if not isinstance(node, dict):
        return []
    found = []
    for key in [key for key in node if pattern[0] in ("*", key)]:
        if len(pattern) == 1:
            found.append(((*path, key), node.pop(key), node))
            continue
        found += _pop(node[key], pattern[1:], (*path, key))
        if node[key] == {}:
            del node[key]
    return found
