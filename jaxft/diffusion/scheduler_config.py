"""Which sampler a diffusers scheduler configuration asks for, and with which options."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxft.diffusion.samplers import Table, ddim, dpm_solver_plus_plus, euler, plms
from jaxft.diffusion.schedule import DEFAULTS, check_types, from_config
from jaxft.errors import UserError


class Sampler(NamedTuple):
    """One of diffusers' scheduler classes."""

    name: str
    """What webuis call it."""
    build: Callable[..., Table]
    """(schedule, num_inference_steps, **options) -> Table; its defaults are the class's own."""
    fixed: Mapping[str, Any]
    """The class's other options with their defaults: each has one value that is supported
    (`CHOICES`), or no effect given those."""


SAMPLERS = {
    "DDIMScheduler": Sampler(
        "DDIM",
        ddim,
        {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0},
    ),
    "PNDMScheduler": Sampler("PLMS", plms, {"skip_prk_steps": False}),
    "EulerDiscreteScheduler": Sampler(
        "Euler",
        euler,
        {
            "timestep_type": "discrete",
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        },
    ),
    "DPMSolverMultistepScheduler": Sampler(
        "DPM++ 2M",
        dpm_solver_plus_plus,
        {
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "thresholding": False,
            "dynamic_thresholding_ratio": 0.995,
            "sample_max_value": 1.0,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "use_lu_lambdas": False,
            "use_flow_sigmas": False,
            "flow_shift": 1.0,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
            "use_dynamic_shifting": False,
            "time_shift_type": "exponential",
        },
    ),
}
"""Name of the class in diffusers -> sampler."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "lambda_min_clipped": (-math.inf,),
    "skip_prk_steps": (True,),
    "solver_order": (1, 2),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False, None),
    "variance_type": (None,),
}
"""Supported values of the options that are not numbers or switches."""


def table(
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    where: str = "scheduler_config.json",
    strict: bool = False,
) -> Table:
    """The table of the sampler that `config` describes.

    `config` is a diffusers scheduler's: `_class_name` and any of that class's options, which have
    the class's own defaults. Options of other classes (Stable Diffusion 1.5's own file has some)
    are ignored, as diffusers does with a file; with `strict` they are errors.

    Raises:
        UserError: a class, an option or a value that is not supported, naming key and choices;
            the message starts with `where`.
    """
    class_name = config.get("_class_name")
    if class_name not in SAMPLERS:
        raise UserError(
            f"{where}: the scheduler {class_name} is not supported; "
            f"choose one of {', '.join(SAMPLERS)} (new_components.scheduler._target_)"
        )
    sampler = SAMPLERS[class_name]
    parameters = inspect.signature(sampler.build).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    defaults = {**DEFAULTS, **sampler.fixed, **own}
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    foreign = sorted(set(given) - set(defaults))
    if strict and foreign:
        near = difflib.get_close_matches(foreign[0], defaults, n=1)
        raise UserError(
            f"{where}: {class_name} has no option {foreign[0]}"
            + (f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(defaults))}")
        )
    options = {key: given.get(key, default) for key, default in defaults.items()}
    for key, allowed in CHOICES.items():
        if key in options and options[key] not in allowed:
            raise UserError(
                f"{where}: {class_name} with {key}: {options[key]!r} is not supported; "
                f"choose {' or '.join(str(value) for value in allowed)}"
            )
    check_types(
        options, {key: default for key, default in own.items() if key not in CHOICES}, where
    )
    schedule = from_config(given, where)
    return sampler.build(schedule, num_inference_steps, **{key: options[key] for key in own})


def display_name(config: Mapping[str, Any]) -> str:
    """What webuis call the sampler of a supported configuration, such as "DPM++ 2M Karras"."""
    name = SAMPLERS[config["_class_name"]].name
    return f"{name} Karras" if config.get("use_karras_sigmas") else name
