"""What fits in how much memory, and what many devices send each other: tables in Markdown.

    python scripts/memory_table.py fits       the largest batches, by `jaxft.forecast`
    python scripts/memory_table.py check      forecasts beside what XLA says of compiled programs
    python scripts/memory_table.py scaling    operations and bytes on 8, 64 and 512 devices

All of it is arithmetic on shapes: no weight is made, and none is needed.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from jaxft import forecast, params, step
from jaxft import mesh as meshes
from jaxft.compiled import Programs
from jaxft.costs import Costs
from jaxft.diffusion import schedule
from jaxft.formats import lora, published
from jaxft.formats.diffusers_folder import Configs
from jaxft.models import encoder
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import adapters, eight_bit, optimizers
from jaxft.tuning.groups import PRESETS, Group

MODELS: dict[str, tuple[Configs, int]] = {
    "SD 1.5": (published.SD15, 512),
    "SDXL": (published.SDXL, 1024),
}
"""Name -> configurations, pixels of a side."""

OFFLOADED = "offloaded"
"""Of a kind: the optimizer's state lies in the host's memory."""

KINDS: dict[str, Callable[[float], Any]] = {
    "LoRA": optimizers.adamw,
    "full": optimizers.adamw,
    "full, AdamW8bit": eight_bit.adamw_8bit,
    f"full, {OFFLOADED}": optimizers.adamw,
}
"""What is trained -> its optimizer. LoRAs are those of rank `RANK` in the transformers."""

PRECISIONS = {"bf16": (jnp.bfloat16, [*encoder.REMAT]), "no": (jnp.float32, ["none", "full"])}
"""`mixed_precision` -> of activations and frozen weights, and the policies that are told of."""

RANK, RATE, TOKENS = 16, 1e-5, 152
SIZES = (8, 12, 16, 24, 40, 80, 141)
"""Memory of devices, GiB."""

BATCHES = (1, 32)
"""Those that are traced. What others take is no more than the line through both, for in larger
batches what grows the most counts; batches larger than the last are told as that many and more."""

IMAGES = {"SD 1.5": 32, "SDXL": 8}
"""On a device, where there are many."""

LAYOUTS = ((1, 1), (1, 8), (1, 64), (8, 64))
"""(data, fsdp); more than 64 do not divide all of the widths 320, 640 and 1280."""

PRODUCTS = 790e12
"""Operations a second of an H200 in products of large bfloat16 matrices."""


class Training:
    """A UNet's training on cached latents and prompts, as shapes.

    Args:
        model: a name in `MODELS`.
        kind: a name in `KINDS`.
        precision: a name in `PRECISIONS`.
        remat: a key of `encoder.REMAT`.
        fsdp: devices that share the weights.
    """

    def __init__(self, model: str, kind: str, precision: str, remat: str = "none", fsdp: int = 1):
        configs, self.side = MODELS[model]
        self.config, dtype = configs.parts["unet"], PRECISIONS[precision][0]
        _, shapes = params.abstract(lambda: UNet2DConditionModel(self.config))
        group = Group("lora", "unet", PRESETS["attn-mlp"]["unet"], RATE)
        loras = adapters.LoraGroup(group, RANK, RANK, 0.0)
        own: adapters.Adapters = {}
        if kind == "LoRA":
            own = adapters.choose(loras, [*shapes], lora.modules(configs)["unet"])
        factors = {
            name: jax.ShapeDtypeStruct(shape, np.float32)
            for name, shape in adapters.shapes(own).items()
        }
        self.trainable: Any = {"lora_unet": factors} if own else {"unet": shapes}
        mesh: Any = AbstractMesh((1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        if fsdp == 1:
            mesh = meshes.make(devices=jax.devices()[:1])
        where = meshes.shardings(mesh, shapes)
        frozen = {
            name: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where[name])
            for name, leaf in shapes.items()
        }
        self.frozen: Any = {"unet": frozen if own else {}}
        graphdef, _ = params.abstract(
            lambda: adapters.attach(UNet2DConditionModel(self.config, remat), own)
        )
        noising = schedule.from_config(configs.scheduler)
        self.objective = step.Objective({"unet": graphdef}, noising, 1.0, dtype)
        labels = {part: dict.fromkeys(names, "all") for part, names in self.trainable.items()}
        optimizer = optimizers.grouped(labels, {"all": KINDS[kind](RATE)}, 1.0)
        self.programs = Programs(
            self.objective,
            optimizer,
            labels,
            mesh,
            loss_weights=[1.0],
            accumulation=1,
            offloaded=["opt_state"] if kind.endswith(OFFLOADED) else [],
        )
        self.state = self.programs.state(self.trainable)
        self.held = self.programs.held(self.state, self.frozen)
        self.brought = self.programs.brought(self.state)
        self.key = jax.eval_shape(lambda: jax.random.key(0))

    def batch(self, images: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of square images."""
        side, width = self.side // 8, self.config["cross_attention_dim"]
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (images, TOKENS, width),
            "weight": (images,),
            "moments": (images, side, side, 8),
        }
        if "addition_time_embed_dim" in self.config:
            pooled = self.config["projection_class_embeddings_input_dim"]
            pooled -= 6 * self.config["addition_time_embed_dim"]
            shapes |= {"pooled_text_embeds": (images, pooled), "time_ids": (images, 6)}
        return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    def costs(self, images: int) -> Costs:
        """Of the gradient of a batch, on one device."""
        return forecast.costs_of_gradient(
            self.objective, self.trainable, self.frozen, self.batch(images), self.key
        )

    def compiled(self, images: int) -> int:
        """Bytes that XLA says of the compiled programs."""
        self.programs.compile(self.state, self.frozen, self.key, [[self.batch(images)]])
        return self.programs.memory(self.state, self.frozen)


