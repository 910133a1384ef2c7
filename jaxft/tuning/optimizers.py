"""Optimizers and learning-rate schedules by the names that configurations use."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import UserError
from jaxft.tuning.groups import Labels

Rate = Callable[[Any], Any]
"""A learning rate as a function of the number of updates made so far."""


SMALL = 2**13
"""Scalars up to which a tensor is packed."""

PACKED = "small tensors"


def adamw(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> optax.GradientTransformation:
    """`torch.optim.AdamW`; Loshchilov and Hutter 2019 (https://arxiv.org/abs/1711.05101)."""
    return packed(optax.adamw(learning_rate, betas[0], betas[1], eps, weight_decay=weight_decay))


def packed(elementwise: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, over one vector in place of all small tensors.

    Two thirds of a UNet's tensors are biases and norms: as one vector they are one kernel to
    compile and to launch, not hundreds. Only for optimizers that treat each scalar by itself.
    """

    def pack(tree: Any) -> dict[str, Any]:
        leaves = {
            jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)
        }
        large = {name: leaf for name, leaf in leaves.items() if leaf.size > SMALL}
        small = [leaf.ravel() for leaf in leaves.values() if leaf.size <= SMALL]
        return large | ({PACKED: jnp.concatenate(small)} if small else {})

    def unpack(tree: Any, like: Any) -> Any:
        start = 0

        def take(path: Any, leaf: Any) -> Any:
            nonlocal start
            if leaf.size > SMALL:
                return tree[jax.tree_util.keystr(path)]
            start += leaf.size
            return tree[PACKED][start - leaf.size : start].reshape(leaf.shape)

        return jax.tree_util.tree_map_with_path(take, like)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = elementwise.update(pack(updates), state, pack(params))
        return unpack(new, params), state

    return optax.GradientTransformation(lambda params: elementwise.init(pack(params)), update)


def _one_cycle(warmup: int, total: int, div_factor: float = 25.0, final_div_factor: float = 1e4):
    """`torch.optim.lr_scheduler.OneCycleLR` with cosine legs; Smith and Topin 2018.

    Only the rate cycles: betas stay as they are.
    """
    start, end = 1 / div_factor, 1 / div_factor / final_div_factor
    peak = warmup - 1

    def half_cosine(progress):
        return 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))

    def factor(step):
        up = half_cosine(step / max(peak, 1))
        down = half_cosine((step - peak) / max(total - 1 - peak, 1))
        return jnp.where(step <= peak, start + (1 - start) * up, 1 + (end - 1) * down)

    return factor


def _warm(warmup: int, after: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A linear rise from 0 over `warmup` updates, then `after` of the updates since."""
    return lambda step: jnp.where(step < warmup, step / max(warmup, 1), after(step - warmup))


def _constant(warmup: int, total: int):
    return lambda step: jnp.ones_like(step, jnp.float32)


def _constant_with_warmup(warmup: int, total: int):
    return _warm(warmup, lambda since: 1.0)


def _linear(warmup: int, total: int):
    length = max(total - warmup, 1)
    return _warm(warmup, lambda since: jnp.maximum(0.0, (length - since) / length))


def _cosine(warmup: int, total: int, num_cycles: float = 0.5):
    speed = 2 * math.pi * num_cycles / max(total - warmup, 1)
    return _warm(warmup, lambda since: 0.5 + 0.5 * jnp.cos(speed * since))


SCHEDULES: dict[str, Callable[..., Callable[[Any], Any]]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "cosine": _cosine,
    "linear": _linear,
    "one_cycle": _one_cycle,
}
"""Factors of the rate as functions of (warm-up updates, updates in all); as in diffusers."""


def schedule(name: str, lr: float, warmup: int, total: int, **options: Any) -> Rate:
    """The rate lr · factor over `total` updates, the first `warmup` of them rising.

    Raises:
        UserError: an unknown name or option, or a warm-up as long as the run.
    """
    if name not in SCHEDULES:
        raise UserError(f"train.scheduler.name: {name!r} is not one of {', '.join(SCHEDULES)}")
    if name != "constant" and warmup >= total:
        raise UserError(
            f"train.scheduler.num_warmup_steps: {warmup} updates of warm-up do not fit into "
            f"{total} updates; lower it or train longer"
        )
    try:
        factor = SCHEDULES[name](warmup, total, **options)
    except TypeError:
        raise UserError(
            f"train.scheduler.scheduler_kwargs: {name} does not take {', '.join(options)}"
        ) from None
    return lambda step: lr * factor(step)


def grouped(
    labels: Labels,
    transforms: Mapping[str, optax.GradientTransformation],
    max_grad_norm: float | None,
) -> optax.GradientTransformation:
    """One optimizer for every group; gradients are clipped to a global norm before."""
    optimizer = optax.multi_transform({**transforms}, labels)
    if max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
