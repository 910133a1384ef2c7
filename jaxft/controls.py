"""The ControlNet that a run trains, a copy of the UNet's way down or one of an earlier run; or that
images are sampled with."""

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
        UserError: `model.controlnet` is no ControlNet of this model, or has no effect.
    """
    place = config.model.controlnet
    if not config.controlnet:
        if place is not None:
            raise UserError(f"model.controlnet: {place}: has no effect: no group trains it")
        return model
    if diffusers_folder.is_inpainting(model):
        raise UserError(
            f"controlnet: {model.folder} is an inpainting model; ControlNets are trained with the "
            "text-to-image model that it comes from"
        )
    if place is not None:
        return read(place, model, "model.controlnet", config.seed)
    return model.replace(**{PART: controlnet.from_unet(model.parts["unet"], config.seed)})


def read(place: str, model: Model, key: str, seed: int | None = None) -> Model:
    """The model with a ControlNet of a folder, of a single file, or of a part file.

    Args:
        place: folder or file.
        model: that it is to be beside.
        key: that names it, for errors.
        seed: of weights that a part file lacks; None: it must have all.

    Raises:
        UserError: it is unreadable, or of another model.
    """
    path, unet = Path(place).expanduser(), model.parts["unet"]
    try:
        if path.is_dir():
            own = controlnet.read_folder(path)
        else:
            stored = tensor_file.read(path)
            is_part = any(name.startswith("base:") for name in stored)
            own = _of_part(path, unet, seed) if is_part else controlnet.from_file(path, stored)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    _check_fits(f"{key}: {place}", own, unet)
    return model.replace(**{PART: own})


def _of_part(path: Path, unet: Component, seed: int | None) -> Component:
    own, part = controlnet.from_unet(unet, seed or 0), hcp.read_part(path)
    needed = own.params if seed is None else part
    params.check(part, {name: own.params.get(name) for name in needed}, str(path))
    return own._replace(params={**own.params, **part})


def _check_fits(place: str, own: Component, unet: Component) -> None:
    def option(component: Component, key: str) -> object:
        value = component.config.get(key, FREE[key])
        return tuple(value) if isinstance(value, list) else value

    for key in SHARED:
        ours, theirs = option(own, key), option(unet, key)
        if ours != theirs:
            raise UserError(
                f"{place} is of another model: its {key} is {ours}, the UNet's {theirs}"
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