@functools.cache
def peaks(model: str, kind: str, precision: str, remat: str) -> list[int]:
    """Bytes of temporaries at `BATCHES`; those of all full trainings are alike."""
    training = Training(model, kind, precision, remat)
    return [training.costs(images).peak_bytes for images in BATCHES]


def fits(room: float) -> None:
    """Prints the largest batch for each size of memory, of which a forecast may take `room`."""
    print(_row("model", "trained", "precision", "recomputed", "GiB at 1", *SIZES))
    print(_row(*["---"] * 5, *["--:"] * len(SIZES)))
    for model, kind, precision in itertools.product(MODELS, KINDS, PRECISIONS):
        training = Training(model, kind, precision)
        held, least = training.held, training.held + training.brought
        for remat in PRECISIONS[precision][1]:
            needed = [
                held + peak for peak in peaks(model, kind.partition(",")[0], precision, remat)
            ]
            given = [room * 2**30 * size for size in SIZES]
            most = np.where(np.less(given, least), 0, np.interp(given, needed, BATCHES, left=0))
            told = [math.floor(count) or "–" for count in most]
            told = [f"{count}+" if count == BATCHES[-1] else count for count in told]
            at_one = max(needed[0], least) / 2**30
            cells = (model, kind, precision, remat, f"{at_one:.1f}", *told)
            print(_row(*cells), flush=True)


def check() -> None:
    """Prints forecasts beside compiled programs; float32, as a CPU computes nothing else."""
    print(_row("model", "trained", "images", "forecast GB", "compiled GB", "ratio"))
    print(_row(*["---"] * 3, *["--:"] * 3))
    for model, kind, images in (
        ("SD 1.5", "LoRA", 1),
        ("SD 1.5", "full", 1),
        ("SD 1.5", "full", 4),
    ):
        training = Training(model, kind, "no")
        told = training.held + training.costs(images).peak_bytes
        found = training.compiled(images)
        cells = (f"{told / 1e9:.2f}", f"{found / 1e9:.2f}", f"{told / found:.3f}")
        print(_row(model, kind, images, *cells), flush=True)


def scaling(share: float) -> None:
    """Prints what devices compute, hold and send in a step of full fine-tuning, bfloat16.

    Weights of float32 are gathered and their gradients scattered over `fsdp` devices, of which a
    ring sends (n - 1) / n; what a device keeps is summed over `data` devices, for twice as much.
    """
    heads = ("images", "data × fsdp", "TFLOP", "ms", "GB held", "GB sent", "GB/s that hide it")
    print(_row("model", *heads))
    print(_row(*["---"] * 2, *["--:"] * 6))
    for model, images in IMAGES.items():
        flops = images * Training(model, "full", "bf16").costs(1).flops
        seconds = flops / (share * PRODUCTS)
        for data, fsdp in LAYOUTS:
            training = Training(model, "full", "bf16", fsdp=fsdp)
            whole = sum(4 * leaf.size for leaf in training.trainable["unet"].values()) / 1e9
            sent = 2 * whole * ((fsdp - 1) / fsdp + (data - 1) / data / fsdp)
            cells = (f"{flops / 1e12:.1f}", f"{1e3 * seconds:.0f}", f"{training.held / 1e9:.2f}")
            print(
                _row(
                    model,
                    images,
                    f"{data} × {fsdp}",
                    *cells,
                    f"{sent:.1f}",
                    f"{sent / seconds:.0f}",
                )
            )


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of memory, operations and bytes.")
    parser.add_argument("table", choices=("fits", "check", "scaling"))
    parser.add_argument("--room", type=float, default=forecast.ROOM, help="share of the memory")
    parser.add_argument("--share", type=float, default=forecast.SHARE, help="of the peak rate")
    args = parser.parse_args()
    tables = {
        "fits": lambda: fits(args.room),
        "check": check,
        "scaling": lambda: scaling(args.share),
    }
    tables[args.table]()


if __name__ == "__main__":
    main()
