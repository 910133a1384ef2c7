"""`model.ema` and `export.weights` -> the moving average of a run."""

from typing import Any

from jaxft import compat
from jaxft.errors import UserError
from jaxft.tuning.ema import Average


def from_config(config: Any, total_steps: int) -> Average | None:
    """How the average is kept; None: there is none.

    Raises:
        UserError: it would never move, or is to be exported and is not there.
    """
    if config.model.ema is None:
        if config.export and config.export.weights != "trained":
            raise UserError(
                f"export.weights: {config.export.weights}: no average is kept; set model.ema, or "
                "export.weights=trained"
            )
        return None
    average = compat.build(config.model.ema, "average", "model.ema")
    if average.every > total_steps:
        raise UserError(
            f"model.ema.every: {average.every} updates are more than the run has, {total_steps}; "
            "the average would never move"
        )
    return average


def told(average: Average | None) -> list[str]:
    """The average as a line of the plan."""
    if not average:
        return []
    grows = "" if average.power is None else f"up to (power {average.power:.3g}) "
    return [
        f"of all that is trained, decay {grows}{average.decay_max}, every {average.every} updates"
    ]
