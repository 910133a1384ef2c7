"""What a configuration would train, on what and for how long: checked whole, before any step.

python -m jaxft.plan --config configs/train/ft1.yaml [--html FILE] [key=value …]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxft import averaging, cli, compat, gallery, loss_options, params, report, selection
from jaxft import config as configs
from jaxft import mesh as meshes
from jaxft.config import Config
from jaxft.data import bucket_table, captions, prompts, source
from jaxft.data.batches import BatchPlan
from jaxft.data.buckets import Buckets, Size
from jaxft.data.loader import Dataset
from jaxft.data.tokens import Tokenizer
from jaxft.diffusion import schedule
from jaxft.diffusion.losses import Loss
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, single_file
from jaxft.selection import Selection
from jaxft.shapes import TEXT_INPUTS
from jaxft.tuning import adapters as loras
from jaxft.tuning import optimizers, schedules
from jaxft.tuning.ema import Average
from jaxft.tuning.groups import Group, Labels

COMPUTE = {"bf16": "bfloat16", "no": "float32"}
"""`mixed_precision` -> the dtype of activations; weights and moments are float32 always."""

MAX_PROMPTS = 100
"""Of an image, where they are encoded before the first step."""


class Plan(NamedTuple):
    """A configuration made real: everything a run needs, on the host."""

    config: Config
    model: diffusers_folder.Model
    noising: schedule.NoiseSchedule
    loss: Loss
    mesh: Mesh
    selection: Selection
    rates: dict[str, schedules.Rate]
    """Of each group, in updates made."""
    optimizer: optax.GradientTransformation
    average: Average | None
    """How a moving average of what is trained is kept."""
    datasets: list[Dataset]
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
    options = config.model
    model, opened = single_file.open_model(
        options.pretrained_model_name_or_path, revision=options.revision, variant=options.variant
    )
    diffusers_folder.check_text_to_image(model)
    noising = schedule.from_config(model.scheduler, str(model.folder / "scheduler_config.json"))
    selected = selection.select(config, model, _rate_factor(config, mesh.size))
    datasets, told = _datasets(config, model, mesh.size)
    _check_latent_caches(config, datasets)
    _check_text_caches(config, selected.labels, datasets)
    total_steps = _total_steps(config.train, datasets[0].num_batches)
    rates = _rates(config.train.scheduler, selected.groups, total_steps)
    transforms = {
        name: compat.build(
            config.train.optimizer, "optimizer", "train.optimizer", learning_rate=rate
        )
        for name, rate in rates.items()
    }
    return Plan(
        config,
        model,
        noising,
        loss_options.from_config(config.train, noising),
        mesh,
        selected,
        rates,
        optimizers.grouped(selected.labels, transforms, config.train.max_grad_norm),
        averaging.from_config(config, total_steps),
        datasets,
        total_steps,
        [*notices, *opened, *selected.notices, *told],
    )


def _check_counts(config: Config) -> None:
    train = config.train
    for key in ("train_steps", "gradient_accumulation_steps", "save_step", "keep_last", "log_step"):
        if train[key] < 1:
            raise UserError(f"train.{key}: {train[key]} must be at least 1")
    if train.train_epochs is not None and train.train_epochs < 1:
        raise UserError(f"train.train_epochs: {train.train_epochs} must be at least 1")
    if train.workers < 0:
        raise UserError(f"train.workers: {train.workers} must be at least 0")
    if not config.data:
        raise UserError("data: no data set; inherit configs/train/dataset/base_dataset.yaml")


def _datasets(
    config: Config, model: diffusers_folder.Model, num_devices: int
) -> tuple[list[Dataset], list[str]]:
    datasets, notices = [], []
    resumed = config.train.resume
    tables = bucket_table.read(Path(resumed) / bucket_table.FILE) if resumed else {}
    tokenizers = [Tokenizer(folder) for folder in model.tokenizers.values()]
    for name, options in config.data.items():
        records = []
        for key, where in options.source.items():
            try:
                found = source.index(**_source_options(where))
            except UserError as error:
                raise UserError(f"data.{name}.source.{key}: {error}") from None
            records += found.records
            notices += found.notices
        sizes = [record.size for record in records]
        buckets, new = _buckets(name, options.bucket, sizes, tables.get(name))
        records = [record._replace(scaled=buckets.scaled) for record in records]
        batch_size = options.batch_size * num_devices
        try:
            plan = BatchPlan(buckets, batch_size, seed=config.seed, name=name, tail=options.tail)
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        repeats = config.model.tokenizer_repeats
        datasets.append(
            Dataset(
                name,
                records,
                buckets,
                plan,
                tokenizers,
                repeats,
                options.loss_weight,
                options.teacher,
                with_sizes=model.family.is_xl,
            )
        )
        notices += new + _truncated(datasets[-1]) + report.warnings(datasets[-1])
    return datasets, notices


def _buckets(
    name: str, options: Config, sizes: list[Size], saved: bucket_table.Saved | None
) -> tuple[Buckets, list[str]]:
    """A dataset's buckets: those of the run that goes on, unless other options are asked for."""
    key, node = f"data.{name}.bucket", options.to_dict()
    kept = saved if saved and bucket_table.matches(saved, node) else None
    buckets = compat.build(node, "bucket", key, sizes=sizes, known=kept.sizes if kept else ())
    if not kept:
        return buckets, []
    buckets, added = bucket_table.restore(kept, sizes, buckets)
    if not added:
        return buckets, []
    return buckets, [f"data.{name}: {added} images are new, and go to sizes that the run has"]


