"""The table of `_target_` names: what a configuration may build, and which function builds it.

A name is looked up here and never imported. HCP-Diffusion's names are in the table, and the ends
of these names do as well: `RatioBucket.from_files`, `AdamW`.
"""

import difflib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from jaxft.data import buckets, text_transforms
from jaxft.data.captions import Place
from jaxft.diffusion import losses
from jaxft.diffusion.losses import Criterion
from jaxft.diffusion.scheduler_config import SAMPLERS
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder
from jaxft.tuning.dadapt import dadapt_adam
from jaxft.tuning.eight_bit import adamw_8bit
from jaxft.tuning.ema import average
from jaxft.tuning.factored import adafactor, came
from jaxft.tuning.muon import muon
from jaxft.tuning.optimizers import adamw, lion, prodigy, sgd
from jaxft.tuning.schedule_free import adamw_schedule_free


def scheduler(class_name: str, **options: Any) -> dict[str, Any]:
    """A sampler as `scheduler_config.json` has it, for `scheduler_config.table`, which knows the
    options of each class."""
    return {"_class_name": class_name, **options}


def vae(pretrained_model_name_or_path: str, *, subfolder: str = "") -> diffusers_folder.Component:
    """The VAE in a local folder (its `config.json` and weights), or in a pipeline's `subfolder`."""
    return diffusers_folder.read_component(Path(pretrained_model_name_or_path) / subfolder, "vae")


def caption_loader(form: str, path: str) -> Place:
    """Captions in one form, whatever else a folder holds."""
    return Place(Path(path), form)


def template_fill(
    word_names: Mapping[str, object] | None = None,
) -> text_transforms.TemplateFill:
    """Where a text is put into its template."""
    return text_transforms.TemplateFill(word_names)


_LOADERS = {
    "TXTCaptionLoader": partial(caption_loader, "text"),
    "JsonCaptionLoader": partial(caption_loader, "json"),
    "YamlCaptionLoader": partial(caption_loader, "yaml"),
}

_TEXT_TRANSFORMS = {
    "hcpdiff.utils.caption_tools.TagShuffle": text_transforms.tag_shuffle,
    "hcpdiff.utils.caption_tools.TagDropout": text_transforms.tag_dropout,
    "hcpdiff.utils.caption_tools.TagErase": text_transforms.tag_erase,
    "hcpdiff.utils.caption_tools.TemplateFill": template_fill,
    "jaxft.CaptionDropout": text_transforms.caption_dropout,
    "jaxft.Wildcards": text_transforms.wildcards,
    "jaxft.Prefix": text_transforms.prefix,
    "jaxft.Suffix": text_transforms.suffix,
}


def criterion(
    error: Callable[..., Criterion], reduction: str = "none", ssim: float = 0.0, **options: Any
) -> Criterion:
    """An error of PyTorch's; how it is reduced is not its matter here. `ssim`: how much of 1 - SSIM
    of the clean latents is added."""
    if unknown := options.keys() - inspect.signature(error).parameters:
        raise UserError(f"{min(unknown)}: unknown option")
    return error(**options)._replace(ssim=_amount(ssim))


def _amount(ssim: float) -> float:
    if ssim < 0:
        raise UserError(f"ssim: {ssim:g} must be at least 0")
    return ssim


def weighted_criterion(
    name: str, gamma: float = 1.0, reduction: str = "none", ssim: float = 0.0
) -> Criterion:
    """HCP-Diffusion's squared error, weighted over the timesteps."""
    return Criterion(weighting=name, options={"gamma": gamma}, ssim=_amount(ssim))


_ERRORS = {
    "torch.nn.MSELoss": lambda: Criterion(jnp.square),
    "torch.nn.L1Loss": lambda: Criterion(jnp.abs),
    "torch.nn.HuberLoss": losses.huber,
    "torch.nn.SmoothL1Loss": losses.smooth_l1,
}

_WEIGHTED = {
    "hcpdiff.loss.MinSNRLoss": "min_snr",
    "hcpdiff.loss.SoftMinSNRLoss": "soft_min_snr",
    "hcpdiff.loss.KDiffMinSNRLoss": "kdiff_min_snr",
    "hcpdiff.loss.EDMLoss": "edm",
    "hcpdiff.loss.MinSNRWeight": "x0_min_snr",
    "hcpdiff.loss.SoftMinSNRWeight": "x0_soft_min_snr",
    "hcpdiff.loss.KDiffMinSNRWeight": "x0_kdiff",
    "hcpdiff.loss.EDMWeight": "x0_edm",
}

