"""jaxft's train step beside diffusers' PyTorch loop: same weights, batches, noise and AdamW.

    python scripts/bench.py --model narrow --latents 32 --batch 2 --steps 5
    python scripts/bench.py --mode lora      a LoRA's step beside one of full fine-tuning
    python scripts/bench.py --mode average   steps with a moving average beside steps without

Both systems train in one process, turn by turn, so that a noisy machine disturbs both alike; where
they do the same, the losses of all steps are compared. Prints a table and a JSON line.
"""

import argparse
import json
import platform
import time
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import random_model
import torch
import transformers

import jaxft
from jaxft import mesh as meshes
from jaxft import params, step
from jaxft.compiled import Programs
from jaxft.diffusion import schedule
from jaxft.models.clip import CLIPTextModel
from jaxft.models.unet import UNet2DConditionModel
from jaxft.tuning import adapters, optimizers
from jaxft.tuning.groups import PRESETS, Group

SCALING = 0.18215
RATE = 1e-5
TEXT = random_model.TEXT | {"hidden_size": 256, "intermediate_size": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": random_model.UNET,
    "narrow": {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 256},
    "half": {"block_out_channels": [160, 320, 640, 640], "cross_attention_dim": 384},
    "sd15": {"cross_attention_dim": 768},
}
"""UNets of SD 1.5's topology; `sd15` is the true one."""


class Batch(NamedTuple):
    """One step's input, NumPy."""

    arrays: dict[str, np.ndarray]
    draws: step.Draws


class Ours:
    """jaxft's step, compiled as a run compiles it.

    Args:
        unet: options of the network.
        text: of the text encoder.
        weights: of both.
        batch: one of the shape of all.
        dtype: of the activations.
        rank: of LoRAs, which are trained in place of the UNet; None: it is.
        every: steps to one of a moving average; None: there is none.
    """

    def __init__(
        self,
        unet: dict,
        text: dict,
        weights: step.Weights,
        batch: Batch,
        dtype: Any,
        *,
        rank: int | None = None,
        every: int | None = None,
    ):
        own = loras(weights["unet"], rank) if rank else {}
        trainable: Any = {"unet": weights["unet"]}
        if rank:
            trainable = {"lora_unet": adapters.init(own, 0)}
        unet_def, _ = params.abstract(lambda: adapters.attach(UNet2DConditionModel(unet), own))
        text_def, _ = params.abstract(lambda: CLIPTextModel(text))
        objective = step.Objective(
            networks={"unet": unet_def, "text_encoder": text_def},
            schedule=schedule.from_config(random_model.SCHEDULER),
            scaling_factor=SCALING,
            dtype=dtype,
        )
        labels = {part: dict.fromkeys(names, "all") for part, names in trainable.items()}
        optimizer = optimizers.grouped(labels, {"all": optimizers.adamw(RATE)}, 1.0)
        self.mesh = meshes.make(devices=jax.devices()[:1])
        self.programs = Programs(
            objective,
            optimizer,
            labels,
            self.mesh,
            loss_weights=[1.0],
            accumulation=1,
            averages=every is not None,
        )
        encoder, rest = params.cast(weights["text_encoder"], dtype), weights["unet"] if rank else {}
        self.frozen = jax.device_put({"text_encoder": encoder, "unet": params.cast(rest, dtype)})
        self.key, self.every, self.count = jax.random.key(0), every, 0
        self.state = self.programs.init(trainable)
        started = time.perf_counter()
        self.programs.compile(self.state, self.frozen, self.key, [[batch.arrays]])
        self.compile_s = time.perf_counter() - started

    def step(self, batch: Batch) -> float:
        """One update; returns its loss when all of it is done."""
        placed = jax.device_put(batch.arrays, meshes.batch_sharding(self.mesh))
        self.state, metrics = self.programs.step(self.state, self.frozen, self.key, [[placed]])
        self.count += 1
        if self.every and self.count % self.every == 0:
            self.state = self.programs.average(self.state, 0.1)
        jax.block_until_ready(self.state)
        return float(metrics.losses[0][0])


def loras(weights: dict, rank: int) -> adapters.Adapters:
    """LoRAs of the linear layers and convolutions of the transformers, as kohya's trainer has."""
    patterns = PRESETS["attn-mlp"]["unet"]
    group = adapters.LoraGroup(Group("lora", "unet", patterns, RATE), rank, rank, 0.0)
    layers = {
        name.removesuffix(".weight"): value.shape
        for name, value in weights.items()
        if name.endswith(".weight") and value.ndim in (2, 4)
    }
    return adapters.choose(group, [*weights], layers)


