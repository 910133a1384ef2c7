"""jaxft's attention beside PyTorch's, on this machine's CPU, float32: forward, and with gradient.

python scripts/bench_attention.py
"""

import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from jaxft.models.attention import attend

SIZES = ((2, 1024, 1024, 8, 8), (2, 1024, 77, 8, 8), (1, 1024, 1024, 8, 40), (1, 4096, 4096, 8, 40))
"""Batch, queries, keys, heads, head size."""


def best(function: Callable[[], object], times: int = 6) -> float:
    """Milliseconds of the quickest call, after two that do not count."""
    seconds = []
    for _ in range(times + 2):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return 1e3 * min(seconds[2:])


def with_gradient(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple:
    """Attention and the gradients of q, k and v."""
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(grad)


def main() -> None:
    print(f"{'b, s, t, h, d':28}{'jaxft':>16}{'PyTorch':>16}   ms forward / with gradient")
    forward = jax.jit(attend)
    both = jax.jit(with_gradient)
    for size in SIZES:
        b, s, t, h, d = size
        rng = np.random.default_rng(0)
        q, k, v, g = (rng.standard_normal((b, n, h, d), np.float32) for n in (s, t, t, s))
        leaves = [torch.tensor(x.transpose(0, 2, 1, 3), requires_grad=True) for x in (q, k, v)]
        grad = torch.tensor(g.transpose(0, 2, 1, 3))

        def theirs(leaves=leaves) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(*leaves)

        ours_ms = [
            best(lambda x=(q, k, v): jax.block_until_ready(forward(*x))),
            best(lambda x=(q, k, v, g): jax.block_until_ready(both(*x))),
        ]
        theirs_ms = [best(theirs), best(lambda run=theirs, grad=grad: run().backward(grad))]
        cells = [f"{one:.1f} / {two:.1f}" for one, two in (ours_ms, theirs_ms)]
        print(f"{', '.join(map(str, size)):28}{cells[0]:>16}{cells[1]:>16}")


if __name__ == "__main__":
    main()