TARGETS: dict[str, tuple[str, Callable[..., Any]]] = {
    "hcpdiff.data.bucket.RatioBucket.from_files": ("bucket", buckets.ratio_buckets_from_files),
    "hcpdiff.data.bucket.RatioBucket.from_ratios": ("bucket", buckets.ratio_buckets_from_ratios),
    "hcpdiff.data.bucket.SizeBucket.from_files": ("bucket", buckets.size_buckets_from_files),
    "hcpdiff.data.bucket.RatioSizeBucket.from_files": (
        "bucket",
        buckets.ratio_size_buckets_from_files,
    ),
    "hcpdiff.data.bucket.LongEdgeBucket.from_files": (
        "bucket",
        buckets.long_edge_buckets_from_files,
    ),
    "hcpdiff.data.bucket.FixedBucket": ("bucket", buckets.fixed_bucket),
    "torch.optim.AdamW": ("optimizer", adamw),
    "torch.optim.Muon": ("optimizer", muon),
    "torch.optim.SGD": ("optimizer", sgd),
    "transformers.optimization.Adafactor": ("optimizer", adafactor),
    "bitsandbytes.optim.AdamW8bit": ("optimizer", adamw_8bit),
    "came_pytorch.CAME": ("optimizer", came),
    "dadaptation.DAdaptAdam": ("optimizer", dadapt_adam),
    "lion_pytorch.Lion": ("optimizer", lion),
    "prodigyopt.Prodigy": ("optimizer", prodigy),
    "schedulefree.AdamWScheduleFree": ("optimizer", adamw_schedule_free),
    **{name: ("criterion", partial(criterion, error)) for name, error in _ERRORS.items()},
    **{name: ("criterion", partial(weighted_criterion, of)) for name, of in _WEIGHTED.items()},
    "hcpdiff.utils.ema.ModelEMA": ("average", average),
    "diffusers.AutoencoderKL.from_pretrained": ("vae", vae),
    **{f"diffusers.{name}": ("sampler", partial(scheduler, name)) for name in SAMPLERS},
    **{name: ("text transform", function) for name, function in _TEXT_TRANSFORMS.items()},
    **{
        f"hcpdiff.data.{module}{name}": ("caption loader", loader)
        for module in ("caption_loader.", "")
        for name, loader in _LOADERS.items()
    },
}
"""Name -> (kind of thing, function of its options)."""


def build(node: FrozenConfigDict | Mapping[str, Any], kind: str, where: str, **extra: Any) -> Any:
    """What a node of the configuration describes: its function's value.

    Args:
        node: `_target_` and options; the options are the function's keywords.
        kind: of thing that is wanted; the table's names of other kinds will not do.
        where: the node's key, for messages.
        extra: further arguments, which are not the user's to give.

    Raises:
        UserError: names the key of an unknown target, of an unknown, missing or mistyped option,
            and the choices.
    """
    options = {key: value for key, value in node.items() if key != "_partial_"}
    function = _lookup(options.pop("_target_", None), kind, where)
    parameters = inspect.signature(function).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name in parameters if name not in extra]
    types = typing.get_type_hints(inspect.unwrap(getattr(function, "func", function)))
    for option, value in options.items():
        if option not in known and (not free or option.startswith("_")):
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UserError(f"{where}.{option}: unknown option; {hint}")
        if option in types and not _fits(value, types[option]):
            raise UserError(f"{where}.{option}: {_misfit(value, types[option])}")
    missing = [
        name
        for name in known
        if parameters[name].default is inspect.Parameter.empty
        and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        and name not in options
    ]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} must be given")
    try:
        return function(**options, **extra)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _lookup(name: Any, kind: str, where: str) -> Callable[..., Any]:
    choices = {full: function for full, (of, function) in TARGETS.items() if of == kind}
    named = [full for full in choices if name and f".{full}".endswith(f".{name}")]
    if len({id(choices[full]) for full in named}) == 1:  # the same may have two names
        return choices[named[0]]
    if named:
        raise UserError(f"{where}._target_: {name} may be {' or '.join(named)}; choose one")
    ends = {full[at:]: full for full in choices for at in range(len(full)) if f".{full}"[at] == "."}
    near = difflib.get_close_matches(str(name), ends, n=1)
    hint = f"did you mean {ends[near[0]]}? " if near else ""
    raise UserError(
        f"{where}._target_: {name} is no {kind} of jaxft; {hint}choose one of {', '.join(choices)}"
    )


def _misfit(value: Any, wanted: Any) -> str:
    text = f"{value!r} must be {_words(wanted)}"
    if isinstance(value, str) and re.fullmatch(r"[\d.]+(\s*[-+*/]\s*[\d.]+)+", value):
        return f'{text}; a sum is written ${{hcp.eval:"{value}"}}'
    return text


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_WORDS |= {NoneType: "null"}


def _words(wanted: Any) -> str:
    """An annotated type as users would say it."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, UnionType):
        return " or ".join(map(_words, inner))
    if isinstance(origin, type) and issubclass(tuple, origin):
        return f"a list, each {_words(inner[0])}"
    return _WORDS.get(wanted, inspect.formatannotation(wanted))


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of an annotated type; types that YAML does not have always fit."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, UnionType):
        return any(_fits(value, one) for one in typing.get_args(wanted))
    if wanted in (bool, int, float, str, NoneType):
        accepted = (int, float) if wanted is float else wanted
        return isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool))
    if isinstance(origin, type) and issubclass(tuple, origin):
        item = typing.get_args(wanted)[0]
        return isinstance(value, list | tuple) and all(_fits(one, item) for one in value)
    return True