class Theirs:
    """diffusers' text-to-image training loop with cached latents."""

    def __init__(self, unet: dict, text: dict, weights: step.Weights, dtype: Any, device: str):
        config = {k: v for k, v in text.items() if k not in ("architectures", "model_type")}
        self.unet: Any = diffusers.UNet2DConditionModel.from_config(unet)
        self.text: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        bare = {k.removeprefix("text_model."): v for k, v in weights["text_encoder"].items()}
        for module, state in ((self.unet, weights["unet"]), (self.text, bare)):
            module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
            module.to(device)
        self.noising: Any = diffusers.DDPMScheduler.from_config(random_model.SCHEDULER)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=RATE)
        self.dtype, self.device = dtype, device
        self.unet.train()

    def step(self, batch: Batch) -> float:
        """One update; returns its loss."""
        mean, log_variance = self._tensor(batch.arrays["moments"]).chunk(2, dim=1)
        drawn = [self._tensor(x) for x in (batch.draws.latent_noise, batch.draws.noise.asked)]
        latents = (mean + torch.exp(0.5 * log_variance) * drawn[0]) * SCALING
        times = torch.tensor(np.asarray(batch.draws.timesteps)).long().to(self.device)
        noisy = self.noising.add_noise(latents, drawn[1], times)
        ids = torch.tensor(batch.arrays["input_ids"][:, 0]).long().to(self.device)
        lower = self.dtype != torch.float32
        with torch.autocast(self.device, self.dtype, enabled=lower):
            with torch.no_grad():
                states = self.text(ids).last_hidden_state
            predicted = self.unet(noisy, times, states).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), drawn[1])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def _tensor(self, x: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy()).to(self.device)


def make_batches(args: argparse.Namespace, vocab_size: int) -> list[Batch]:
    """Random batches and the draws that jaxft's step makes for them."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.latents, args.latents)
    batches = []
    for n in range(args.steps + args.warmup):
        key = step.batch_key(jax.random.key(0), n, 0, 0)
        ids = rng.integers(0, vocab_size - 2, (args.batch, 1, 77)).astype(np.int32)
        ids[:, :, -1] = vocab_size - 1
        arrays = {
            "input_ids": ids,
            "weight": np.ones(args.batch, np.float32),
            "moments": rng.standard_normal((*shape, 8)).astype(np.float32),
        }
        batches.append(Batch(arrays, step.draw(key, (*shape, 4), 1000)))
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description="Times jaxft's train step beside diffusers'.")
    parser.add_argument("--mode", choices=("full", "lora", "average"), default="full")
    parser.add_argument("--rank", type=int, default=8, help="of LoRAs")
    parser.add_argument("--every", type=int, default=10, help="steps to one of the average")
    parser.add_argument("--model", choices=MODELS, default="narrow")
    parser.add_argument("--latents", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()

    unet = random_model.UNET | MODELS[args.model]
    unet |= {"norm_num_groups": 32, "attention_head_dim": 8} if args.model != "tiny" else {}
    width = unet["cross_attention_dim"]
    text = TEXT | {
        "vocab_size": 600,
        "hidden_size": width,
        "bos_token_id": 598,
        "eos_token_id": 599,
    }
    rng = np.random.default_rng(0)
    weights = {
        name: random_model.random_params(params.abstract(network)[1], rng)
        for name, network in (
            ("unet", lambda: UNet2DConditionModel(unet)),
            ("text_encoder", lambda: CLIPTextModel(text)),
        )
    }
    batches = make_batches(args, text["vocab_size"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lower = args.dtype == "bf16"
    dtype = jnp.bfloat16 if lower else jnp.float32
    ours = Ours(unet, text, weights, batches[0], dtype)
    systems: dict[str, Any] = {"full": ours}
    if args.mode == "lora":
        systems = {"lora": Ours(unet, text, weights, batches[0], dtype, rank=args.rank), **systems}
    elif args.mode == "average":
        averaged = Ours(unet, text, weights, batches[0], dtype, every=args.every)
        systems = {"average": averaged, **systems}
    else:
        theirs = Theirs(unet, text, weights, torch.bfloat16 if lower else torch.float32, device)
        systems = {"jaxft": ours, "diffusers": theirs}

    times: dict[str, list[float]] = {name: [] for name in systems}
    losses: dict[str, list[float]] = {name: [] for name in systems}
    for batch in batches:
        for name, system in systems.items():
            started = time.perf_counter()
            losses[name].append(system.step(batch))
            times[name].append(time.perf_counter() - started)
    report(args, times, losses, systems)


def report(args: argparse.Namespace, times: dict, losses: dict, systems: dict[str, Any]) -> None:
    """The table and the JSON line; ratios are of the first system over the second."""
    (first, ours), (second, _) = systems.items()
    timed = {name: np.array(values[args.warmup :]) for name, values in times.items()}
    median = {name: float(np.median(values)) for name, values in timed.items()}
    mean = {name: float(np.mean(values)) for name, values in timed.items()}
    apart = np.abs(np.array(losses[first]) / np.array(losses[second]) - 1).max()
    same = {} if args.mode == "lora" else {"largest_loss_difference": float(f"{apart:.2g}")}
    print(f"{'':12}{'ms/step':>10}{'best':>10}{'images/s':>10}")
    for name, seconds in median.items():
        best = 1e3 * timed[name].min()
        print(f"{name:12}{1e3 * seconds:10.1f}{best:10.1f}{args.batch / seconds:10.2f}")
    result = {
        **vars(args),
        "ratio": round(median[first] / median[second], 3),
        "ratio_of_best": round(timed[first].min() / timed[second].min(), 3),
        "ratio_of_means": round(mean[first] / mean[second], 3),
        "images_per_s": round(args.batch / median[first], 3),
        "compile_s": round(ours.compile_s, 1),
        "memory_mib": round(ours.programs.memory(ours.state, ours.frozen) / 2**20),
        **same,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "versions": {
            "jaxft": jaxft.__version__,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
