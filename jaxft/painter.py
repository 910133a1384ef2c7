"""Images of the weights of a run while it goes on, by the sampler of `jaxft sample`."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft import assembly, charts, gallery, hosts, params, sampling, words
from jaxft import mesh as meshes
from jaxft.assembly import Run
from jaxft.diffusion import conditioning
from jaxft.formats import embeddings
from jaxft.log import RunLog
from jaxft.prediction import Weights, weights_of
from jaxft.shapes import NEGATIVE
from jaxft.step import TrainState, result

WHICH = {"trained": ("trained",), "average": ("average",), "both": ("trained", "average")}
ENDINGS = {"trained": "", "average": "-ema"}
"""Of names of files."""


class Painter:
    """Paints from time to time; `folder` gets a grid of images each time.

    The networks and weights on the devices are used as they lie there. What training does without,
    as the VAE's decoder, is there only meanwhile.
    """

    def __init__(self, run: Run, folder: Path, log: RunLog):
        self._run, self._folder, self._log = run, folder, log
        self._preview = run.plan.preview

    def is_due(self, step: int) -> bool:
        """Whether there are images after this step."""
        preview = self._preview
        return preview is not None and (
            step % preview.every == 0 or step == self._run.plan.total_steps
        )

    def __call__(self, step: int, state: TrainState) -> None:
        """Writes `preview/<step>.png`, and shows it in TensorBoard."""
        preview = self._preview
        assert preview is not None, "is asked for where there is something to paint"
        target = self._folder / "preview"
        for which in WHICH[preview.weights]:
            trained = which == "trained"
            images = self.paint(result(state) if trained else meshes.on_device(state.average))
            if not hosts.is_first():
                continue
            whole = charts.tile(images)
            target.mkdir(exist_ok=True)
            texts = {"jaxft": json.dumps([request._asdict() for request in preview.requests])}
            gallery.write_image(target / f"{step}{ENDINGS[which]}.png", whole, texts, 100)
            self._log.picture(step, f"preview/{which}", whole)

    def paint(self, trainable: Weights) -> list[np.ndarray]:
        """The images [h, w, 3] of some weights, uint8."""
        preview = self._preview
        assert preview is not None, "is asked for where there is something to paint"
        plan, frozen, parts = self._run.plan, self._run.frozen, preview.model.parts
        networks = dict(self._run.objective.networks)
        weights = {name: weights_of(name, trainable, frozen) for name in networks}
        for name, network in preview.model.family.networks.items():
            if name == "vae" or name not in networks:  # also where previews have another one
                config = parts[name].config
                networks[name] = params.abstract(lambda n=network, c=config: n(c))[0]
                weights[name] = assembly.put(plan, dict(parts[name].params))
        rows: dict[str, Any] = {**plan.words.frozen, **trainable.get(words.PART, {})}
        said = conditioning.stack(rows)
        if said is not None:
            self._add_rows(weights, said)
        painted = sampling.generate_images(
            preview.work, preview.model, networks, weights, preview.config
        )
        images = []
        for pixels, finite in painted:
            if not finite:
                self._log.message("preview: an image is not made of numbers")
            images.append(pixels)
        return images

    def _add_rows(self, weights: Weights, rows: Any) -> None:
        """Puts the rows of words behind the tables of the text encoders, in place."""
        family = self._run.plan.model.family
        ends = np.cumsum(embeddings.widths(self._run.plan.model.configs))[:-1]
        for encoder, own in zip(family.text_encoders, jnp.split(rows, ends, axis=1), strict=True):
            for name in {encoder, f"{NEGATIVE}{encoder}"} & weights.keys():
                weights[name] = conditioning.add_rows(weights[name], own)
