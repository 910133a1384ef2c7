"""The numbers of a run: progress bar, train.log, metrics.jsonl and TensorBoard, in one place."""

import contextlib
import datetime
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxft.errors import UserError

LOGS: Sequence[str] = ("text", "metrics", "tensorboard", "wandb")
"""What is written: train.log and lines or a bar on the terminal; metrics.jsonl; TensorBoard's
files; Weights & Biases' numbers, where asked for."""

TAGS = {"total": "total_loss", "images_per_s": "images_per_second"}
"""What numbers are called in TensorBoard, where not as in metrics.jsonl."""

Sums = Mapping[str, Mapping[str, Float[np.ndarray, "2"]]]
"""Data set -> range of timesteps -> the sum of its images' errors, and of their weights."""


class RunLog(contextlib.AbstractContextManager):
    """Writes what a run has to say into `folder`, after step `start_step`; a context manager.

    A step is never in `metrics.jsonl` twice: records beyond `start_step`, of steps that a crash
    lost and that are now done again, are cut off; TensorBoard hides them. Without a terminal
    there is no bar, and each record of `text` is a printed line. Warnings of the package's loggers
    go where `message` goes. It may be called from several threads.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        *,
        every: Mapping[str, int] = MappingProxyType({}),
        wandb: str | None = None,
    ):
        """
        Args:
            folder: of the run; made if it is not there.
            total_steps: of the run.
            start_step: after which it goes on.
            every: of each of `LOGS`, steps between two of its records; 1 where not named.
            wandb: the project in which Weights & Biases gets the numbers too.

        Raises:
            UserError: Weights & Biases is asked for and not installed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._far = _weights_and_biases(wandb, folder) if wandb else None
        metrics = folder / "metrics.jsonl"
        resumed = metrics.exists()
        if resumed:
            _truncate(metrics, start_step)
        self._metrics = metrics.open("a", buffering=1, encoding="utf-8")
        self._text = (folder / "train.log").open("a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(
            str(folder / "tblog"), purge_step=start_step + 1 if resumed else None, flush_secs=10
        )
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self._total = total_steps
        self._step = self._recorded = start_step
        writers = (self._tell, self._write, self._scalars, self._send)
        self._writers = dict(zip(LOGS, writers, strict=True))
        steps = {name: every.get(name, 1) for name in LOGS}
        self._spans = {
            count: _Span([name for name in LOGS if steps[name] == count])
            for count in set(steps.values())
        }
        self._smooth: float | None = None
        self._writing = threading.RLock()
        self._handler = _Forward(self)
        logging.getLogger("jaxft").addHandler(self._handler)

    def start(self) -> None:
        """Starts the clock of all rates: what comes before (caching, compiling) is not in them."""
        for span in self._spans.values():
            span.begin()
        self._bar.start_t = self._bar.last_print_t = time.time()  # reset() would show step 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what is done meanwhile as time lost to input."""
        began = time.monotonic()
        yield
        for span in self._spans.values():
            span.waited += time.monotonic() - began

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; needs no number from the device."""
        self._bar.update(step - self._step)
        self._step = step

    def count(self, images: int, sums: Sums = MappingProxyType({})) -> None:
        """Adds to what the next records tell: images trained on, and losses by timestep."""
        for span in self._spans.values():
            span.images += images
            for name, ranges in sums.items():
                own = span.sums.setdefault(name, {})
                own.update({key: own.get(key, 0.0) + value for key, value in ranges.items()})

    def record(
        self,
        step: int,
        *,
        epoch: int,
        total: float,
        loss: Mapping[str, float],
        lr: Mapping[str, float],
        grad_norm: float,
        **more: Any,
    ) -> None:
        """Records one step in the logs whose turn it is; the first and the last step in all.

        `total` is the weighted sum that is minimised, `loss` each dataset's own mean, `lr` each
        group's rate; `more` is written beside them, numbers or mappings of numbers. What was
        counted since a log's record before is told with them, and the rate of images with the time
        since then. The numbers may be of a step before the bar's.
        """
        assert step > self._recorded, f"step {step} is already recorded"
        self._recorded = step
        told = {"total": total, "loss": dict(loss), "lr": dict(lr), "grad_norm": grad_norm, **more}
        for every, span in self._spans.items():
            if step % every and step not in (1, self._total):
                continue
            numbers = {"step": step, "epoch": epoch, **told, **span.numbers(), "time": _now()}
            span.begin()
            for name in span.logs:
                self._writers[name](step, numbers)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes what is done meanwhile out of the rate."""
        began = time.monotonic()
        yield
        for span in self._spans.values():
            span.since += time.monotonic() - began

    def judge(
        self,
        step: int,
        losses: Mapping[str, Mapping[str, Sequence[float]]],
        timesteps: Sequence[int],
    ) -> None:
        """Logs the losses of validation: data set -> weights (`trained`, `average`) -> the loss at
        each timestep; all are also told as one number, their mean."""
        means = {
            name: {which: sum(curve) / len(curve) for which, curve in own.items()}
            for name, own in losses.items()
        }
        numbers = {
            "step": step,
            "validation": means,
            "timesteps": list(timesteps),
            "curves": {name: dict(own) for name, own in losses.items()},
            "time": _now(),
        }
        self._write(step, numbers)
        self._send(step, {"validation": means})
        for name, own in means.items():
            for which, value in own.items():
                self._board.add_scalar(f"validation/{name}/{which}", value, step)
            told = ", ".join(f"{which} {value:.5f}" for which, value in own.items())
            self.message(f"step {step}/{self._total} validation {name}: {told}")

    def picture(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows a picture in TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._far:
            self._far.log({"step": step, name: self._far.image(pixels)})

    def message(self, text: str) -> None:
        """Prints `text` above the bar and writes it, with the time, into train.log."""
        with self._writing:
            self._text.write(f"{_now()} {text}\n")
        tqdm.write(text)
        sys.stdout.flush()

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("jaxft").removeHandler(self._handler)
        self._bar.close()
        if self._far:
            self._far.finish()
        self._board.close()
        self._metrics.close()
        self._text.close()

    def _tell(self, step: int, numbers: Mapping[str, Any]) -> None:
        line = f"step {step}/{self._total} {_line(numbers)}"
        with self._writing:
            self._text.write(f"{numbers['time']} {line}\n")
        if self._bar.disable:
            print(line, flush=True)
        total, rate = numbers["total"], numbers["images_per_s"]
        previous = total if self._smooth is None else self._smooth
        self._smooth = 0.9 * previous + 0.1 * total if math.isfinite(total) else previous
        self._bar.set_postfix_str(f"loss {self._smooth:.4f}, {rate:.2f} images/s", refresh=False)

    def _write(self, _: int, numbers: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps(_finite(numbers)) + "\n")

    def _scalars(self, step: int, numbers: Mapping[str, Any]) -> None:
        for path, value in _flat(numbers):
            if path not in ("step", "epoch"):
                self._board.add_scalar(TAGS.get(path, path), value, step)

    def _send(self, step: int, numbers: Mapping[str, Any]) -> None:
        if self._far:
            self._far.log({"step": step, **dict(_flat(numbers))})


class _Span:
    """What is counted between two records of logs that are written in the same steps."""

    def __init__(self, logs: Sequence[str]):
        self.logs = logs
        self.begin()

    def begin(self) -> None:
        """Nothing is counted yet."""
        self.since, self.waited, self.images = time.monotonic(), 0.0, 0
        self.sums: dict[str, dict[str, Any]] = {}

    def numbers(self) -> dict[str, Any]:
        """What has been counted, as records tell it."""
        passed = max(time.monotonic() - self.since, 1e-9)
        means = {
            name: {key: float(error / weight) for key, (error, weight) in own.items() if weight > 0}
            for name, own in self.sums.items()
        }
        return {
            "images_per_s": self.images / passed,
            "input_share": min(self.waited / passed, 1.0),
            **({"loss_by_timestep": means} if means else {}),
        }


class _Far:
    """A run of Weights & Biases; its own step is how often it was told something."""

    def __init__(self, library: Any, project: str, folder: Path):
        self.image = library.Image
        self._run = library.init(project=project, name=folder.name, dir=str(folder))
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, Any]) -> None:
        self._run.log(dict(numbers))

    def finish(self) -> None:
        self._run.finish()


