"""The ControlNet that a run trains: a copy of the UNet's way down, or one of an earlier run."""

from collections.abc import Sequence
from pathlib import Path

from jaxft import params, tensor_file
from jaxft.config import Config
from jaxft.data.loader import Dataset
from jaxft.errors import UserError
from jaxft.formats import controlnet, diffusers_folder, hcp
from jaxft.formats.diffusers_folder import Component, Model
from jaxft.models.encoder import FREE

PART = "controlnet"
"""Its name among the networks of a model, in groups and in names of files."""

SHARED = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""Options that it has as its UNet: what it gives and takes has their shapes."""


def add(config: Config, model: Model) -> Model:
    """The model with the ControlNet that groups of `config.controlnet` train; as it is, if there
    are none.

    Raises:
        UserError: `model.controlnet` is no ControlNet of this model, or has no effect; or previews
            are asked for, which are of text alone.
    """
    place = config.model.controlnet
    if not config.controlnet:
        if place is not None:
            raise UserError(f"model.controlnet: {place}: has no effect: no group trains it")
        return model
    if config.previewer is not None and config.previewer.infer_cfg is not None:
        raise UserError(
            "previewer.infer_cfg: previews are made from text alone, without the ControlNet that "
            "is trained; leave it out"
        )
    if diffusers_folder.is_inpainting(model):
        raise UserError(
            f"controlnet: {model.folder} is an inpainting model; ControlNets are trained with the "
            "text-to-image model that it comes from"
        )
    unet = model.parts["unet"]
    own = controlnet.from_unet(unet, config.seed)
    if place is not None:
        own = _read(Path(place).expanduser(), own)
        _check_fits(place, own, unet)
    return model.replace(**{PART: own})


def _read(path: Path, fresh: Component) -> Component:
    """A ControlNet of a folder, of a single file, or of a part file with weights for `fresh`."""
    try:
        if path.is_dir():
            return controlnet.read_folder(path)
        stored = tensor_file.read(path)
        if not any(key.startswith("base:") for key in stored):
            return controlnet.from_file(path, stored)
        part = hcp.read_part(path)
        params.check(part, {name: fresh.params.get(name) for name in part}, str(path))
        return fresh._replace(params={**fresh.params, **part})
    except UserError as error:
        raise UserError(f"model.controlnet: {error}") from None


def _check_fits(place: str, own: Component, unet: Component) -> None:
    def option(component: Component, key: str) -> object:
        value = component.config.get(key, FREE[key])
        return tuple(value) if isinstance(value, list) else value

    for key in SHARED:
        ours, theirs = option(own, key), option(unet, key)
        if ours != theirs:
            raise UserError(
                f"model.controlnet: {place} is of another model: its {key} is {ours}, the UNet's "
                f"{theirs}"
            )


def check_data(model: Model, datasets: Sequence[Dataset]) -> None:
    """Raises UserError unless there are conditioning images just where a ControlNet is trained."""
    for dataset in datasets:
        if dataset.with_conditions and PART not in model.parts:
            raise UserError(
                f"data.{dataset.name}: its conditioning images have no effect: no ControlNet is "
                "trained; add a group such as `controlnet: [{lr: 1e-5, layers: ['']}]`, or leave "
                "them out"
            )
        if not dataset.with_conditions and PART in model.parts:
            raise UserError(
                f"data.{dataset.name}: the ControlNet that is trained sees an image beside each; "
                "name their folder, cond_dir, in each source"
            )
