"""Group norm with SiLU and layer norm, with their gradients: jaxft's, the same derived by JAX, and
PyTorch's, on this machine's CPU in float32.

    python scripts/bench_norm.py
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxft.models import norms

GROUPS, EPS, ROUNDS = 16, 1e-5, 20
MAPS = ((8, 16, 16, 32), (8, 8, 8, 64), (2, 32, 32, 320), (1, 64, 64, 320))
ROWS = ((8, 256, 32), (2, 1024, 320), (1, 4096, 320))
"""Batch, height and width or rows, channels."""


def normalized(f: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    mean = f.mean(axis=axes, keepdims=True)
    variance = jnp.square(f - mean).mean(axis=axes, keepdims=True)
    return (f - mean) * jax.lax.rsqrt(variance + EPS)


def derived_group_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    grouped = x.reshape(x.shape[0], -1, GROUPS, x.shape[-1] // GROUPS)
    return jax.nn.silu(normalized(grouped, (1, 3)).reshape(x.shape) * weight + bias)


def derived_layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return normalized(x, (-1,)) * weight + bias


def our_group_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return norms._group_norm(x, weight, bias, GROUPS, EPS, True)


def our_layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return norms._layer_norm(x, weight, bias, EPS)


def torch_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(
        torch.nn.functional.group_norm(x.movedim(-1, 1), GROUPS, weight, bias, EPS)
    ).movedim(1, -1)


def torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def of_jax(call: Callable, values: list[np.ndarray], grad: np.ndarray) -> Callable[[], Any]:
    def both(values: list[jax.Array], grad: jax.Array) -> tuple:
        out, pull = jax.vjp(call, *values)
        return out, pull(grad)

    compiled = jax.jit(both)
    arrays = [jnp.asarray(value) for value in values], jnp.asarray(grad)
    return lambda: jax.block_until_ready(compiled(*arrays))


def of_torch(call: Callable, values: list[np.ndarray], grad: np.ndarray) -> Callable[[], Any]:
    leaves = [torch.tensor(value, requires_grad=True) for value in values]
    given = torch.tensor(grad)
    return lambda: torch.autograd.grad(call(*leaves), leaves, given)


def milliseconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    print(f"{'':32}{'jaxft':>10}{'derived':>10}{'PyTorch':>10}   ms, best of {ROUNDS} in turn")
    kinds = {
        "group norm, SiLU": (MAPS, our_group_norm, derived_group_norm, torch_group_norm),
        "layer norm": (ROWS, our_layer_norm, derived_layer_norm, torch_layer_norm),
    }
    rng = np.random.default_rng(0)
    for kind, (shapes, *calls) in kinds.items():
        for shape in shapes:
            sizes = shape, shape[-1:], shape[-1:], shape
            *values, grad = (rng.standard_normal(size, np.float32) for size in sizes)
            makers = (of_jax, of_jax, of_torch)
            runs = [make(call, values, grad) for make, call in zip(makers, calls, strict=True)]
            for run in runs:
                run()  # compiles
            best = np.min([[milliseconds(run) for run in runs] for _ in range(ROUNDS)], axis=0)
            cells = "".join(f"{time:10.2f}" for time in best)
            print(f"{kind + ', ' + ' × '.join(map(str, shape)):32}{cells}")


if __name__ == "__main__":
    main()