def _weights_and_biases(project: str, folder: Path) -> _Far:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "logger.wandb: Weights & Biases is not installed: pip install 'jaxft[wandb]', or set "
            "it to null"
        ) from None
    return _Far(wandb, project, folder)


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a tree by their paths, `loss/dataset1`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}/")
        elif isinstance(value, int | float):
            yield f"{path}{key}", value


class _Forward(logging.Handler):
    """Brings the package's warnings to the log of the run."""

    def __init__(self, log: RunLog):
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.message(f"{record.levelname.lower()}: {record.getMessage()}")


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _line(numbers: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{name} {value:.4f}" for name, value in numbers["loss"].items())
    rates = ", ".join(f"{name} {value:.3g}" for name, value in numbers["lr"].items())
    return (
        f"epoch {numbers['epoch']} loss {numbers['total']:.4f} ({losses}) lr ({rates}) "
        f"grad_norm {numbers['grad_norm']:.3g} {numbers['images_per_s']:.2f} images/s"
        + (f" input {numbers['input_share']:.0%}" if numbers["input_share"] > 0.01 else "")
        + (f" memory {numbers['memory_gib']:.2f} GiB" if "memory_gib" in numbers else "")
    )


def _finite(value: Any) -> Any:
    """`value` with null in place of NaN and infinities, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the records up to `last_step`; a line torn by a crash goes too."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= last_step]
    if kept == lines:
        return
    temp = path.with_name(path.name + ".tmp")
    with temp.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