def _check_latent_caches(config: Config, datasets: Sequence[Dataset]) -> None:
    """Latents can be encoded before the first step if all views of the images are known."""
    for dataset in datasets:
        drawn = any(record.crop == "random" for record in dataset.records)
        if drawn and config.data[dataset.name].cache_latents:
            raise UserError(
                f"data.{dataset.name}.cache_latents: crop: random shows another part of an image "
                "in every epoch, which is not known before; use cache_latents: false, or center"
            )


def _check_text_caches(config: Config, labels: Labels, datasets: Sequence[Dataset]) -> None:
    """Prompts can be encoded before the first step if encoders stay as they are, and all prompts
    are known."""
    for dataset in datasets:
        if not config.data[dataset.name].cache_text:
            continue
        key = f"data.{dataset.name}.cache_text"
        if any(own for name, own in labels.items() if name.removeprefix("lora_") in TEXT_INPUTS):
            raise UserError(f"{key}: a text encoder is trained, so it must be false")
        for record in dataset.records:
            if record.recipe.draws:
                raise UserError(
                    f"{key}: the text_transforms of {record.path.name} make other prompts in every "
                    "epoch, which are not known before; use false"
                )
            if (count := len(prompts.every(record.captions, record.recipe))) > MAX_PROMPTS:
                raise UserError(
                    f"{key}: {record.path.name} has {count} prompts, more than the {MAX_PROMPTS} "
                    "that can be kept; use a prompt_template of fewer lines, or set it to false"
                )


def _source_options(options: Config) -> dict[str, Any]:
    template, where = options.prompt_template, options.to_dict()
    where["prompt_template"] = configs.find_shipped(template) if template else None
    if isinstance(where["caption_file"], dict):
        where["caption_file"] = compat.build(
            where["caption_file"], "caption loader", "caption_file"
        )
    where["text_transforms"] = [
        compat.build(node, "text transform", f"text_transforms.{name}")
        for name, node in where["text_transforms"].items()
    ]
    return where


def _truncated(dataset: Dataset) -> list[str]:
    names = dataset.truncated
    if not names:
        return []
    return [
        f"data.{dataset.name}: the prompts of {len(names)} images are cut at {75 * dataset.repeats}"
        f" tokens ({captions.shown(names[0])} …); raise model.tokenizer_repeats"
    ]


