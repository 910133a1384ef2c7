"""What a configuration would train, on what and for how long: checked whole, before any step.

python -m jaxft.plan --config configs/train/ft1.yaml [--html FILE] [key=value …]
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxft import (
    averaging,
    cli,
    controls,
    datasets,
    loss_options,
    offloading,
    optimization,
    params,
    previews,
    profiling,
    report,
    selection,
    warm_start,
    words,
)
from jaxft import mesh as meshes
from jaxft.config import Config
from jaxft.data import captions, source
from jaxft.data.loader import Dataset
from jaxft.diffusion import guidance, schedule
from jaxft.diffusion.losses import Loss
from jaxft.diffusion.noise import Recipe
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, single_file
from jaxft.previews import Preview
from jaxft.selection import Selection
from jaxft.tuning import adapters as loras
from jaxft.tuning import schedules
from jaxft.tuning.ema import Average
from jaxft.tuning.groups import Group
from jaxft.warm_start import Begun
from jaxft.words import Words

COMPUTE = {"bf16": "bfloat16", "no": "float32"}
"""`mixed_precision` -> the dtype of activations; weights and moments are float32 always."""


class Plan(NamedTuple):
    """A configuration made real: everything a run needs, on the host."""

    config: Config
    model: diffusers_folder.Model
    noising: schedule.NoiseSchedule
    loss: Loss
    mesh: Mesh
    selection: Selection
    words: Words
    rates: dict[str, schedules.Rate]
    """Of each group, in updates made."""
    optimizer: optax.GradientTransformation
    average: Average | None
    """How a moving average of what is trained is kept."""
    offloaded: list[str]
    """Fields of the state that lie in the host's memory."""
    datasets: list[Dataset]
    held_out: list[Dataset]
    """What is seen in validation alone."""
    preview: Preview | None
    """What is painted while training."""
    total_steps: int
    notices: list[str]
    """What the user should know, a line each."""

    @property
    def accumulation(self) -> int:
        """Batches of each data set in one step."""
        return self.config.train.gradient_accumulation_steps

    def epoch(self, step: int) -> float:
        """Passes over the first data set after `step` updates."""
        return step * self.accumulation / self.datasets[0].num_batches

    @property
    def images_per_step(self) -> int:
        """Images of all data sets in one update."""
        return self.accumulation * sum(dataset.plan.batch_size for dataset in self.datasets)


def prepare(config: Config, notices: Sequence[str] = ()) -> Plan:
    """Reads the model and indexes the data.

    Raises:
        UserError: anything that would stop the run later.
    """
    mesh = meshes.make(**config.mesh)
    _check_counts(config)
    begun, opened = _begin(config)
    model = controls.add(config, begun.model)
    noising = schedule.from_config(model.scheduler, str(model.folder / "scheduler_config.json"))
    train, factors = config.train, {True: _images_per_update(config, mesh.size), False: 1}
    vocabulary = words.read(
        config.tokenizer_pt,
        model,
        factor=factors[train.scale_lr_pt],
        seed=config.seed,
        begun=begun.words,
    )
    selected = selection.select(config, model, factors[train.scale_lr], vocabulary.groups)
    selected = warm_start.select(selected, begun)
    sets, held_out, told = datasets.read(config, model, vocabulary, mesh.size)
    words.check_said(vocabulary, sets)
    judged = loss_options.from_config(train, noising)
    controls.check_data(model, [*sets, *held_out])
    datasets.check_holes(model, [*sets, *held_out])
    datasets.check_loss(judged, [*sets, *held_out])
    selection.check_guided(selected, judged.guidance is not None)
    datasets.check_latent_caches(config, sets)
    datasets.check_text_caches(config, selected.labels, [*sets, *held_out])
    total_steps = _total_steps(train, sets[0].num_batches)
    steered = optimization.from_config(config, selected, model, total_steps)
    return Plan(
        config,
        model,
        noising,
        judged,
        mesh,
        selected,
        vocabulary,
        steered.rates,
        steered.optimizer,
        averaging.from_config(config, total_steps),
        offloading.from_config(config, mesh),
        sets,
        held_out,
        previews.read(config, model, vocabulary),
        total_steps,
        [
            *notices,
            *opened,
            *begun.notices,
            *vocabulary.notices,
            *selected.notices,
            *steered.notices,
            *_not_written(config, selected),
            *_alike(judged, total_steps * train.gradient_accumulation_steps, sets),
            *told,
        ],
    )


