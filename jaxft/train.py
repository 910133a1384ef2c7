"""Training.

    python -m jaxft.train --config configs/train/ft1.yaml [key=value …]
    python -m jaxft.train --resume exps/2026-11-22-10-15-00 [key=value …]

A run writes one folder; see `docs/`. Ctrl-C and SIGTERM save and end it (exit code 130 or 143).
"""

import hashlib
import json
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import jax

from jaxft import (
    assembly,
    caches,
    cli,
    collector,
    compile_cache,
    forecast,
    hosts,
    memory,
    params,
    profiling,
)
from jaxft import config as configs
from jaxft import mesh as meshes
from jaxft import plan as plans
from jaxft.assembly import Run
from jaxft.checkpoint import Checkpoints
from jaxft.config import Config
from jaxft.data import bucket_table, latents, loader
from jaxft.data.records import Record
from jaxft.data.source import negative, prompt
from jaxft.errors import UserError
from jaxft.gallery import write_text
from jaxft.lock import lock
from jaxft.log import RunLog
from jaxft.painter import Painter
from jaxft.plan import Plan
from jaxft.profiling import Trace
from jaxft.records import Numbers, Parts, export, lasting, log_steps, parts_of, words_of
from jaxft.signals import Stop
from jaxft.step import TrainState, result
from jaxft.validation import Validation

UNSAVED = {
    ".lock",
    "cfg.yaml",
    "plan.txt",
    "buckets.json",
    "train.log",
    "metrics.jsonl",
    "tblog",
    "preview",
    "validation",
    profiling.FOLDER,
    "wandb",
    "state",
}
"""What a run leaves behind that ended before its first checkpoint."""


def main(argv: Sequence[str]) -> int:
    """Trains; returns 0, or 128 + the number of the signal that ended the run early."""
    args = plans.parse(
        argv, lambda parser: parser.add_argument("--resume", help="folder of a run to go on with")
    )
    overrides = list(args.overrides)
    if args.resume:
        overrides.append(f"train.resume.run={json.dumps(args.resume)}")
    file = args.config or (args.resume and str(Path(args.resume) / "cfg.yaml"))
    if not file:
        raise UserError("name a configuration, --config FILE, or a run to go on with, --resume RUN")
    if args.resume:
        _check_is_run(Path(args.resume))
    return train(*configs.load(file, overrides))


def train(config: Config, notices: Sequence[str] = ()) -> int:
    """Runs the configuration; see `main`."""
    with hosts.joined(**config.distributed):
        return _train(config, notices)


def _train(config: Config, notices: Sequence[str]) -> int:
    began = time.monotonic()
    hosts.check_same("configuration", _recipe(config))
    folder, resumes = _folder(config)
    compile_cache.enable(config.compile_cache)
    plan = plans.prepare(config, notices)
    hosts.check_same("data", {"what is read": _fingerprint(plan)})
    with lock(folder) if hosts.is_first() else hosts.Mute(), Stop() as stop:
        checkpoints = Checkpoints(folder / "state", config.train.keep_last)
        start = _latest(checkpoints, folder) if resumes else 0
        if hosts.is_first():
            _write_records(folder, plan, start)
        with _log(plan, folder, start) as log:
            log.message(plans.describe(plan))
            plan = caches.fill(plan, say=log.message, stopped=lambda: stop.requested)
            run = assembly.assemble(plan, forecast.policy(plan))
            assembly.check_room(run)
            state = _start(run, checkpoints, start, log)
            if not hosts.largest(stop.requested or 0):
                _compile(run, state, log)
            if asked := hosts.largest(stop.requested or 0):
                log.message("stopped before the first step")
                return 128 + asked
            return _loop(run, state, folder, checkpoints, log, stop, start, began)


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
    folder = Path(hosts.of_first(config.exp_dir))  # the time of each process may be in it
    if (
        hosts.is_first()
        and folder.exists()
        and (not folder.is_dir() or {p.name for p in folder.iterdir()} - UNSAVED)
    ):
        raise UserError(
            f"exp_dir: {folder} is not empty; choose another, or go on there with --resume {folder}"
        )
    return folder, False


def _latest(checkpoints: Checkpoints, folder: Path) -> int:
    step = checkpoints.latest()
    if step is None:
        raise UserError(f"{folder}: no complete checkpoint in it; start anew, in another folder")
    return step


def _recipe(config: Config) -> dict[str, Any]:
    """The configuration without what ties it to a folder and to a process."""
    recipe = config.to_dict()
    del recipe["exp_dir"], recipe["distributed"]
    return recipe


def _log(plan: Plan, folder: Path, start: int) -> RunLog:
    """The log of a run, for the first process; others say nothing."""
    if not hosts.is_first():
        return cast(RunLog, hosts.Mute())
    every, project = log_steps(plan.config), plan.config.logger.wandb
    return RunLog(folder, plan.total_steps, start, every=every, wandb=project)


def _parts(plan: Plan, folder: Path) -> Parts:
    """The part files of a run, which the first process writes."""
    if not hosts.is_first():
        return cast(Parts, hosts.Mute())
    return Parts(folder / "ckpts", plan.config.ckpt_dtype, lasting(plan))


def _write_records(folder: Path, plan: Plan, start: int) -> None:
    """cfg.yaml, without what ties it to this folder, plan.txt and buckets; old ones are kept."""
    recipe = _recipe(plan.config)
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
        originals = dataset.summary.originals
        entries[dataset.name] = bucket_table.entry(options, originals, dataset.buckets)
    return bucket_table.to_text(entries)


