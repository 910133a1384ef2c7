"""Training.

    python -m jaxft.train --config configs/train/ft1.yaml [key=value …]
    python -m jaxft.train --resume exps/2026-11-22-10-15-00 [key=value …]

A run writes one folder; see `docs/`. Ctrl-C and SIGTERM save and end it (exit code 130 or 143).
"""

import hashlib
import json
import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import caches, cli, compile_cache, params, selection, words
from jaxft import config as configs
from jaxft import mesh as meshes
from jaxft import plan as plans
from jaxft.checkpoint import Checkpoints
from jaxft.compiled import Programs
from jaxft.config import Config
from jaxft.data import bucket_table, latents, loader
from jaxft.data.loader import Dataset
from jaxft.data.source import negative, prompt
from jaxft.errors import UserError
from jaxft.gallery import write_text
from jaxft.lock import lock
from jaxft.log import RunLog
from jaxft.params import abstract
from jaxft.plan import Plan
from jaxft.records import Numbers, Parts, export, lasting, parts_of, words_of
from jaxft.signals import Stop
from jaxft.step import Objective, TrainState, Weights, result
from jaxft.tuning import adapters

UNSAVED = {
    ".lock",
    "cfg.yaml",
    "plan.txt",
    "buckets.json",
    "train.log",
    "metrics.jsonl",
    "tblog",
    "state",
}
"""What a run leaves behind that ended before its first checkpoint."""

REMAT = {True: "blocks", False: "none"}
"""Policies that `model.gradient_checkpointing` may name by yes or no."""


class Run(NamedTuple):
    """What the loop needs, on the devices."""

    plan: Plan
    programs: Programs
    frozen: Weights
    key: jax.Array


def main(argv: Sequence[str]) -> int:
    """Trains; returns 0, or 128 + the number of the signal that ended the run early."""
    args = plans.parse(
        argv, lambda parser: parser.add_argument("--resume", help="folder of a run to go on with")
    )
    overrides = list(args.overrides)
    if args.resume:
        overrides.append(f"train.resume={json.dumps(args.resume)}")
    file = args.config or (args.resume and str(Path(args.resume) / "cfg.yaml"))
    if not file:
        raise UserError("name a configuration, --config FILE, or a run to go on with, --resume RUN")
    if args.resume:
        _check_is_run(Path(args.resume))
    return train(*configs.load(file, overrides))


def train(config: Config, notices: Sequence[str] = ()) -> int:
    """Runs the configuration; see `main`."""
    folder, resumes = _folder(config)
    compile_cache.enable(config.compile_cache)
    plan = plans.prepare(config, notices)
    with lock(folder), Stop() as stop:
        checkpoints = Checkpoints(folder / "state", config.train.keep_last)
        start = _latest(checkpoints, folder) if resumes else 0
        _write_records(folder, plan, start)
        with RunLog(folder, plan.total_steps, start) as log:
            log.message(plans.describe(plan))
            plan = caches.fill(plan, say=log.message, stopped=lambda: stop.requested)
            run = _to_devices(plan)
            state = _start(run, checkpoints, start, log)
            if not stop.requested:
                _compile(run, state, log)
            if stop.requested:
                log.message("stopped before the first step")
                return 128 + stop.requested
            return _loop(run, state, folder, checkpoints, log, stop, start)


# -------------------------------------------------------------------------------------- set-up


def _check_is_run(folder: Path) -> None:
    lacking = [name for name in ("cfg.yaml", "state") if not (folder / name).exists()]
    if lacking:
        raise UserError(
            f"--resume: {folder} is not the folder of a run that was saved, it lacks "
            f"{' and '.join(lacking)}"
        )


def _folder(config: Config) -> tuple[Path, bool]:
    """The run's folder, and whether the run goes on there."""
    if config.train.resume:
        folder = Path(config.train.resume)
        _check_is_run(folder)
        return folder, True
    folder = Path(config.exp_dir)
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - UNSAVED):
        raise UserError(
            f"exp_dir: {folder} is not empty; choose another, or go on there with --resume {folder}"
        )
    return folder, False


def _latest(checkpoints: Checkpoints, folder: Path) -> int:
    step = checkpoints.latest()
    if step is None:
        raise UserError(f"{folder}: no complete checkpoint in it; start anew, in another folder")
    return step