def _begin(config: Config) -> tuple[Begun, list[str]]:
    """The model and what is put into it before step 1, and what was found out of the model."""
    options = config.model
    model, opened = single_file.open_model(
        options.pretrained_model_name_or_path, revision=options.revision, variant=options.variant
    )
    if not diffusers_folder.is_inpainting(model):
        diffusers_folder.check_text_to_image(model)
    if options.zero_terminal_snr:
        model = _ending_in_noise(model)
    return warm_start.read(config.train.warm_start, model), opened


def _ending_in_noise(model: diffusers_folder.Model) -> diffusers_folder.Model:
    """The model with the schedule of Lin et al. 2023 (https://arxiv.org/abs/2305.08891), which
    samplers must begin at its end."""
    kind = model.scheduler.get("prediction_type", "epsilon")
    if kind != "v_prediction":
        raise UserError(
            f"model.zero_terminal_snr: {model.folder} has prediction_type: {kind}, and where there "
            "is noise alone only the prediction of v teaches something; set it to false, or train "
            "a model with prediction_type: v_prediction"
        )
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return model._replace(scheduler=model.scheduler | schedule)


def _not_written(config: Config, selected: Selection) -> list[str]:
    """A notice of exports that there are none of."""
    reason = "words alone are trained, the model stays as it was"
    if selection.has_branches(selected):
        reason = "a model has one set of weights, LoRAs with branches make two of them"
    elif selected.labels.keys() != {words.PART}:
        return []
    wanted = [name for name in ("webui", "diffusers") if (config.export or {}).get(name)]
    return [f"export.{name}: not written: {reason}" for name in wanted]


def _alike(judged: Loss, batches: int, sets: Sequence[Dataset]) -> list[str]:
    """A notice of losses that are too few to draw timesteps by."""
    how = judged.importance
    if how is None:
        return []
    return [
        f"train.loss.timesteps: importance has no effect on {dataset.name}: of its "
        f"{batches * dataset.plan.batch_size} images too few come to each range; lower ranges or "
        "history of timesteps_kwargs"
        for dataset in sets
        if batches * dataset.plan.batch_size < how.ranges * how.history
    ]


def _check_counts(config: Config) -> None:
    train = config.train
    for key in ("train_steps", "gradient_accumulation_steps", "save_step", "keep_last", "log_step"):
        if train[key] < 1:
            raise UserError(f"train.{key}: {train[key]} must be at least 1")
    if train.train_epochs is not None and train.train_epochs < 1:
        raise UserError(f"train.train_epochs: {train.train_epochs} must be at least 1")
    if train.workers < 0:
        raise UserError(f"train.workers: {train.workers} must be at least 0")
    if config.logger.log_step.wandb is not None and config.logger.wandb is None:
        raise UserError(
            "logger.log_step.wandb: nothing goes to Weights & Biases; name a project in "
            "logger.wandb, or leave it out"
        )
    if not config.data:
        raise UserError("data: no data set; inherit configs/train/dataset/base_dataset.yaml")


