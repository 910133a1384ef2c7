"""The loss that a configuration asks for: `train.loss` and `train.noise`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft import compat
from jaxft.config import Config
from jaxft.diffusion import guidance, importance, weighting
from jaxft.diffusion.losses import Criterion, Loss, Width
from jaxft.diffusion.noise import Recipe
from jaxft.diffusion.schedule import NoiseSchedule
from jaxft.errors import UserError

PYRAMID = ("level", "discount", "step_size")
"""Options of pyramid noise."""


def from_config(train: Config, noising: NoiseSchedule) -> Loss:
    """How predictions are judged, and at which noise.

    Args:
        train: the node `train`.
        noising: of the model.

    Raises:
        UserError: an unknown name or option, one without effect, or one that the model's kind of
            prediction gives no meaning to.
    """
    options = train.loss
    criterion: Criterion = compat.build(options.criterion, "criterion", "train.loss.criterion")
    count = len(noising.alphas_cumprod)
    if noising.alphas_cumprod[-1] == 0 and noising.prediction_type == "epsilon":
        raise UserError(
            "the model's noise schedule ends in noise alone (rescale_betas_zero_snr), where the "
            "prediction of noise teaches nothing: it needs prediction_type: v_prediction"
        )
    drawn = None
    if options.timesteps != "uniform" or options.timesteps_kwargs:
        ways = {**weighting.TIMESTEPS, "importance": importance.recipe}
        drawn = _built(ways, options, "timesteps", lambda make, kw: make(count, **kw))
    by_loss = options.timesteps == "importance"
    target = noising.prediction_type if options.target is None else options.target
    weights, units = _weights(criterion, options, noising, target), weighting.units(noising, target)
    if criterion.width is not None:
        width = _width(criterion.width, noising)
        weights = width**criterion.width.power * (1 if weights is None else weights)
        units = width * (1 if units is None else units)
    return Loss(
        criterion.error,
        weights,
        units,
        criterion.ssim,
        options.normalise_mask,
        None if by_loss else drawn,
        drawn if by_loss else None,
        options.low_discrepancy,
        _noise(train.noise),
        guidance.scales(str(train.cfg_scale), count),
    )


def _width(width: Width, noising: NoiseSchedule) -> Any:
    where = "train.loss.criterion"
    if width.schedule not in weighting.WIDTHS:
        names = ", ".join(("constant", *weighting.WIDTHS))
        raise UserError(f"{where}.schedule: {width.schedule!r} is not one of {names}")
    if not 0 < width.least < 1:
        raise UserError(
            f"{where}: {width.least:g} must lie between 0 and 1, to which its schedule falls from 1"
        )
    return weighting.WIDTHS[width.schedule](noising, width.least).astype(np.float32)


def _weights(criterion: Criterion, options: Config, noising: NoiseSchedule, target: str) -> Any:
    if criterion.weighting is None:
        if options.weighting is None:
            if options.weighting_kwargs:
                raise UserError("train.loss.weighting_kwargs: there is no train.loss.weighting")
            return None
        name = options.weighting
        return _built(
            weighting.WEIGHTINGS,
            options,
            "weighting",
            lambda _, kw: weighting.weights(noising, name, target=target, **kw),
        )
    if options.weighting is not None:
        raise UserError(
            f"train.loss.weighting: {options.weighting}, and train.loss.criterion is weighted by "
            f"{criterion.weighting}; keep one"
        )
    return weighting.weights(noising, criterion.weighting, target=target, **criterion.options)


def _built(
    table: Mapping[str, Callable],
    options: Config,
    key: str,
    build: Callable[[Callable, dict[str, Any]], Any],
) -> Any:
    """What a name in the table makes of the options beside it."""
    name, kwargs = options[key], options[f"{key}_kwargs"].to_dict()
    if name not in table:
        raise UserError(f"train.loss.{key}: {name!r} is not one of {', '.join(table)}")
    try:
        return build(table[name], kwargs)
    except TypeError:
        raise UserError(
            f"train.loss.{key}_kwargs: {name} does not take {', '.join(kwargs)}"
        ) from None
    except UserError as error:
        raise UserError(f"train.loss.{key}: {error}") from None


def _noise(options: Config) -> Recipe:
    pyramid = None
    if options.pyramid is not None:
        pyramid = dict(options.pyramid.items())
        if unknown := pyramid.keys() - PYRAMID:
            raise UserError(
                f"train.noise.pyramid: {', '.join(unknown)} unknown; known: {', '.join(PYRAMID)}"
            )
    chance, scale = options.offset_probability, options.adaptive_noise_scale
    if not 0 < chance <= 1:
        raise UserError(f"train.noise.offset_probability: {chance:g} must be above 0, up to 1")
    if chance < 1 and not (options.offset or scale):
        raise UserError(
            "train.noise.offset_probability: there is no offset; set train.noise.offset"
        )
    if scale < 0 and not options.offset:
        raise UserError(
            f"train.noise.adaptive_noise_scale: {scale:g} makes train.noise.offset weaker, which "
            "is 0; set that too"
        )
    return Recipe(options.offset, chance, scale, pyramid, options.perturbation)