def _start(run: Run, checkpoints: Checkpoints, start: int, log: RunLog) -> TrainState:
    """The state of a checkpoint, or of step 0; says so if the data is not what it was."""
    plan = run.plan
    trainable = assembly.initial(plan)
    if not start:
        return run.programs.init(assembly.put(plan, trainable))
    state, extra = checkpoints.restore(start, run.programs.state(trainable))
    if extra["data"] != _fingerprint(plan):
        log.message(
            "notice    images, captions, words or buckets have changed since the checkpoint: the "
            "run goes on with the new ones, in another order"
        )
    return state


def _fingerprint(plan: Plan) -> str:
    """SHA-256 of all that the batches are made of, and of the words that are not trained."""
    whole = hashlib.sha256()
    if plan.words.frozen:
        whole.update(params.digest(plan.words.frozen).encode())
    for dataset in plan.datasets:
        for record, size in zip(dataset.records, dataset.sizes, strict=True):
            mask = record.mask and record.mask.digest
            others = "".join(f" {own}" for own in _beside(record))
            texts = [prompt(record, 0), *record.captions[1:]]
            texts += [negative(record, 0)] if record.recipe.negative else []
            line = f"{dataset.name} {dataset.plan.batch_size} {latents.key(record, size)} "
            whole.update(f"{line}{record.crop} {record.flip} {mask}{others} {texts}".encode())
    return whole.hexdigest()


def _beside(record: Record) -> list[str]:
    """What else of a record batches are made of."""
    files = [file for file in (record.cond, record.hole) if file is not None]
    return [file if isinstance(file, str) else file.digest for file in files]


def _compile(run: Run, state: TrainState, log: RunLog) -> None:
    began = time.monotonic()
    with compile_cache.found() as found, collector.paused():
        count = assembly.compile_all(run, state)
    seconds = time.monotonic() - began
    log.message(f"compiled  {count} programs in {seconds:.1f} s, {len(found)} from the cache")
    needed, limit = run.programs.memory(state, run.frozen), memory.of_device()
    told = memory.describe(needed, limit, run.programs.in_host(state))
    log.message(f"memory    {told}")
    memory.check(needed, limit, "steps of this batch_size")


# ---------------------------------------------------------------------------------------- loop


def _loop(
    run: Run,
    state: TrainState,
    folder: Path,
    checkpoints: Checkpoints,
    log: RunLog,
    stop: Stop,
    start: int,
    began: float,
) -> int:
    """Steps `start` to the end, or to the one in which the user asks to stop."""
    plan, every = run.plan, run.plan.config.train.save_step
    numbers, data = Numbers(plan, log), _fingerprint(plan)
    asked, largest = 0, hosts.Largest(plan.mesh)
    watchers = [Validation(run, folder, log), Painter(run, folder, log)]
    if not start:
        _watch(watchers, 0, state)
    log.start()
    with (
        closing(checkpoints),
        closing(_parts(plan, folder)) as parts,
        closing(_feed(plan, start)) as feed,
        closing(Trace(plan.config.train.profile, folder, log.message)) as trace,
        hosts.guarded(log.message if hosts.is_first() else None),
        collector.spared(),
    ):
        for step in range(start + 1, plan.total_steps + 1):
            trace.before(step, state)
            with log.waiting():
                batches = next(feed)
            state, metrics = run.programs.step(state, run.frozen, run.key, batches)
            if plan.average and step % plan.average.every == 0:
                state = run.programs.average(state, plan.average.share(step))
            if step == start + 1:
                jax.block_until_ready(metrics)
                log.message(f"step {step}    {time.monotonic() - began:.1f} s after the start")
            numbers.add(step, metrics)
            log.advance(step)
            asked = largest(stop.requested or 0)
            last = step == plan.total_steps or asked
            if any(watcher.is_due(step) for watcher in watchers) and not asked:
                numbers.flush()
                with log.paused():
                    _watch(watchers, step, state)
            if last or step % every == 0:
                numbers.flush()
                checkpoints.save(step, state, {"data": data})
                trained, average = meshes.fetch((result(state), state.average))
                parts.write(step, parts_of(plan, trained, average), words_of(plan, trained))
            if last:
                break
    if asked:
        log.message(f"stopped; go on with: python -m jaxft.train --resume {folder}")
        return 128 + asked
    trained, average = meshes.fetch((result(state), state.average))
    if hosts.is_first():
        for path in export(plan, trained, average, folder):
            log.message(f"wrote     {path}")
    return 0


def _watch(watchers: Sequence[Validation | Painter], step: int, state: TrainState) -> None:
    """Has the weights after a step judged and painted; nothing else of the run changes."""
    for watcher in watchers:
        if watcher.is_due(step):
            watcher(step, state)


def _feed(plan: Plan, start: int) -> Generator[list[list[Any]], None, None]:
    """Batches of each step on the devices, of each data set one for each part.

    They are made ahead in threads; a step is not waited for, so that while it is computed the next
    one's batch is on its way. Each process makes the rows that lie on its devices.
    """
    mesh, parts, workers = plan.mesh, plan.accumulation, plan.config.train.workers
    sizes = [dataset.plan.batch_size for dataset in plan.datasets]
    streams = [
        loader.open(d, start * parts, workers=workers, rows=meshes.own_rows(mesh, size))
        for d, size in zip(plan.datasets, sizes, strict=True)
    ]
    try:
        while True:
            yield [
                [meshes.put_batch(mesh, next(stream), size) for _ in range(parts)]
                for stream, size in zip(streams, sizes, strict=True)
            ]
    finally:
        for stream in streams:
            stream.close()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    cli.run(main)
