"""Every loss with every target, mask, average and accumulation, in every way of training.

The network is two linear layers, so that a program compiles at once; the step is the real one. All
combinations of what a gradient depends on are traced for layers and LoRAs, and so many run that any
two options meet.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from jaxft import checkpoint, config, loss_options, params, step
from jaxft.compiled import Programs
from jaxft.diffusion import schedule
from jaxft.models import layers
from jaxft.models.clip import CLIPTextModel
from jaxft.shapes import NEGATIVE
from jaxft.tuning import adapters, optimizers
from jaxft.tuning.adapters import Adapter
from tests.test_loss_options import SD1
from tests.test_step import TEXT, one_device

WORD = TEXT["vocab_size"]
"""The first id that is no token's."""


class Network(nnx.Module):
    """Asks as a UNet is asked, of states of width 16."""

    def __init__(self, channels: int = 4):
        self.proj, self.text = layers.Linear(channels, 4), layers.Linear(16, 4)

    def __call__(self, x: Any, timesteps: Any, states: Any, added: Any, residuals: Any) -> Any:
        seen = self.text(states.astype(x.dtype)).mean(axis=1)[:, None, None]
        seen = seen if residuals is None else seen + residuals
        return self.proj(x) + seen + (timesteps[:, None, None, None] / 1000).astype(x.dtype)


class Control(nnx.Module):
    """Asks as a ControlNet is asked."""

    def __init__(self):
        self.proj = layers.Linear(3, 4)

    def __call__(self, x: Any, timesteps: Any, states: Any, image: Any, added: Any) -> Any:
        return self.proj(image[:, ::8, ::8].astype(x.dtype))


class Coder(nnx.Module):
    """Encodes as a VAE does."""

    def __init__(self):
        self.proj = layers.Linear(3, 8)

    def encode(self, images: Any) -> Any:
        return self.proj(images[:, ::8, ::8])


MODES = {
    "unet": ("unet",),
    "text_encoder": ("text_encoder",),
    "words": ("words",),
    "all": ("unet", "text_encoder", "words"),
    "guided": ("words", "lora"),  # pairs of words, and LoRAs of two branches
    "controlnet": ("controlnet",),
    "inpainting": ("unet",),
    **{kind: (kind,) for kind in ("lora", "loha", "lokr", "dora", "oft")},
}
ERRORS: dict[str, dict[str, Any]] = {
    "mse": {"_target_": "MSELoss"},
    "l1": {"_target_": "L1Loss"},
    "huber": {"_target_": "HuberLoss", "delta": 0.3, "schedule": "snr"},
    "smooth": {"_target_": "SmoothL1Loss", "beta": 0.3},
    "ssim": {"_target_": "MSELoss", "ssim": 0.5},
    "min_snr": {"_target_": "MinSNRLoss", "gamma": 2.0},
}
AXES: dict[str, tuple[Any, ...]] = {
    "mode": tuple(MODES),
    "error": tuple(ERRORS),
    "target": ("epsilon", "v_prediction", "sample"),
    "kind": ("epsilon", "v_prediction"),
    "mask": ("none", "plain", "normalised"),
    "average": (False, True),
    "accumulation": (1, 2),
}


def rows() -> list[dict[str, Any]]:
    """All combinations; one weighting has no meaning for samples."""
    every = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    return [row for row in every if (row["error"], row["target"]) != ("min_snr", "sample")]


def pairs(row: dict[str, Any]) -> set[Any]:
    return {*itertools.combinations(row.items(), 2)}


ALIKE = ("smooth", "controlnet", "inpainting", "loha", "lokr", "dora", "oft")
"""Options that run as another one does: traced alone."""


MORE = [("mse", mode) for mode in MODES if mode not in ("unet", "lora")]
"""Other modes, traced with the plain error."""


def covering() -> list[dict[str, Any]]:
    """Some of the rows, in which every two options that may meet do."""
    every = [row for row in rows() if not {row["mode"], row["error"]} & {*ALIKE}]
    np.random.default_rng(0).shuffle(every)
    left, chosen = set().union(*map(pairs, every)), []
    while left:
        chosen.append(max(every[:400], key=lambda row: len(pairs(row) & left)))
        if not pairs(chosen[-1]) & left:
            chosen[-1] = max(every, key=lambda row: len(pairs(row) & left))
        left -= pairs(chosen[-1])
    return chosen


BASE = config.load("configs/train/examples/fine-tuning.yaml")[0].train.to_dict()


