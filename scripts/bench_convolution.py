"""Times convolutions with their gradients, as layers compute them and as XLA's own operation.

    python scripts/bench_convolution.py

Only where few pixels come out do the two differ, and only on a CPU; see `jaxft.models.layers`.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import params
from jaxft.models import layers

SHAPES = ((16, 64, 32), (8, 128, 64), (4, 192, 96), (2, 224, 112))
"""Height and width, channels in and out, of a narrow UNet's levels."""

BATCH, ROUNDS = 32, 12


def gradient(few_pixels: int, channels: tuple[int, int]) -> Callable:
    """The compiled gradient of a convolution, products being used below so many pixels."""
    graphdef, _ = params.abstract(lambda: layers.Conv2d(*channels, 3, padding=1))

    def loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        layers.FEW_PIXELS = few_pixels
        return jnp.sum(jnp.square(params.bind(graphdef, weights)(x)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def milliseconds(run: Callable, *args: object) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    rng, few = np.random.default_rng(0), layers.FEW_PIXELS
    print(f"{'pixels':>8}{'channels':>12}{'layer':>10}{'XLA':>10}   ms, best of {ROUNDS} in turn")
    for size, inputs, outputs in SHAPES:
        x = jnp.asarray(rng.normal(size=(BATCH, size, size, inputs)), jnp.float32)
        weight = jnp.asarray(rng.normal(size=(outputs, inputs, 3, 3)), jnp.float32)
        weights = {"weight": weight, "bias": jnp.zeros(outputs)}
        runs = [gradient(limit, (inputs, outputs)) for limit in (few, 0)]
        for run in runs:
            milliseconds(run, weights, x)  # compiles
        times = np.min([[milliseconds(run, weights, x) for run in runs] for _ in range(ROUNDS)], 0)
        channels = f"{inputs}->{outputs}"
        print(f"{size}x{size:<5}{channels:>12}{times[0]:10.1f}{times[1]:10.1f}".rjust(40))


if __name__ == "__main__":
    main()
