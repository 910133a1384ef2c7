"""A plan on the devices: networks, frozen weights, and the programs of a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import caches, controls, memory, params, selection, words
from jaxft import mesh as meshes
from jaxft import plan as plans
from jaxft.compiled import Programs
from jaxft.data.loader import Dataset
from jaxft.models.controlnet import ControlNetModel
from jaxft.params import abstract
from jaxft.plan import Plan
from jaxft.prediction import TEACHER, Objective, Weights
from jaxft.shapes import NEGATIVE
from jaxft.step import TrainState
from jaxft.tuning import adapters
from jaxft.tuning.adapters import Adapters


class Run(NamedTuple):
    """What the loop needs, on the devices."""

    plan: Plan
    objective: Objective
    """Of the networks at rest: nothing is dropped."""
    programs: Programs
    frozen: Weights
    key: jax.Array


def put(plan: Plan, weights: Any) -> Any:
    """Weights on the devices, split as the mesh says."""
    return meshes.put(weights, meshes.shardings(plan.mesh, weights))


def assemble(plan: Plan, remat: str = "none") -> Run:
    """Networks and frozen weights; of the VAE only what steps need.

    Args:
        plan: what is trained.
        remat: a key of `encoder.REMAT`, for UNet and ControlNet.
    """
    plan = plan._replace(selection=selection.begin(plan.selection, plan.model))

    def place(weights: Mapping[str, Any], dtype: Any) -> Any:
        return put(plan, params.cast(weights, dtype))

    return _run(plan, remat, initial(plan), place)


def outline(plan: Plan, remat: str = "none") -> Run:
    """What `assemble` makes, with shapes for weights: none is read or put anywhere."""

    def shapes(weights: Mapping[str, Any], dtype: Any) -> Any:
        where = meshes.shardings(plan.mesh, weights)
        return {
            name: jax.ShapeDtypeStruct(weight.shape, dtype, sharding=where[name])
            for name, weight in weights.items()
        }

    return _run(caches.blank(plan), remat, initial_shapes(plan), shapes)


def _run(plan: Plan, remat: str, begun: Weights, place: Callable[[Any, Any], Any]) -> Run:
    """The run that begins as `begun`; `place` makes stored weights those of a run."""
    config, parts, family = plan.config, plan.model.parts, plan.model.family
    dtype = jnp.dtype(plans.COMPUTE[config.mixed_precision])
    datasets, unused = [*plan.datasets, *plan.held_out], set()
    if not any(dataset.with_pixels for dataset in datasets):
        unused.add("vae")
    if all(dataset.text is not None for dataset in datasets):
        unused |= {*family.text_encoders}
    used = [name for name in parts if name not in unused]
    frozen: Weights = {
        name: place(
            selection.frozen(plan.selection, plan.model, name),
            np.float32 if name == "vae" else dtype,
        )
        for name in used
    }
    if plan.words.frozen and not unused & {*family.text_encoders}:
        frozen[words.PART] = place(plan.words.frozen, np.float32)
    objective = _objective(plan, used, remat, plan.selection.adapters)
    programs = Programs(
        objective,
        plan.optimizer,
        plan.selection.labels,
        plan.mesh,
        loss_weights=[dataset.loss_weight for dataset in plan.datasets],
        accumulation=plan.accumulation,
        averages=plan.average is not None,
        offloaded=plan.offloaded,
    )
    if any(dataset.teacher for dataset in datasets):
        frozen |= {f"{TEACHER}{part}": place(weights, dtype) for part, weights in begun.items()}
    key = jax.jit(jax.random.key, out_shardings=meshes.replicated(plan.mesh))(config.seed)
    resting = {n: adapters.at_rest(own) for n, own in plan.selection.adapters.items()}
    return Run(plan, _objective(plan, used, remat, resting), programs, frozen, key)


def _objective(
    plan: Plan, used: Sequence[str], remat: str, loras: Mapping[str, Adapters]
) -> Objective:
    """What a step minimises, of the networks that it uses, with these LoRAs."""
    config, parts, family = plan.config, plan.model.parts, plan.model.family
    options = {name: {"remat": remat} for name in ("unet", controls.PART)}
    classes = {**family.networks, controls.PART: ControlNetModel}

    def build(name: str) -> Any:
        own = name.removeprefix(NEGATIVE)
        network = classes[own](parts[own].config, **options.get(own, {}))
        return adapters.attach(network, loras.get(name, {}))

    names = [*used, *(name for name in loras if name.startswith(NEGATIVE))]
    clip_skip, final_norm = family.text_layer(config.model.clip_skip, config.model.clip_final_norm)
    return Objective(
        networks={name: abstract(lambda n=name: build(n))[0] for name in names},
        schedule=plan.noising,
        scaling_factor=parts["vae"].config.get("scaling_factor", 0.18215),
        dtype=jnp.dtype(plans.COMPUTE[config.mixed_precision]),
        clip_skip=clip_skip,
        clip_final_norm=final_norm,
        loss=plan.loss,
        dropouts={
            name: keys for name, own in loras.items() if (keys := adapters.dropout_keys(own))
        },
    )


def initial(plan: Plan) -> dict[str, Any]:
    """What is trained as it is before the first step, on the host."""
    dtype = params.DTYPES[plan.config.train.weights_dtype]
    trainable = selection.initial(plan.selection, plan.model, plan.config.seed, dtype)
    return trainable | ({words.PART: plan.words.trained} if plan.words.groups else {})


def initial_shapes(plan: Plan) -> dict[str, Any]:
    """Shapes and dtypes of `initial`."""
    dtype = params.DTYPES[plan.config.train.weights_dtype]
    trainable = selection.shapes(plan.selection, plan.model, dtype)
    return trainable | ({words.PART: plan.words.trained} if plan.words.groups else {})


def check_room(run: Run) -> None:
    """Raises UserError, before anything is compiled, where what is held leaves no room."""
    state = run.programs.state(initial_shapes(run.plan))
    least = run.programs.held(state, run.frozen) + run.programs.brought(state)
    memory.check(least, memory.of_device(), "the weights, gradients and optimizer alone")


def compile_all(run: Run, state: TrainState) -> int:
    """Compiles all programs of a run, for the shapes of its batches; returns how many there are."""
    batches = [one_of_each_shape(dataset) for dataset in run.plan.datasets]
    return run.programs.compile(state, run.frozen, run.key, batches)


def one_of_each_shape(dataset: Dataset) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """A batch of every shape that a data set has, without numbers."""
    rows, batches = dataset.plan.batch_size, []
    text = dataset.texts(dataset.records[:1], [0])
    for width, height in (shape.size for shape in dataset.shapes):
        batch: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((rows, *value.shape[1:]), value.dtype) for name, value in text.items()
        }
        batch["weight"] = ((rows,), np.float32)
        if dataset.teacher:
            batch["teacher"] = ((rows,), np.float32)
        if dataset.with_sizes:
            batch["time_ids"] = ((rows, 6), np.float32)
        if dataset.with_masks:
            batch["mask"] = ((rows, height // 8, width // 8), np.float32)
        if dataset.with_conditions:
            batch["conditioning_pixel_values"] = ((rows, height, width, 3), np.uint8)
        if dataset.with_holes:
            batch["inpaint_mask"] = ((rows, height, width), np.uint8)
        if dataset.with_pixels:
            batch["pixel_values"] = ((rows, height, width, 3), np.uint8)
        if dataset.moments is not None:
            batch["moments"] = ((rows, height // 8, width // 8, 8), np.float32)
        batches.append({k: jax.ShapeDtypeStruct(*v) for k, v in batch.items()})
    return batches
