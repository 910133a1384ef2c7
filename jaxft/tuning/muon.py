"""Muon: for matrices and kernels, the momentum with all its singular values made equal.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); scaled as in Liu et al. 2025
(https://arxiv.org/abs/2502.16982), so that its updates have the size of AdamW's and the rates of
one serve the other.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxft.tuning.optimizers import adamw
from jaxft.tuning.schedules import Rate

RMS = 0.2
"""Root mean square of an update, in units of the rate: what AdamW's have."""


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
    """Muon of stacks of matrices [n, rows, columns]."""
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    return optax.contrib.muon(
        learning_rate,
        beta=momentum,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: axes, tree),
        consistent_rms=RMS,
    )


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