def _total_steps(train: Config, num_batches: int) -> int:
    total = train.train_steps
    if train.train_epochs is not None:
        total = -(-train.train_epochs * num_batches // train.gradient_accumulation_steps)
    profiling.check(train.profile, total)
    return total


def _images_per_update(config: Config, num_devices: int) -> int:
    """By which `scale_lr` and `scale_lr_pt` multiply rates."""
    images = sum(data.batch_size for data in config.data.values() if data.held_out < 1)
    return images * num_devices * config.train.gradient_accumulation_steps


def describe(plan: Plan) -> str:
    """The plan as text for people."""
    config, train = plan.config, plan.config.train
    devices = f"{plan.mesh.size} × {jax.devices()[0].device_kind}"
    layout = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    if plan.mesh.shape["fsdp"] > 1:
        networks = {name: part.params for name, part in plan.model.parts.items()}
        layout += f", each with {meshes.share(plan.mesh, networks):.1%} of the weights"
    schedule_name = train.scheduler.name
    ending = ", down to noise alone" if plan.noising.alphas_cumprod[-1] == 0 else ""
    length = (
        f"{train.train_epochs} epochs" if train.train_epochs else f"{train.train_steps} updates"
    )
    blocks = [
        ("model", [f"{plan.model.folder} ({plan.noising.prediction_type}{ending})"]),
        ("devices", [f"{devices} ({layout}), computing in {COMPUTE[config.mixed_precision]}"]),
        ("train", [_group_line(plan, group) for group in plan.selection.groups]),
        ("data", [line for dataset in plan.datasets for line in _dataset_lines(dataset)]),
        ("held out", _validation_lines(plan)),
        (
            "steps",
            [
                f"{plan.total_steps} ({length}; {plan.epoch(plan.total_steps):.1f} epochs of "
                f"{plan.datasets[0].name}), {plan.images_per_step} images each, "
                f"schedule {schedule_name}"
            ],
        ),
        ("optimizer", optimization.told(train, plan.selection.groups)),
        ("loss", _loss_lines(config.train)),
        ("preview", previews.told(plan.preview)),
        ("average", averaging.told(plan.average)),
        ("offloaded", offloading.told(train.offload)),
        ("profile", profiling.told(train.profile)),
        ("notice", plan.notices),
    ]
    return "\n".join(
        f"{title if i == 0 else '':10}{line}"
        for title, lines in blocks
        for i, line in enumerate(lines)
    )


def _validation_lines(plan: Plan) -> list[str]:
    """What is held out, and when and how it is judged."""
    options, count = plan.config.train.validation, len(plan.noising.alphas_cumprod)
    return [
        f"{dataset.name}: {len(dataset.records)} images; their loss is computed before step 1, "
        f"every {options.every} updates and at the end, at {min(options.timesteps, count)} "
        f"timesteps"
        for dataset in plan.held_out
    ]


def _loss_lines(train: Config) -> list[str]:
    """What differs from the mean squared error at uniform timesteps, of plain noise."""
    loss, noise = train.loss, train.noise
    criterion = loss.criterion.to_dict()
    name = criterion.pop("_target_").rpartition(".")[2]
    told = [] if name == "MSELoss" and "ssim" not in criterion else [_told(name, criterion)]
    if loss.target is not None:
        told.append(f"target {loss.target}")
    if loss.normalise_mask:
        told.append("divided by the mean of a mask")
    if loss.weighting is not None:
        told.append(_told(loss.weighting, loss.weighting_kwargs.to_dict()))
    if loss.timesteps != "uniform" or loss.timesteps_kwargs or loss.low_discrepancy:
        spread = ["evenly spread"] if loss.low_discrepancy else []
        times = _told(loss.timesteps, loss.timesteps_kwargs.to_dict())
        told.append(" ".join([times, *spread, "timesteps"]))
    if (scale := str(train.cfg_scale)) not in guidance.OFF:
        told.append(f"guidance {scale}")
    usual = Recipe()._asdict()
    told += [
        f"{key.replace('_', ' ')} {value}" if "_" in key else f"{key} noise {value}"
        for key, value in noise.to_dict().items()
        if value != usual[key]
    ]
    return ["; ".join(told)] if told else []


def _told(name: str, options: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in options.items() if key[0] != "_")])


def _group_line(plan: Plan, group: Group) -> str:
    if group.network == words.PART:
        return words.line(plan.words, group)
    chosen, parts = plan.selection, plan.model.parts
    own = [
        np.prod(parts[network].params[name].shape)
        for network, labels in chosen.labels.items()
        for name, label in labels.items()
        if label == group.name and network in parts
    ]
    low = [
        adapter
        for adapters in chosen.adapters.values()
        for layer in adapters.values()
        for adapter in layer
        if adapter.group == group.name
    ]
    networks = [part.params for name, part in parts.items() if name.startswith(group.network)]
    total = sum(map(params.count, networks))
    weights = int(sum(own)) + sum(adapter.size for adapter in low)
    tensors = f"{len(own)} tensors"
    faster = f" (of up {group.lr * group.up_ratio:.3g})" if group.up_ratio != 1 else ""
    if low:
        tensors = loras.describe(low)
    return (
        f"{group.name:10}{weights:>13,} weights ({100 * weights / total:.1f} %) in "
        f"{tensors}, rate {group.lr:.3g}{faster}, layers {', '.join(map(repr, group.layers))}"
    )


def _dataset_lines(dataset: Dataset) -> list[str]:
    lines = [
        f"{dataset.name}: {len(dataset.records)} images, {dataset.num_batches} batches of "
        f"{dataset.plan.batch_size} an epoch, loss weight {dataset.loss_weight:g}"
        + (", target: the model before training" if dataset.teacher else "")
    ]
    lines += [f"  {line}" for line in report.bucket_lines(dataset)]
    first = dataset.records[0]
    lines.append(f"  e.g. {captions.shown(first.path.name)}: {source.prompt(first, 0)!r}")
    if first.recipe.negative:
        lines.append(f"  against {source.negative(first, 0)!r}")
    return lines


def parse(argv: Sequence[str], add: Callable[[argparse.ArgumentParser], object] | None = None):
    """The arguments that all programs of training take: a file and overrides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", "--cfg", help="YAML file")
    if add:
        add(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    cli.run(cli.program("plan"))