def _write_records(folder: Path, plan: Plan, start: int) -> None:
    """cfg.yaml, without what ties it to this folder, plan.txt and buckets; old ones are kept."""
    recipe = plan.config.to_dict()
    del recipe["exp_dir"]
    recipe["train"]["resume"] = None
    texts = {
        "cfg.yaml": configs.to_yaml(recipe),
        "plan.txt": plans.describe(plan) + "\n",
        bucket_table.FILE: _bucket_table(plan),
    }
    for name, text in texts.items():
        path = folder / name
        old = path.read_text("utf-8") if path.exists() else text
        if old != text:
            write_text(folder / f"{path.stem}-until-{start}{path.suffix}", old)
        write_text(path, text)


def _bucket_table(plan: Plan) -> str:
    entries = {}
    for dataset in plan.datasets:
        options = plan.config.data[dataset.name].bucket.to_dict()
        sizes = [record.size for record in dataset.records]
        entries[dataset.name] = bucket_table.entry(options, sizes, dataset.buckets)
    return bucket_table.to_text(entries)


def _placed(plan: Plan, weights: Weights) -> Weights:
    """Weights on the devices, split as the mesh says."""
    return jax.device_put(weights, meshes.shardings(plan.mesh, weights))


def _to_devices(plan: Plan) -> Run:
    """Networks and frozen weights; of the VAE only what steps need."""
    config, parts, family = plan.config, plan.model.parts, plan.model.family
    dtype = jnp.dtype(plans.COMPUTE[config.mixed_precision])
    policy = config.model.gradient_checkpointing
    remat = REMAT[policy] if isinstance(policy, bool) else policy
    options = {"unet": {"remat": remat}}
    labels, loras = plan.selection.labels, plan.selection.adapters
    frozen: dict[str, Any] = {
        name: {k: v for k, v in part.params.items() if k not in labels.get(name, {})}
        for name, part in parts.items()
    }
    frozen = {
        name: params.cast(weights, np.float32 if name == "vae" else dtype)
        for name, weights in frozen.items()
    }
    if all(dataset.moments is not None for dataset in plan.datasets):
        del frozen["vae"]
    if all(dataset.text is not None for dataset in plan.datasets):
        for name in family.text_encoders:
            del frozen[name]
    elif plan.words.frozen:
        frozen[words.PART] = dict(plan.words.frozen)

    def build(name: str) -> Any:
        network = family.networks[name](parts[name].config, **options.get(name, {}))
        return adapters.attach(network, loras.get(name, {}))

    clip_skip, final_norm = family.text_layer(config.model.clip_skip, config.model.clip_final_norm)
    objective = Objective(
        networks={name: abstract(lambda n=name: build(n))[0] for name in frozen if name in parts},
        schedule=plan.noising,
        scaling_factor=parts["vae"].config.get("scaling_factor", 0.18215),
        dtype=dtype,
        clip_skip=clip_skip,
        clip_final_norm=final_norm,
        loss=plan.loss,
        dropouts={
            name: keys for name, own in loras.items() if (keys := adapters.dropout_keys(own))
        },
    )
    programs = Programs(
        objective,
        plan.optimizer,
        plan.mesh,
        loss_weights=[dataset.loss_weight for dataset in plan.datasets],
        accumulation=plan.accumulation,
        averages=plan.average is not None,
    )
    if any(dataset.teacher for dataset in plan.datasets):
        frozen |= _teacher(_initial(plan), dtype)
    key = jax.device_put(jax.random.key(config.seed), meshes.replicated(plan.mesh))
    return Run(plan, programs, _placed(plan, frozen), key)


def _initial(plan: Plan) -> dict[str, Any]:
    """What is trained as it is before the first step, on the host."""
    dtype = params.DTYPES[plan.config.train.weights_dtype]
    trainable = selection.initial(plan.selection, plan.model, plan.config.seed, dtype)
    return trainable | ({words.PART: plan.words.trained} if plan.words.groups else {})


def _teacher(initial: Weights, dtype: Any) -> Weights:
    """What is trained, as it is before the first step, beside the frozen weights."""
    teacher: Weights = {}
    for part, weights in initial.items():
        name = f"teacher_{part.removeprefix('lora_')}"
        teacher[name] = teacher.get(name, {}) | params.cast(weights, dtype)
    return teacher


