"""The loss that a configuration asks for: `train.loss` and `train.noise`."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxft import compat
from jaxft.config import Config
from jaxft.diffusion import guidance, weighting
from jaxft.diffusion.losses import Criterion, Loss
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
    chances = None
    if options.timesteps != "uniform" or options.timesteps_kwargs:
        chances = _built(
            weighting.TIMESTEPS, options, "timesteps", lambda make, kw: make(count, **kw)
        )
    return Loss(
        criterion.error,
        _weights(criterion, options, noising),
        chances,
        options.low_discrepancy,
        _noise(train.noise),
        guidance.scales(str(train.cfg_scale), count),
    )


def _weights(criterion: Criterion, options: Config, noising: NoiseSchedule) -> Any:
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
            lambda _, kw: weighting.weights(noising, name, **kw),
        )
    if options.weighting is not None:
        raise UserError(
            f"train.loss.weighting: {options.weighting}, and train.loss.criterion is weighted by "
            f"{criterion.weighting}; keep one"
        )
    return weighting.weights(noising, criterion.weighting, **criterion.options)


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
    return Recipe(options.offset, pyramid, options.perturbation)
