"""jaxft's train step beside diffusers' PyTorch loop: same weights, batches, noise and AdamW.

    python scripts/bench.py --model narrow --latents 32 --batch 2 --steps 5
    python scripts/bench.py --peers eager compiled channels_last
    python scripts/bench.py --mode lora      a LoRA's step beside one of full fine-tuning
    python scripts/bench.py --mode average   steps with a moving average beside steps without
    python scripts/bench.py --mode dispatch  what the host does for a step of SDXL's 1,680 weights

All systems train in one process, turn by turn, so that a noisy machine disturbs all alike; where
they do the same, the losses of all steps are compared. Prints a table and a JSON line.
"""

import argparse
import functools
import json
import platform
import tempfile
import time
from typing import Any, NamedTuple

import bench_dispatch
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import random_model
import torch
import transformers

import jaxft
from jaxft import forecast, params, step
from jaxft import mesh as meshes
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


COLUMNS = {
    "ms": "ms/step",
    "best_ms": "best",
    "images_per_s": "images/s",
    "mfu": "MFU",
    "input_share": "input",
    "compile_cold_s": "cold s",
    "compile_warm_s": "warm s",
    "memory_mib": "MiB",
    "peak_mib": "peak",
}
"""Figures of a system -> heads of the table. `mfu` is the share of the rate of products of large
matrices, measured here; `input_share` that of a step in which its batch is put on the device;
`compile_warm_s` is with all programs in the cache on disk; `memory_mib` is what the compiled
programs take at the most, `peak_mib` what the device says that the system has held."""


NO_OPTIONS = ("architectures", "model_type")
"""Keys of a text encoder's configuration that its class does not take."""


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
        of_gradient = (objective, trainable, self.frozen, batch.arrays, self.key)
        self.flops = forecast.costs_of_gradient(*of_gradient).flops
        self.compile_s = [self._compile(batch) for _ in ("cold", "warm")]
        self.input_s: list[float] = []

    def _compile(self, batch: Batch) -> float:
        started = time.perf_counter()
        self.programs.compile(self.state, self.frozen, self.key, [[batch.arrays]])
        return time.perf_counter() - started

    def step(self, batch: Batch) -> float:
        """One update; returns its loss when all of it is done."""
        started = time.perf_counter()
        where = meshes.batch_sharding(self.mesh)
        placed = jax.block_until_ready(jax.device_put(batch.arrays, where))
        self.input_s.append(time.perf_counter() - started)
        self.state, metrics = self.programs.step(self.state, self.frozen, self.key, [[placed]])
        self.count += 1
        if self.every and self.count % self.every == 0:
            self.state = self.programs.average(self.state, 0.1)
        jax.block_until_ready(self.state)
        return float(metrics.losses[0][0])

    def figures(self) -> dict[str, float | None]:
        """What is known besides times."""
        held = meshes.most_held(self.mesh)
        return {
            "compile_cold_s": self.compile_s[0],
            "compile_warm_s": self.compile_s[1],
            "memory_mib": self.programs.memory(self.state, self.frozen) / 2**20,
            "peak_mib": None if held is None else 1024 * held,
        }


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
    """diffusers' text-to-image training loop with cached latents, in one of the forms `PEERS`.

    Its operations are as many as jaxft's, `flops` (None: not counted).
    """

    def __init__(
        self,
        form: str,
        unet: dict,
        text: dict,
        weights: step.Weights,
        dtype: Any,
        flops: float | None,
    ):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = {k: v for k, v in text.items() if k not in NO_OPTIONS}
        self.unet: Any = diffusers.UNet2DConditionModel.from_config(unet)
        self.text: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        bare = {k.removeprefix("text_model."): v for k, v in weights["text_encoder"].items()}
        for module, state in ((self.unet, weights["unet"]), (self.text, bare)):
            module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
            module.to(self.device)
        self.noising: Any = diffusers.DDPMScheduler.from_config(random_model.SCHEDULER)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=RATE)
        self.dtype, self.flops = dtype, flops
        self.unet = PEERS[form](self.unet.train())

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

    def figures(self) -> dict[str, float | None]:
        """What is known besides times."""
        on_gpu = self.device == "cuda"
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None}

    def _tensor(self, x: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy()).to(self.device)


PEERS = {
    "eager": lambda unet: unet,
    "compiled": torch.compile,
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last),
}
"""Forms of diffusers' UNet."""