def _start(run: Run, checkpoints: Checkpoints, start: int, log: RunLog) -> TrainState:
    """The state of a checkpoint, or of step 0; says so if the data is not what it was."""
    plan = run.plan
    trainable = _initial(plan)
    if not start:
        return run.programs.init(_placed(plan, trainable))
    state, extra = checkpoints.restore(start, run.programs.state(trainable))
    if extra["data"] != _fingerprint(plan):
        log.message(
            "notice    images, captions, words or buckets have changed since the checkpoint: the "
            "run goes on with the new ones, in another order"
        )
    return state


def _fingerprint(plan: Plan) -> str:
    """SHA-256 of all that the batches are made of, and of the words that are not trained."""
    lines = [params.digest(plan.words.frozen)] if plan.words.frozen else []
    lines += [
        f"{dataset.name} {dataset.plan.batch_size} {latents.key(record, size)} {record.crop} "
        f"{record.flip} {record.mask and record.mask.digest} {prompt(record, 0)}"
        + "".join(record.captions[1:])
        + (negative(record, 0) if record.recipe.negative else "")
        for dataset in plan.datasets
        for record, size in zip(dataset.records, dataset.sizes, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _compile(run: Run, state: TrainState, log: RunLog) -> None:
    batches = [_one_of_each_shape(dataset) for dataset in run.plan.datasets]
    run.programs.compile(state, run.frozen, run.key, batches)
    log.message(f"memory    {run.programs.memory() / 2**30:.2f} GiB on each device")


def _one_of_each_shape(dataset: Dataset) -> list[dict[str, jax.ShapeDtypeStruct]]:
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
        if dataset.moments is None:
            batch["pixel_values"] = ((rows, height, width, 3), np.uint8)
        else:
            batch["moments"] = ((rows, height // 8, width // 8, 8), np.float32)
        batches.append({k: jax.ShapeDtypeStruct(*v) for k, v in batch.items()})
    return batches


# ---------------------------------------------------------------------------------------- loop


def _loop(
    run: Run,
    state: TrainState,
    folder: Path,
    checkpoints: Checkpoints,
    log: RunLog,
    stop: Stop,
    start: int,
) -> int:
    """Steps `start` to the end, or to the one in which the user asks to stop."""
    plan, every = run.plan, run.plan.config.train.save_step
    numbers, data = Numbers(plan, log, start), _fingerprint(plan)
    log.start()
    with (
        closing(checkpoints),
        closing(Parts(folder / "ckpts", plan.config.ckpt_dtype, lasting(plan))) as parts,
        closing(_feed(plan, start)) as feed,
    ):
        for step in range(start + 1, plan.total_steps + 1):
            state, metrics = run.programs.step(state, run.frozen, run.key, next(feed))
            if plan.average and step % plan.average.every == 0:
                state = run.programs.average(state, plan.average.share(step))
            numbers.add(step, metrics)
            log.advance(step)
            last = step == plan.total_steps or stop.requested
            if last or step % every == 0:
                numbers.flush()
                checkpoints.save(step, state, {"data": data})
                trained, average = jax.device_get((result(state), state.average))
                parts.write(step, parts_of(plan, trained, average), words_of(plan, trained))
            if last:
                break
    if stop.requested:
        log.message(f"stopped; go on with: python -m jaxft.train --resume {folder}")
        return 128 + stop.requested
    trained, average = jax.device_get((result(state), state.average))
    for path in export(plan, trained, average, folder):
        log.message(f"wrote     {path}")
    return 0


def _feed(plan: Plan, start: int) -> Generator[list[list[Any]], None, None]:
    """Batches of each step on the devices, of each data set one for each part; one step ahead."""
    where = meshes.batch_sharding(plan.mesh)
    parts = plan.accumulation
    workers = plan.config.train.workers
    streams = [loader.open(d, start * parts, workers=workers) for d in plan.datasets]

    def take() -> list[list[Any]]:
        return [[jax.device_put(next(stream), where) for _ in range(parts)] for stream in streams]

    try:
        ahead = take()
        while True:
            yield ahead
            ahead = take()
    finally:
        for stream in streams:
            stream.close()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    cli.run(main)
