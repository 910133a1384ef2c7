"""HCP-Diffusion's spellings of what jaxft calls otherwise; `foreign` has what jaxft lacks."""

from typing import Any

from jaxft.schema import Path, Problem, pop

WHOLE = "a file is put in whole; merge files into the model before, with save_model of jaxft sample"

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

MERGED_PLUGINS = ("merge", "*", "plugin")
"""HCP-Diffusion's spelling of a ControlNet to sample with."""

PLUGIN_FILE = ("merge", "plugin_cfg")
"""Its file of what that plugin is."""

MASK = ("merge", "*", "lora", "*", "mask")
"""HCP-Diffusion's older spelling of a LoRA's `branch`."""

MASKS = (([0, 0.5], "n"), ([0.5, 1], "p"))
"""Its values, shares of a batch whose first half are negative prompts, and what they stand for."""

PATTERNS = {tuple(key.split(".")) for key in (*OLDER, *AVERAGES)} | {RESUME, PLUGINS, MASK}
PATTERNS |= {MERGED_PLUGINS, PLUGIN_FILE}
"""All of them."""


def take(tree: dict[str, Any], notices: list[Problem], problems: list[Problem]) -> None:
    """Makes jaxft's keys of them in a resolved configuration, in place."""
    for key, newer in OLDER.items():
        for path, value, siblings in pop(tree, tuple(key.split(".")), ()):
            if value is not None and siblings[newer] not in (None, {}, value):
                problems.append((path, f"{newer}, which it stands for, is given too; keep one"))
            elif value is not None:
                siblings[newer] = value
    _take_branches(tree, problems)
    _take_averages(tree, notices, problems)
    _take_resume(tree, problems)
    _take_controlnet(tree, problems)
    _take_merged_controlnet(tree, problems)
    _take_loggers(tree, notices, problems)


def _take_averages(tree: dict[str, Any], notices: list[Problem], problems: list[Problem]) -> None:
    """Makes `model.ema` of its older spellings, with the power that HCP-Diffusion gives them."""
    for path, value, siblings in [
        found for key in AVERAGES for found in pop(tree, tuple(key.split(".")), ())
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


def _take_branches(tree: dict[str, Any], problems: list[Problem]) -> None:
    """Takes HCP-Diffusion's spellings of LoRAs with a `branch`, which any kind can have here."""
    for path, mask, siblings in pop(tree, MASK, ()):
        sides = [side for rows, side in MASKS if rows == mask]
        if mask and not sides:
            problems.append((path, "not supported: it can be [0, 0.5] or [0.5, 1]; use branch"))
        siblings["branch"] = sides[0] if sides else siblings.get("branch")
    for groups in ("lora_unet", "lora_text_encoder"):
        for group in _children([tree], groups):
            if group.get("type") == "dapp":
                group["type"] = "lora"


def _take_resume(tree: dict[str, Any], problems: list[Problem]) -> None:
    """Makes `train.warm_start` of HCP-Diffusion's `train.resume.ckpt_path`, in both of its forms;
    and of `train.resume.run`, which can stand beside it, `train.resume`."""
    for path, files, _ in pop(tree, RESUME, ()):
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
    for _, run, _ in pop(tree, ("train", "resume", "run"), ()):
        tree["train"].setdefault("resume", run)


def _take_controlnet(tree: dict[str, Any], problems: list[Problem]) -> None:
    """Makes a group of `controlnet` of HCP-Diffusion's plugin, all of which is trained."""
    for path, plugins, _ in pop(tree, PLUGINS, ()):
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


def _take_merged_controlnet(tree: dict[str, Any], problems: list[Problem]) -> None:
    """Makes `controlnet` of the plugin that HCP-Diffusion merges, which its file says is one."""
    named = any(file for _, file, _ in pop(tree, PLUGIN_FILE, ()))
    for path, plugins, _ in pop(tree, MERGED_PLUGINS, ()):
        for name, node in plugins.items() if isinstance(plugins, dict) else ():
            options = dict(node) if isinstance(node, dict) else {}
            place = options.pop("path", None)
            if options.pop("layers", "all") != "all" or options or not named:
                reason = "no plugins but one ControlNet, of merge.plugin_cfg and a path"
                problems.append(((*path, name), f"not supported: {reason}"))
            elif tree.get("controlnet") not in (None, place):
                problems.append(((*path, name), "there is another controlnet; keep one"))
            else:
                tree["controlnet"] = place


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
        problems.append(((*path, "base_model_alpha"), f"not supported: {WHOLE}"))
    for kind in ("part", "lora"):
        for number, item in enumerate(group.pop(kind, None) or ()):
            options = dict(item) if isinstance(item, dict) else {"path": item}
            found.append(options.pop("path", None))
            usual = {"alpha": (1,), "layers": ("all",), "alpha_auto_scale": (True,)}
            for key, one in options.items():
                if one not in usual.get(key, ()):
                    problems.append(((*path, kind, str(number), key), f"not supported: {WHOLE}"))
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
