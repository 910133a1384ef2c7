"""jaxft's sampling beside diffusers': same weights, prompts and noise, DDIM with guidance.

    python scripts/bench_sample.py --model narrow --latents 32 --batch 1 --steps 20

Both paint in one process, turn by turn, prompt to pixels. Prints a table and a JSON line.
"""

import argparse
import json
import time
from typing import Any

import bench
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import random_model
import torch
import transformers

from jaxft import params
from jaxft.diffusion import generate, scheduler_config
from jaxft.models.clip import CLIPTextModel
from jaxft.models.unet import UNet2DConditionModel
from jaxft.models.vae import AutoencoderKL

GUIDANCE = 7.5
PROMPTS = ("negative", "positive")
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "vae": AutoencoderKL,
}


class Ours:
    """The program of `jaxft sample`."""

    def __init__(self, configs: dict, weights: dict, ids: dict, noise: np.ndarray, steps: int):
        made = {name: params.abstract(lambda n=name: CLASSES[n](configs[n]))[0] for name in CLASSES}
        structures, self.weights = (
            generate.Networks((generate.Side(of["unet"], (of["text_encoder"],)),), of["vae"])
            for of in (made, jax.device_put(weights))
        )
        self.program = generate.program(structures, scaling_factor=bench.SCALING)
        self.prompts = [generate.Prompts((jnp.asarray(ids[side]),), None) for side in PROMPTS]
        self.table = scheduler_config.table(random_model.SCHEDULER, steps)
        self.noise = jnp.asarray(noise)

    def paint(self) -> np.ndarray:
        """Pixels [b, h, w, 3]."""
        pixels, _ = self.program(
            self.weights, self.prompts, GUIDANCE, self.noise, self.table, generate.Seen(), 1.0
        )
        return np.asarray(pixels)


class Theirs:
    """The loop of diffusers' StableDiffusionPipeline."""

    def __init__(self, configs: dict, weights: dict, ids: dict, noise: np.ndarray, steps: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        text = {k: v for k, v in configs["text_encoder"].items() if k not in bench.NO_OPTIONS}
        self.text: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
        self.unet: Any = diffusers.UNet2DConditionModel.from_config(configs["unet"])
        self.vae: Any = diffusers.AutoencoderKL.from_config(configs["vae"])
        bare = {k.removeprefix("text_model."): v for k, v in weights["text_encoder"].items()}
        states = (weights["unet"], bare, weights["vae"])
        for module, state in zip((self.unet, self.text, self.vae), states, strict=True):
            module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
            module.to(self.device).eval()
        self.scheduler: Any = diffusers.DDIMScheduler.from_config(random_model.SCHEDULER)
        self.ids = torch.from_numpy(np.concatenate([ids[side][:, 0] for side in PROMPTS])).long()
        self.noise, self.steps = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), steps

    @torch.no_grad()
    def paint(self) -> np.ndarray:
        """Pixels [b, h, w, 3]."""
        states = self.text(self.ids.to(self.device)).last_hidden_state
        self.scheduler.set_timesteps(self.steps)
        latents = self.noise.to(self.device)
        for time_ in self.scheduler.timesteps:
            negative, positive = self.unet(torch.cat([latents] * 2), time_, states).sample.chunk(2)
            guided = negative + GUIDANCE * (positive - negative)
            latents = self.scheduler.step(guided, time_, latents).prev_sample
        images = self.vae.decode(latents / bench.SCALING).sample
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round()
        return pixels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times jaxft's sampling beside diffusers'.")
    parser.add_argument("--model", choices=bench.MODELS, default="narrow")
    parser.add_argument("--latents", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument(
        "--rounds", type=int, default=3, help="that are timed, after one that is not"
    )
    args = parser.parse_args()

    unet, text = bench.architecture(args.model)
    configs = {"unet": unet, "text_encoder": text, "vae": random_model.VAE}
    rng = np.random.default_rng(0)
    weights = {
        name: random_model.random_params(
            params.abstract(lambda n=name: CLASSES[n](configs[n]))[1], rng
        )
        for name in CLASSES
    }
    ids = {side: bench.tokens(rng, args.batch, text["vocab_size"]) for side in PROMPTS}
    shape = (args.batch, args.latents, args.latents, 4)
    noise = rng.standard_normal(shape).astype(np.float32)
    given = (configs, weights, ids, noise, args.steps)
    systems = {"jaxft": Ours(*given), "diffusers": Theirs(*given)}
    times: dict[str, list[float]] = {name: [] for name in systems}
    pixels: dict[str, np.ndarray] = {}
    for _ in range(1 + args.rounds):
        for name, system in systems.items():
            started = time.perf_counter()
            pixels[name] = system.paint()
            times[name].append(time.perf_counter() - started)
    timed = {name: np.array(values[1:]) for name, values in times.items()}
    print(f"{'':12}{'s/image':>10}{'best':>10}")
    for name, seconds in timed.items():
        print(f"{name:12}{np.median(seconds) / args.batch:10.2f}{seconds.min() / args.batch:10.2f}")
    apart = np.abs(pixels["jaxft"].astype(int) - pixels["diffusers"]).max()
    result = {
        **vars(args),
        "ratio": round(float(np.median(timed["jaxft"]) / np.median(timed["diffusers"])), 3),
        "ratio_of_best": round(float(timed["jaxft"].min() / timed["diffusers"].min()), 3),
        "images_per_s": round(args.batch / float(np.median(timed["jaxft"])), 3),
        "first_s": round(times["jaxft"][0], 1),
        "largest_difference_of_pixels": int(apart),
        **bench.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
