"""Optimizers by the names that configurations use."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxft.errors import UserError
from jaxft.tuning import groups
from jaxft.tuning.groups import Labels
from jaxft.tuning.rounding import halved
from jaxft.tuning.schedules import Rate

SMALL = 2**13
"""Scalars up to which a tensor is packed."""

PACKED = "small tensors"

WHOLE = 512
"""Scalars of which what is packed has a multiple, so that devices can share it."""


def adamw(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    moments: str = "fp32",
) -> optax.GradientTransformation:
    """`torch.optim.AdamW`; Loshchilov and Hutter 2019 (https://arxiv.org/abs/1711.05101)."""
    made = optax.adamw(learning_rate, betas[0], betas[1], eps, weight_decay=weight_decay)
    return packed(_remembering(made, moments))


def lion(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    moments: str = "fp32",
    use_triton: bool = False,
) -> optax.GradientTransformation:
    """`lion_pytorch.Lion`; Chen et al. 2023 (https://arxiv.org/abs/2302.06675).

    `use_triton` is there for its configurations, and changes nothing.
    """
    made = optax.lion(learning_rate, *betas, weight_decay=weight_decay)
    return packed(_remembering(made, moments))


def sgd(
    learning_rate: float | Rate,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    moments: str = "fp32",
) -> optax.GradientTransformation:
    """`torch.optim.SGD`; its weight decay is added to the gradient.

    Raises:
        UserError: `moments` where there is none, as without momentum.
    """
    if moments != "fp32" and not momentum:
        raise UserError("moments: without momentum nothing is remembered; leave it out")
    decay = optax.add_decayed_weights(weight_decay)
    made = optax.chain(decay, optax.sgd(learning_rate, momentum or None, nesterov))
    return packed(_remembering(made, moments))


def _remembering(
    optimizer: optax.GradientTransformation, moments: str
) -> optax.GradientTransformation:
    """The same optimizer, its moments in that precision: `bf16`, stochastically rounded."""
    if moments not in ("fp32", "bf16"):
        raise UserError(f"moments: {moments!r} is neither fp32 nor bf16")
    return halved(optimizer) if moments == "bf16" else optimizer


def prodigy(
    learning_rate: float | Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    use_bias_correction: bool = True,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
) -> optax.GradientTransformation:
    """`prodigyopt.Prodigy`; Mishchenko and Defazio 2023 (https://arxiv.org/abs/2306.06101).

    It finds the size of the rate; `learning_rate` is a factor of it, 1 as a rule. Each group finds
    its own.

    Raises:
        UserError: without bias correction, which is not supported.
    """
    if not use_bias_correction:
        raise UserError("use_bias_correction: false is not supported; leave it out")
    found = optax.contrib.prodigy(
        learning_rate, betas, beta3, eps, d0, d_coef, weight_decay, safeguard_warmup
    )
    return _owning(found)


def _owning(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, whose state shares no array with the weights: both are donated."""

    def init(params: Any) -> Any:
        return optimizer.init(jax.tree.map(jnp.copy, params))

    return optax.GradientTransformation(init, optimizer.update)


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
        if not small:
            return large
        vector = jnp.concatenate(small)
        return large | {PACKED: jnp.pad(vector, (0, -vector.size % WHOLE))}

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


def is_vector(name: str, ndim: int) -> bool:
    """Whether a weight is a norm's or a bias, as the lengths that a `dora` trains are, too."""
    return ndim < 2 or name.endswith("dora_scale")


def split(
    variants: Mapping[str, optax.GradientTransformation], choose: Callable[[str, Any], str]
) -> optax.GradientTransformation:
    """One of several optimizers for each weight, chosen by its name and array."""
    if len(variants) == 1:
        return next(iter(variants.values()))

    def labels(weights: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: choose(path[-1].key, leaf), weights
        )

    return optax.multi_transform({**variants}, labels)


def grouped(
    labels: Labels,
    transforms: Mapping[str, optax.GradientTransformation],
    max_grad_norm: float | None,
) -> optax.GradientTransformation:
    """One optimizer for every group; gradients are clipped to a global norm before, but for those
    of words, which are not, nor count in the norm, as in HCP-Diffusion."""
    optimizer = optax.multi_transform({**transforms}, labels)
    clipped = {part: part != "words" for part in labels}
    if max_grad_norm is None or not any(clipped.values()):
        return optimizer
    return optax.chain(optax.masked(_clipped(max_grad_norm), clipped), optimizer)


def _clipped(most: float) -> optax.GradientTransformation:
    """Gradients that together are longer than `most` are shortened to it."""

    def clip(grads: Any, _: Any = None) -> Any:
        shrink = jnp.minimum(1, most / groups.norm(jax.tree.leaves(grads)))
        return jax.tree.map(lambda grad: grad * shrink.astype(grad.dtype), grads)

    return optax.stateless(clip)