class Case:
    """What a row trains, and how."""

    def __init__(self, row: dict[str, Any]):
        self.row, rng = row, np.random.default_rng(1)
        parts = MODES[row["mode"]]
        kinds = {*parts} & {"lora", "loha", "lokr", "dora", "oft"}
        own, guided = {}, row["mode"] == "guided"
        for kind in kinds:
            own = {name: [Adapter("g", shape, 2, 2.0, 0.0, kind)] for name, shape in HOSTS.items()}
        channels = 9 if row["mode"] == "inpainting" else 4
        network, shapes = params.abstract(lambda: adapters.attach(Network(channels), own))
        nets = {"controlnet": params.abstract(Control), "vae": params.abstract(Coder)}
        encoder, text = params.abstract(lambda: CLIPTextModel(TEXT))
        self.reads = bool({"text_encoder", "words"} & {*parts})

        def drawn(shapes: Any) -> dict[str, Any]:
            return {n: rng.standard_normal(s.shape, np.float32) * 0.3 for n, s in shapes.items()}

        weights = {
            "unet": drawn({n: s for n, s in shapes.items() if ".lora." not in n}),
            "text_encoder": drawn(text),
            **{name: drawn(own) for name, (_, own) in nets.items()},
            "words": {"pt": rng.standard_normal((2, 16), np.float32)},
        }
        self.trainable = {part: weights[part] for part in parts if part in weights}
        sides = ("", NEGATIVE) if guided else ("",)
        for side in sides if kinds else ():
            self.trainable[f"lora_{side}unet"] = adapters.init(own, 0, weights["unet"])
        more = {"controlnet": "controlnet", "inpainting": "vae"}.get(row["mode"])
        used = {"unet", *(("text_encoder",) if self.reads else ()), *((more,) if more else ())}
        self.frozen = jax.tree.map(
            jnp.asarray, {n: {} if n in self.trainable else weights[n] for n in used}
        )
        noising = schedule.from_config(SD1 | {"prediction_type": row["kind"]})
        loss = BASE["loss"] | {"criterion": ERRORS[row["error"]], "target": row["target"]}
        loss["normalise_mask"] = row["mask"] == "normalised"
        scale = {"cfg_scale": "3.0" if guided else "1.0"}
        how = loss_options.from_config(FrozenConfigDict(BASE | scale | {"loss": loss}), noising)
        networks = {f"{side}unet": network for side in sides}
        networks |= {"text_encoder": encoder} if self.reads else {}
        networks |= {more: nets[more][0]} if more else {}
        self.objective = step.Objective(networks, noising, 1.0, jnp.float32, loss=how)
        self.key = jax.random.key(3)

    def batch(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(number)
        made: dict[str, Any] = {
            "weight": np.ones(2, np.float32),
            "moments": rng.standard_normal((2, 12, 4, 8)).astype(np.float32),
        }
        if self.reads:
            made["input_ids"] = rng.integers(1, 48, (2, 1, 77)).astype(np.int32)
            made["input_ids"][:, :, -1] = 49
            if "words" in self.trainable:
                made["input_ids"][:, :, 3:5] = WORD, WORD + 1
            if self.row["mode"] == "guided":
                made["negative_input_ids"] = made["input_ids"].copy()
                made["negative_input_ids"][:, :, 3:5] = WORD + 1, 7
        else:
            made["encoder_hidden_states"] = rng.standard_normal((2, 77, 16)).astype(np.float32)
        pixels = rng.integers(0, 256, (2, 96, 32, 3)).astype(np.uint8)
        if self.row["mode"] == "controlnet":
            made["conditioning_pixel_values"] = pixels
        if self.row["mode"] == "inpainting":
            made |= {"pixel_values": pixels, "inpaint_mask": pixels[..., 0] % 2}
        if self.row["mask"] != "none":
            made["mask"] = rng.random((2, 12, 4)).astype(np.float32)
        return made


HOSTS = {"proj": (4, 4), "text": (4, 16)}


def test_all_combinations_are_programs():
    """Traced only: each has a finite number of losses, one, and a gradient for all it trains."""
    traced = 0
    for row in rows():
        if row["average"] or row["accumulation"] > 1:
            continue  # are no matter of the gradient
        if row["mode"] not in ("unet", "lora") and (row["error"], row["mode"]) not in MORE:
            continue
        case = Case(row)
        args = case.trainable, case.frozen, case.batch(0), case.key
        gradients = functools.partial(step.gradients, case.objective, 1.0, total=None)
        judged, grads = jax.eval_shape(gradients, *args)
        assert (judged.loss.shape, judged.errors.shape) == ((), judged.weight.shape)
        assert jax.tree.map(lambda g: g.shape, grads) == jax.tree.map(np.shape, case.trainable)
        traced += 1
    assert traced == 2 * 2 * 3 * (6 * 3 - 1) + len(MORE) * 2 * 3 * 3


@pytest.mark.parametrize("row", covering(), ids=lambda row: "-".join(map(str, row.values())))
def test_a_run_changes_what_it_trains_and_resumes(row, tmp_path):
    case, mesh = Case(row), one_device()
    labels = {part: dict.fromkeys(own, "all") for part, own in case.trainable.items()}
    optimizer = optimizers.grouped(labels, {"all": optimizers.adamw(1e-2)}, 1.0)
    parts = row["accumulation"]
    programs = Programs(
        case.objective,
        optimizer,
        labels,
        mesh,
        loss_weights=[1.0],
        accumulation=parts,
        averages=row["average"],
    )
    start = programs.init(jax.tree.map(jnp.array, case.trainable))
    programs.compile(start, case.frozen, case.key, [[case.batch(0)]])
    frozen = jax.device_get(case.frozen)

    def steps(state: Any, first: int, last: int) -> Any:
        for number in range(first, last):
            batches = [[case.batch(number * parts + part) for part in range(parts)]]
            state, metrics = programs.step(state, case.frozen, case.key, batches)
            assert np.isfinite(metrics.grad_norm)
            if row["average"]:
                state = programs.average(state, 0.5)
        return jax.device_get(state)

    half = steps(start, 0, 2)
    kept = checkpoint.Checkpoints(tmp_path, keep=1)
    kept.save(2, jax.tree.map(jnp.array, half), {})
    kept.wait()
    restored, _ = kept.restore(2, programs.state(case.trainable))
    kept.close()
    resumed = steps(restored, 2, 3)
    again = programs.init(jax.tree.map(jnp.array, case.trainable))
    whole = steps(again, 0, 3)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(case.frozen))
    for part, own in case.trainable.items():
        assert any(np.any(whole.trainable[part][name] != value) for name, value in own.items())
    assert bool(whole.average) == row["average"]
    if row["average"]:
        apart = jax.tree.map(lambda a, b: np.any(a != b), whole.average, whole.trainable)
        assert any(jax.tree.leaves(apart))
