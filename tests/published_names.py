"""Names and shapes of the published models, as the programs that made them have them.

The lists in `tests/data/names` were written by `scripts/list_published_names.py`, which asks
Stability's `ldm` and `sgm`, OpenCLIP, ControlNet's `cldm`, diffusers and transformers, and uses
nothing of jaxft.
"""

import functools
import gzip

import numpy as np

from tests.conftest import ROOT

Shape = tuple[int, ...]


@functools.cache
def load(model: str) -> dict[str, dict[str, Shape]]:
    """Part -> name -> shape; the single file is the part `webui`."""
    path = ROOT / "tests" / "data" / "names" / f"{model}.txt.gz"
    parts: dict[str, dict[str, Shape]] = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        part, name, shape = line.split()
        is_scalar = name.endswith("logit_scale")
        parts.setdefault(part, {})[name] = () if is_scalar else tuple(map(int, shape.split("x")))
    return parts


def hollow(shapes: dict[str, Shape]) -> dict[str, np.ndarray]:
    """Weights of these shapes that take no memory: one zero each."""
    return {name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()}
