"""What a function would cost, from its shapes alone: nothing is compiled or computed."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

KERNELS = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}
"""Fused kernels -> how many products of queries' and keys' lengths they compute."""


class Costs(NamedTuple):
    """What a function would take."""

    flops: int
    """Operations of its products and convolutions, an addition and a multiplication for each pair
    of factors; where a branch is chosen while it runs, of the dearest."""
    peak_bytes: int
    """Live at the most, besides arguments and results: each value from the operation that makes it
    to the last that reads it, in the program's order. A compiler that joins operations needs less,
    one that changes their order may need more."""


def of(function: Callable[..., Any], *args: Any) -> Costs:
    """The costs of a function that `jax.make_jaxpr` can trace, of arguments that may be shapes."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return Costs(_flops(jaxpr), _peak(jaxpr))


def _peak(jaxpr: Any) -> int:
    same = _same(jaxpr)
    elsewhere = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars)}
    equations = [eqn for eqn in jaxpr.eqns if not any(id(var) in same for var in eqn.outvars)]
    reads = [{same.get(id(var), id(var)): var for var in eqn.invars} for eqn in equations]
    last = {key: number for number, read in enumerate(reads) for key in read}
    live = peak = 0
    for number, (equation, read) in enumerate(zip(equations, reads, strict=True)):
        made = {id(var): var for var in equation.outvars if id(var) not in elsewhere}
        live += sum(map(_bytes, made.values()))
        peak = max(peak, live + max(map(_peak, _inner(equation)), default=0))
        live -= sum(
            _bytes(var)
            for key, var in (read | made).items()
            if key not in elsewhere and last.get(key, number) == number and not hasattr(var, "val")
        )
    return peak


def _same(jaxpr: Any) -> dict[int, int]:
    """Values that an earlier operation has made of the same: a compiler makes them once."""
    same: dict[int, int] = {}
    first: dict[Any, Sequence[Any]] = {}
    for equation in jaxpr.eqns:
        read = [
            (str(var.aval), str(var.val)) if hasattr(var, "val") else same.get(id(var), id(var))
            for var in equation.invars
        ]
        what = (equation.primitive.name, tuple(read), str(sorted(equation.params.items())))
        if not equation.effects and not any(_inner(equation)):
            made = first.setdefault(what, equation.outvars)
            if made is not equation.outvars:
                same |= {
                    id(var): same.get(id(old), id(old))
                    for var, old in zip(equation.outvars, made, strict=True)
                }
    return same


def _bytes(var: Any) -> int:
    aval = var.aval
    return aval.size * getattr(aval.dtype, "itemsize", 0)


def _flops(jaxpr: Any) -> int:
    return sum(_flops_of(equation) for equation in jaxpr.eqns)


def _flops_of(equation: Any) -> int:
    name, inner = equation.primitive.name, [_flops(jaxpr) for jaxpr in _inner(equation)]
    if name == "dot_general":
        ((contracted, _), _) = equation.params["dimension_numbers"]
        factors = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(factors[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if kernel := next((count for start, count in KERNELS.items() if name.startswith(start)), 0):
        (b, s, h, d), t = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return 2 * kernel * b * s * t * h * d
    if name == "cond":
        return max(inner)
    return equation.params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _convolution(equation: Any) -> int:
    kernel, how = equation.invars[1].aval.shape, equation.params
    _, features, *taps = how["dimension_numbers"].rhs_spec
    # Between the pixels of a strided convolution's gradient are zeros, which nobody multiplies.
    each = math.prod(kernel[i] for i in (features, *taps)) / math.prod(how["lhs_dilation"])
    return round(2 * equation.outvars[0].aval.size * each)


def _inner(equation: Any) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in equation.params.values():
        for node in value if isinstance(value, tuple | list) else (value,):
            node = getattr(node, "jaxpr", node)
            if hasattr(node, "eqns"):
                yield node