def _total_steps(train: Config, num_batches: int) -> int:
    if train.train_epochs is None:
        return train.train_steps
    return -(-train.train_epochs * num_batches // train.gradient_accumulation_steps)


def _rate_factor(config: Config, num_devices: int) -> int:
    """By which `scale_lr` multiplies all rates: the images of one update."""
    if not config.train.scale_lr:
        return 1
    images = sum(options.batch_size for options in config.data.values())
    return images * num_devices * config.train.gradient_accumulation_steps


def _rates(options: Config, named: list[Group], total_steps: int) -> dict[str, schedules.Rate]:
    return {
        group.name: schedules.schedule(
            options.name,
            group.lr,
            options.num_warmup_steps,
            options.num_training_steps or total_steps,
            **options.scheduler_kwargs.to_dict(),
        )
        for group in named
    }


def describe(plan: Plan) -> str:
    """The plan as text for people."""
    config, train = plan.config, plan.config.train
    devices = f"{plan.mesh.size} × {jax.devices()[0].device_kind}"
    layout = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    schedule_name = train.scheduler.name
    length = (
        f"{train.train_epochs} epochs" if train.train_epochs else f"{train.train_steps} updates"
    )
    blocks = [
        ("model", [f"{plan.model.folder} ({plan.noising.prediction_type})"]),
        ("devices", [f"{devices} ({layout}), computing in {COMPUTE[config.mixed_precision]}"]),
        ("train", [_group_line(plan, group) for group in plan.selection.groups]),
        ("data", [line for dataset in plan.datasets for line in _dataset_lines(dataset)]),
        (
            "steps",
            [
                f"{plan.total_steps} ({length}; {plan.epoch(plan.total_steps):.1f} epochs of "
                f"{plan.datasets[0].name}), {plan.images_per_step} images each, "
                f"schedule {schedule_name}"
            ],
        ),
        ("loss", _loss_lines(config.train)),
        ("average", averaging.told(plan.average)),
        ("notice", plan.notices),
    ]
    return "\n".join(
        f"{title if i == 0 else '':10}{line}"
        for title, lines in blocks
        for i, line in enumerate(lines)
    )


def _loss_lines(train: Config) -> list[str]:
    """What differs from the mean squared error at uniform timesteps, of plain noise."""
    loss, noise = train.loss, train.noise
    criterion = loss.criterion.to_dict()
    name = criterion.pop("_target_").rpartition(".")[2]
    told = [] if name == "MSELoss" else [_told(name, criterion)]
    if loss.weighting is not None:
        told.append(_told(loss.weighting, loss.weighting_kwargs.to_dict()))
    if loss.timesteps != "uniform" or loss.timesteps_kwargs or loss.low_discrepancy:
        spread = ["evenly spread"] if loss.low_discrepancy else []
        times = _told(loss.timesteps, loss.timesteps_kwargs.to_dict())
        told.append(" ".join([times, *spread, "timesteps"]))
    told += [
        f"{key} noise {value}" for key, value in noise.to_dict().items() if value not in (0, None)
    ]
    return ["; ".join(told)] if told else []


def _told(name: str, options: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in options.items() if key[0] != "_")])


def _group_line(plan: Plan, group: Group) -> str:
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
    if low:
        tensors = loras.describe(low)
    return (
        f"{group.name:10}{weights:>13,} weights ({100 * weights / total:.1f} %) in "
        f"{tensors}, rate {group.lr:.3g}, layers {', '.join(map(repr, group.layers))}"
    )


def _dataset_lines(dataset: Dataset) -> list[str]:
    lines = [
        f"{dataset.name}: {len(dataset.records)} images, {dataset.num_batches} batches of "
        f"{dataset.plan.batch_size} an epoch, loss weight {dataset.loss_weight:g}"
        + (", target: the model before training" if dataset.teacher else "")
    ]
    lines += [f"  {line}" for line in report.bucket_lines(dataset)]
    first = dataset.records[0]
    return [*lines, f"  e.g. {captions.shown(first.path.name)}: {source.prompt(first, 0)!r}"]


def parse(argv: Sequence[str], add: Callable[[argparse.ArgumentParser], object] | None = None):
    """The arguments that all programs of training take: a file and overrides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", "--cfg", help="YAML file")
    if add:
        add(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    """Prints the plan, and writes it as a page."""
    args = parse(
        argv, lambda parser: parser.add_argument("--html", type=Path, help="page to write")
    )
    if not args.config:
        raise UserError("name a configuration: --config FILE")
    if args.html and (args.html.is_dir() or not args.html.parent.is_dir()):
        raise UserError(f"--html: {args.html} is a folder, or lies in none: name a file")
    plan = prepare(*configs.load(args.config, args.overrides))
    text = describe(plan)
    print(text)
    if args.html:
        gallery.write_text(args.html, report.page(f"Plan of {args.config}", text, plan.datasets))
    return 0


if __name__ == "__main__":
    cli.run(main)
