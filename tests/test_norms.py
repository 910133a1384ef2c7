"""Norms and their gradients, beside PyTorch's and beside PyTorch's in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft import params
from jaxft.models.norms import GroupNorm, LayerNorm

SHAPES = [(2, 4, 6, 32), (1, 1, 1, 32), (3, 17, 64), (2, 64), (1, 32, 24, 8)]
GROUPED = [(shape, groups) for shape in SHAPES for groups in (1, 4, shape[-1] // 2)]


def pulled(layer: Any, weight: Any, bias: Any, x: Any, grad: Any, **options: Any) -> list:
    """The layer's values, and the gradients of its input, weight and bias."""
    graphdef, _ = params.abstract(lambda: layer)

    def call(x: Any, weight: Any, bias: Any) -> Any:
        return params.bind(graphdef, {"weight": weight, "bias": bias})(x, **options)

    out, pull = jax.vjp(call, *map(jnp.asarray, (x, weight, bias)))
    return [out, *pull(jnp.asarray(grad, out.dtype))]


def torchs(call: Any, dtype: torch.dtype, x: Any, weight: Any, bias: Any, grad: Any) -> list:
    leaves = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (x, weight, bias)]
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.tensor(grad, dtype=dtype))
    return [value.detach().double().numpy() for value in (out, *grads)]


def group_norm(groups: int, silu: bool, eps: float) -> Any:
    """PyTorch's, with the channels last."""

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.group_norm(x.movedim(-1, 1), groups, weight, bias, eps)
        return (torch.nn.functional.silu(y) if silu else y).movedim(1, -1)

    return call


def drawn(rng: np.random.Generator, shape: tuple[int, ...], mean: float) -> list[np.ndarray]:
    """Input, weight, bias, gradient."""
    sizes = shape, shape[-1:], shape[-1:], shape
    x, weight, bias, grad = (rng.normal(size=size).astype(np.float32) for size in sizes)
    return [x + np.float32(mean), weight, bias, grad]


def allowed(theirs: np.ndarray, mean: float) -> np.ndarray:
    """Errors like PyTorch's; a mean that is rounded moves all values by as much."""
    return 2 * theirs + 2e-6 + mean * np.finfo(np.float32).eps


def errors(found: list, exact: list) -> np.ndarray:
    """Of values and gradients, relative to the largest."""
    return np.array(
        [
            np.max(np.abs(one - other)) / max(np.max(np.abs(other)), 1e-3)
            for one, other in zip(map(np.asarray, found), exact, strict=True)
        ]
    )


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "groups"), GROUPED)
def test_group_norm_is_as_exact_as_pytorchs(rng, shape, groups, silu, mean):
    x, weight, bias, grad = drawn(rng, shape, mean)
    found = pulled(GroupNorm(groups, shape[-1]), weight, bias, x, grad, silu=silu)
    call = group_norm(groups, silu, 1e-5)
    exact = torchs(call, torch.float64, x, weight, bias, grad)
    theirs = errors(torchs(call, torch.float32, x, weight, bias, grad), exact)
    assert np.all(errors(found, exact) <= allowed(theirs, mean))


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_as_exact_as_pytorchs(rng, shape, mean):
    x, weight, bias, grad = drawn(rng, shape, mean)
    found = pulled(LayerNorm(shape[-1]), weight, bias, x, grad)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, shape[-1:], weight, bias, 1e-5)

    exact = torchs(call, torch.float64, x, weight, bias, grad)
    theirs = errors(torchs(call, torch.float32, x, weight, bias, grad), exact)
    assert np.all(errors(found, exact) <= allowed(theirs, mean))


@pytest.mark.parametrize("silu", [False, True])
def test_half_precision_is_rounded_once(rng, silu):
    x, weight, bias, grad = drawn(rng, (2, 8, 8, 32), 1.0)
    x, grad = (np.asarray(jnp.asarray(value, jnp.bfloat16), np.float32) for value in (x, grad))
    layer = GroupNorm(8, 32)
    exact = pulled(layer, weight, bias, x, grad, silu=silu)
    half = pulled(layer, weight, bias, jnp.asarray(x, jnp.bfloat16), grad, silu=silu)
    assert [value.dtype for value in half] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    for one, other in zip(half, exact, strict=True):
        np.testing.assert_array_equal(one, other.astype(one.dtype))
