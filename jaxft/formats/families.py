"""The families of Stable Diffusion: which networks a pipeline has, and how its files are told."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxft.errors import UserError
from jaxft.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxft.models.unet import UNet2DConditionModel
from jaxft.models.vae import AutoencoderKL

NETWORKS: dict[str, type[Any]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
"""Folder -> class of every network that a pipeline may have; our classes have the names of
diffusers' and transformers'."""


class Family(NamedTuple):
    """A family of pipelines."""

    title: str
    pipeline: str
    """diffusers' class."""
    text_prefixes: dict[str, str]
    """Folder of a text encoder -> beginning of its keys in a webui file; in the order in which
    their states are joined."""
    openclip: frozenset[str]
    """Folders of text encoders that a webui file holds under OpenCLIP's names."""
    architecture: str
    """ModelSpec's name; of 2.x its beginning."""
    linear: bool
    """Whether the UNet's transformers are entered through linear layers."""

    @property
    def networks(self) -> dict[str, type[Any]]:
        """Folder -> our class, of all networks."""
        return {part: NETWORKS[part] for part in ("unet", "vae", *self.text_prefixes)}

    @property
    def text_encoders(self) -> list[str]:
        """Folders of the text encoders."""
        return [*self.text_prefixes]

    @property
    def is_xl(self) -> bool:
        """Whether the UNet is told sizes and the pooled text as well."""
        return "text_encoder_2" in self.text_prefixes

    def modelspec(self, velocity: bool) -> str:
        """ModelSpec's name of the architecture; of 2.x it tells what the UNet predicts."""
        size = {False: "-512", True: "-768-v"}[velocity]
        return self.architecture + (size if self.architecture == "stable-diffusion-v2" else "")

    def text_layer(self, clip_skip: int, final_norm: bool) -> tuple[int, bool]:
        """How many of the text encoders' last layers to leave out, and whether to use their final
        norm: XL was trained on the states before the last layer, without norm. Its `clip_skip` of 1
        means just that, as in HCP-Diffusion and webuis, and 0 what the model was trained on."""
        return (max(clip_skip, 1), False) if self.is_xl else (clip_skip, final_norm)


SD1 = Family(
    title="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    text_prefixes={"text_encoder": "cond_stage_model.transformer."},
    openclip=frozenset(),
    architecture="stable-diffusion-v1",
    linear=False,
)
SD2 = SD1._replace(
    title="Stable Diffusion 2.x",
    text_prefixes={"text_encoder": "cond_stage_model.model."},
    openclip=frozenset({"text_encoder"}),
    architecture="stable-diffusion-v2",
    linear=True,
)
SDXL = Family(
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    text_prefixes={
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    openclip=frozenset({"text_encoder_2"}),
    architecture="stable-diffusion-xl-v1-base",
    linear=True,
)
REFINER = Family(
    title="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    text_prefixes={"text_encoder_2": "conditioner.embedders.0.model."},
    openclip=frozenset({"text_encoder_2"}),
    architecture="stable-diffusion-xl-v1-refiner",
    linear=True,
)
FAMILIES = (SD1, SD2, SDXL, REFINER)

INPAINTING = {
    "StableDiffusionPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLInpaintPipeline",
}
"""Pipeline -> the one whose UNet takes a mask and a masked picture as well."""

PIPELINES = (*dict.fromkeys(family.pipeline for family in FAMILIES), *INPAINTING.values())
"""diffusers' classes that we read."""


def pipeline(family: Family, unet: Mapping[str, Any]) -> str:
    """diffusers' class of a pipeline with this UNet."""
    masked = unet.get("in_channels", 4) == 9
    return INPAINTING.get(family.pipeline, family.pipeline) if masked else family.pipeline


def of_configs(configs: Mapping[str, Mapping[str, Any]], source: str) -> Family:
    """The family of a pipeline, from its networks' configurations by folder.

    Raises:
        UserError: the networks belong to different families, or to none.
    """
    unet = configs["unet"]
    is_xl = unet.get("addition_embed_type") == "text_time"
    linear = bool(unet.get("use_linear_projection"))
    encoders = {part for part in configs if part.startswith("text_encoder")}
    for family in FAMILIES:
        if (family.is_xl, family.linear) == (is_xl, linear) and encoders == {*family.text_prefixes}:
            return family
    told = ", ".join(sorted(encoders)) or "no text encoder"
    kind = "XL" if is_xl else "2.x" if linear else "1.x"
    raise UserError(f"{source}: a UNet of Stable Diffusion {kind} with {told} is no family we know")