def architecture(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configurations of a UNet of `MODELS`, and of a text encoder that goes with it."""
    unet = random_model.UNET | MODELS[model]
    unet |= {"norm_num_groups": 32, "attention_head_dim": 8} if model != "tiny" else {}
    return unet, TEXT | {
        "vocab_size": 600,
        "hidden_size": unet["cross_attention_dim"],
        "bos_token_id": 598,
        "eos_token_id": 599,
    }


def tokens(rng: np.random.Generator, count: int, vocab_size: int) -> np.ndarray:
    """Prompts of random tokens, int32 [b, 1, 77]; the last one ends them."""
    ids = rng.integers(0, vocab_size - 2, (count, 1, 77)).astype(np.int32)
    ids[:, :, -1] = vocab_size - 1
    return ids


def make_batches(args: argparse.Namespace, vocab_size: int) -> list[Batch]:
    """Random batches and the draws that jaxft's step makes for them."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.latents, args.latents)
    batches = []
    for n in range(args.steps + args.warmup):
        key = step.batch_key(jax.random.key(0), n, 0, 0)
        arrays = {
            "input_ids": tokens(rng, args.batch, vocab_size),
            "weight": np.ones(args.batch, np.float32),
            "moments": rng.standard_normal((*shape, 8)).astype(np.float32),
        }
        batches.append(Batch(arrays, step.draw(key, (*shape, 4), 1000)))
    return batches


def train(args: argparse.Namespace) -> None:
    """Steps of all systems in turn, and the report."""
    unet, text = architecture(args.model)
    rng = np.random.default_rng(0)
    weights = {
        name: random_model.random_params(params.abstract(network)[1], rng)
        for name, network in (
            ("unet", lambda: UNet2DConditionModel(unet)),
            ("text_encoder", lambda: CLIPTextModel(text)),
        )
    }
    batches = make_batches(args, text["vocab_size"])
    lower = args.dtype == "bf16"
    make = functools.partial(
        Ours, unet, text, weights, batches[0], jnp.bfloat16 if lower else jnp.float32
    )
    systems: dict[str, Any] = {}
    if args.mode == "lora":
        systems["lora"] = make(rank=args.rank)
    elif args.mode == "average":
        systems["average"] = make(every=args.every)
    if args.alone in (None, "jaxft"):
        systems["jaxft"] = make()
    if args.mode == "full":
        dtype = torch.bfloat16 if lower else torch.float32
        flops = systems["jaxft"].flops if "jaxft" in systems else None
        for form in args.peers if args.alone is None else {args.alone} & {*PEERS}:
            systems[f"diffusers {form}"] = Theirs(form, unet, text, weights, dtype, flops)

    times: dict[str, list[float]] = {name: [] for name in systems}
    losses: dict[str, list[float]] = {name: [] for name in systems}
    for batch in batches:
        for name, system in systems.items():
            started = time.perf_counter()
            losses[name].append(system.step(batch))
            times[name].append(time.perf_counter() - started)
    report(args, times, losses, systems)


def report(args: argparse.Namespace, times: dict, losses: dict, systems: dict[str, Any]) -> None:
    """The table and the JSON line; ratios are of the first system over each other one."""
    first, *others = systems
    rate = forecast.rate("bfloat16" if args.dtype == "bf16" else "float32")
    timed = {name: np.array(values[args.warmup :]) for name, values in times.items()}
    rows = {}
    for name, system in systems.items():
        median = float(np.median(timed[name]))
        rows[name] = system.figures() | {
            "ms": 1e3 * median,
            "best_ms": 1e3 * timed[name].min(),
            "images_per_s": args.batch / median,
            "mfu": system.flops and system.flops / median / rate,
        }
        if isinstance(system, Ours):
            rows[name]["input_share"] = np.median(system.input_s[args.warmup :]) / median
    print(f"{'':26}" + "".join(f"{head:>10}" for head in COLUMNS.values()))
    for name, row in rows.items():
        cells = (row.get(column) for column in COLUMNS)
        told = ("-" if cell is None else f"{cell:.4g}" for cell in cells)
        print(f"{name:26}" + "".join(f"{cell:>10}" for cell in told))
    ratios = {
        f"ratio{of}": {other: round(how(timed[first]) / how(timed[other]), 3) for other in others}
        for of, how in (("", np.median), ("_of_best", np.min), ("_of_means", np.mean))
    }
    apart = [np.abs(np.array(losses[first]) / np.array(losses[o]) - 1).max() for o in others]
    alike = apart and args.mode != "lora"
    same = {"largest_loss_difference": float(f"{max(apart):.2g}")} if alike else {}
    result = {
        **vars(args),
        **ratios,
        **same,
        "tflop": systems[first].flops and round(systems[first].flops / 1e12, 4),
        "tflop_per_s_of_products": round(rate / 1e12, 4),
        "systems": {
            name: {key: None if cell is None else float(f"{cell:.4g}") for key, cell in row.items()}
            for name, row in rows.items()
        },
        "losses": losses,
        "ms_of_steps": {name: [round(1e3 * t, 1) for t in own] for name, own in timed.items()},
        **machine(),
    }
    print(json.dumps(result))


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    libraries = (jaxft, jax, torch, diffusers)
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "versions": {library.__name__: library.__version__ for library in libraries},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times jaxft's train step beside diffusers'.")
    modes = ("full", "lora", "average", "dispatch")
    parser.add_argument("--mode", choices=modes, default="full")
    parser.add_argument("--peers", choices=PEERS, nargs="+", default=["eager"], help="of full")
    parser.add_argument("--alone", choices=("jaxft", *PEERS), help="see bench_apart.py")
    parser.add_argument("--rank", type=int, default=8, help="of LoRAs")
    parser.add_argument("--every", type=int, default=10, help="steps to one of the average")
    parser.add_argument("--accumulation", type=int, default=1, help="batches a step, of dispatch")
    parser.add_argument("--model", choices=MODELS, default="narrow")
    parser.add_argument("--latents", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # compiled programs, none of them there before
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if args.mode == "dispatch":
            found = bench_dispatch.measure(args.steps, args.warmup, args.accumulation)
            print(json.dumps({**vars(args), **found, **machine()}))
        else:
            train(args)


if __name__ == "__main__":
    main()
