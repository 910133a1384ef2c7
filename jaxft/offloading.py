"""`train.offload` -> what of a run's state lies in the host's memory."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxft import mesh as meshes
from jaxft.config import Config
from jaxft.errors import UserError

FIELDS = {"optimizer": "opt_state", "average": "average"}
"""Words of `train.offload` -> fields of `step.TrainState`."""


def from_config(config: Config, mesh: Mesh) -> list[str]:
    """Fields of `step.TrainState` that lie in the host's memory.

    Raises:
        UserError: an unknown word, an average that is not kept, or devices that cannot do it.
    """
    words = config.train.offload
    if unknown := [word for word in words if word not in FIELDS]:
        raise UserError(
            f"train.offload: {', '.join(map(repr, unknown))}: what can lie in the host's memory is "
            f"{' and '.join(FIELDS)}"
        )
    if "average" in words and config.model.ema is None:
        raise UserError(
            "train.offload: average: no average is kept; set model.ema, or leave average out"
        )
    if words and not meshes.has_host_memory(mesh):
        raise UserError(
            f"train.offload: programs of {mesh.devices.flat[0].device_kind} cannot use the host's "
            f"memory ({meshes.HOST}) with jax {jax.__version__}; leave it out"
        )
    return [FIELDS[word] for word in words]


def told(words: Sequence[str]) -> list[str]:
    """What is offloaded as a line of the plan."""
    return [f"{', '.join(words)}: in the host's memory but while it changes"] if words else []
