"""What the steps of a plan will take, before anything is compiled: operations, memory and time."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import assembly, costs, memory, report
from jaxft import plan as plans
from jaxft import step as steps
from jaxft.costs import Costs
from jaxft.models import encoder
from jaxft.plan import Plan
from jaxft.prediction import Objective, Weights

SHARE = 0.4
"""Of the rate of products of large matrices, what training reaches."""

ROOM = 0.85
"""Of a device's memory, what a forecast may say for a policy to be chosen."""

SHORTEST, TRIES = 0.02, 5
"""Seconds that the product lasts by which a device is measured, and of how many the best counts."""

POLICIES = {True: "blocks", False: "none"} | {name: name for name in encoder.REMAT}
"""Values of `model.gradient_checkpointing`, apart from `auto` -> the policy."""


class Forecast(NamedTuple):
    """Of a batch of one bucket, on each device."""

    dataset: str
    size: tuple[int, int]
    """Width and height in pixels."""
    num_batches: int
    """In an epoch."""
    flops: float
    memory: float
    """Bytes at the most, with all that is held throughout."""
    in_host: int
    """Bytes of the device in the host's memory."""


def of_plan(plan: Plan, remat: str) -> list[Forecast]:
    """A forecast for each bucket of each data set.

    Of each data set, one batch of the largest bucket is counted operation by operation; what the
    others take is in proportion to their areas. What is offloaded is on a device beside what is
    held while it changes, and a gradient's temporaries at another time: the larger of the two
    counts.

    Args:
        plan: what is to be trained.
        remat: a key of `encoder.REMAT`.
    """
    run, found = assembly.outline(plan, remat), []
    begun = assembly.initial_shapes(plan)
    state = run.programs.state(begun)
    held, brought = run.programs.held(state, run.frozen), run.programs.brought(state)
    for dataset in run.plan.datasets:
        areas = [shape.size[0] * shape.size[1] for shape in dataset.shapes]
        largest = int(np.argmax(areas))
        batch = _of_a_device(assembly.one_of_each_shape(dataset)[largest], plan.mesh.size)
        flops, peak = costs_of_gradient(run.objective, begun, run.frozen, batch, run.key)
        temporary = run.programs.side_by_side(peak)
        found += [
            Forecast(
                dataset.name,
                shape.size,
                shape.num_batches,
                flops * area / areas[largest],
                held + max(temporary * area / areas[largest], brought),
                run.programs.in_host(state),
            )
            for shape, area in zip(dataset.shapes, areas, strict=True)
        ]
    return found


def costs_of_gradient(
    objective: Objective, trainable: Weights, frozen: Weights, batch: dict[str, Any], key: Any
) -> Costs:
    """What the gradient of a batch takes on a device that computes all of it (arrays or shapes)."""

    def gradient(trainable: Weights, *given: Any) -> Weights:
        return jax.grad(lambda weights: steps.loss(objective, weights, *given))(trainable)

    return costs.of(gradient, trainable, frozen, batch, key)


def _of_a_device(batch: Mapping[str, Any], num_devices: int) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct((value.shape[0] // num_devices, *value.shape[1:]), value.dtype)
        for name, value in batch.items()
    }


def policy(plan: Plan) -> str:
    """The key of `encoder.REMAT` that `model.gradient_checkpointing` stands for.

    `auto` is the first that fits the memory of a device with room to spare, of those that compute
    the least again. On a CPU it is always none: its compiler finds what is computed twice, and
    keeps it after all.
    """
    wanted = plan.config.model.gradient_checkpointing
    if plan.mesh.devices.flat[0].platform == "cpu":
        return "none"
    return fitting(plan, memory.of_device()) if wanted == "auto" else POLICIES[wanted]


def fitting(plan: Plan, limit: int | None) -> str:
    """The policy that `auto` stands for on devices with `limit` bytes (None: not known)."""
    for name in encoder.REMAT:
        if limit is None or max(one.memory for one in of_plan(plan, name)) <= ROOM * limit:
            return name
    return [*encoder.REMAT][-1]


def rate(dtype: str) -> float:
    """Operations a second of a device in a product of two large matrices, measured."""
    product, size, seconds = jax.jit(jnp.matmul), 512, 0.0
    while seconds < SHORTEST:
        size *= 2
        matrix = jnp.ones((size, size), dtype)
        jax.block_until_ready(product(matrix, matrix))
        seconds = min(_seconds(lambda m=matrix: product(m, m)) for _ in range(TRIES))
    return 2 * size**3 / seconds


def _seconds(compute: Callable[[], jax.Array]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - began


def told(plan: Plan) -> str:
    """The forecast as text for people, in the form of `plan.describe`."""
    remat = policy(plan)
    found, fastest = of_plan(plan, remat), rate(plans.COMPUTE[plan.config.mixed_precision])
    reached = SHARE * fastest
    updates = plan.accumulation * plan.total_steps
    seconds = sum(
        updates / dataset.num_batches * one.num_batches * one.flops / reached
        for dataset in plan.datasets
        for one in found
        if one.dataset == dataset.name
    )
    lines = [
        f"{one.dataset} {report.size_text(one.size)}: {one.flops / 1e9:,.0f} GFLOP, about "
        f"{one.flops / reached:.2g} s and {memory.gib(one.memory)} GiB a batch"
        for one in found
    ]
    most, in_host = round(max(one.memory for one in found)), found[0].in_host
    lines += [
        f"about {_length(seconds)} for {plan.total_steps} steps at {SHARE:.0%} of the "
        f"{fastest / 1e9:,.0f} GFLOP/s of large products here",
        f"about {memory.describe(most, memory.of_device(), in_host)}, recomputing {remat}",
    ]
    return "\n".join(f"{'forecast' if i == 0 else '':10}{line}" for i, line in enumerate(lines))


def _length(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
