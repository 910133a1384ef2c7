"""Muon: for matrices and kernels, the momentum with all its singular values made equal.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); scaled as in Liu et al. 2025
(https://arxiv.org/abs/2502.16982), so that its updates have the size of AdamW's and the rates of
one serve the other.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jaxft.tuning.optimizers import adamw
from jaxft.tuning.schedules import Rate

RMS = 0.2
"""Root mean square of an update, in units of the rate: what AdamW's have."""

COEFFICIENTS, ITERATIONS = (3.4445, -4.775, 2.0315), 5


def muon(
    learning_rate: float | Rate,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
) -> optax.GradientTransformation:
    """Muon for matrices and kernels, AdamW for biases, norms, embeddings of tokens and of time.

    Args:
        learning_rate: of both.
        momentum: Nesterov's, of Muon.
        weight_decay: of both.
        betas: of AdamW.
    """

    def labels(weights: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "vectors" if leaf.ndim < 2 or _embeds(path) else "matrices", weights
        )

    matrices = stacked(orthogonalised(learning_rate, momentum, weight_decay))
    vectors = adamw(learning_rate, betas=betas, weight_decay=weight_decay)
    return optax.multi_transform({"matrices": matrices, "vectors": vectors}, labels)


def _embeds(path: Any) -> bool:
    return "embedding" in jax.tree_util.keystr(path)


def orthogonalised(
    learning_rate: float | Rate, momentum: float = 0.95, weight_decay: float = 0.1
) -> optax.GradientTransformation:
    """Muon of stacks of matrices [n, rows, columns]; `torch.optim.Muon` with `match_rms_adamw`."""

    def size(matrices: jax.Array) -> float:
        return RMS * math.sqrt(max(matrices.shape[1:]))

    def direction(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        buffer = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, buffer, updates)
        return jax.tree.map(lambda m: size(m) * orthogonal(m), ahead), buffer

    return optax.chain(
        optax.GradientTransformation(
            lambda params: jax.tree.map(jnp.zeros_like, params), direction
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def orthogonal(matrices: Float[jax.Array, "n r c"]) -> Float[jax.Array, "n r c"]:
    """Matrices with singular values near 1 and the same singular vectors: Newton and Schulz's
    iteration, with the coefficients of Jordan et al."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.swapaxes(1, 2)
    length = jnp.linalg.norm(wide, axis=(1, 2), keepdims=True)
    x = wide / jnp.maximum(length, 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.swapaxes(1, 2)


def stacked(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer of matrices, over stacks [n, rows, columns] of those of one shape.

    A UNet's hundreds of matrices have a few dozen shapes: so much less to compile and to launch.
    Kernels OIHW are taken as matrices O x IHW.
    """

    def stack(tree: Any) -> dict[str, jax.Array]:
        shapes: dict[tuple[int, ...], list[jax.Array]] = {}
        for leaf in jax.tree.leaves(tree):
            matrix = leaf.reshape(len(leaf), -1)
            shapes.setdefault(matrix.shape, []).append(matrix)
        return {str(shape): jnp.stack(matrices) for shape, matrices in shapes.items()}

    def unstack(stacks: Any, like: Any) -> Any:
        rest = {shape: iter(matrices) for shape, matrices in stacks.items()}

        def take(leaf: jax.Array) -> jax.Array:
            shape = str((len(leaf), leaf.size // len(leaf)))
            return next(rest[shape]).reshape(leaf.shape)

        return jax.tree.map(take, like)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = optimizer.update(stack(updates), state, stack(params))
        return unstack(new, params), state

    return optax.GradientTransformation(lambda params: optimizer.init(stack(params)), update)
