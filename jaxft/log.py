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
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm


class RunLog(contextlib.AbstractContextManager):
    """Writes what a run has to say into `folder`, after step `start_step`; a context manager.

    A step is never in `metrics.jsonl` twice: records beyond `start_step`, of steps that a crash
    lost and that are now done again, are cut off; TensorBoard hides them. Without a terminal
    there is no bar, and each record is a printed line. Warnings of the package's loggers go where
    `message` goes. It may be called from several threads.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
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
        self._since = time.monotonic()
        self._smooth: float | None = None
        self._writing = threading.RLock()
        self._handler = _Forward(self)
        logging.getLogger("jaxft").addHandler(self._handler)

    def start(self) -> None:
        """Starts the clock of all rates: what comes before (caching, compiling) is not in them."""
        self._since = time.monotonic()
        self._bar.start_t = self._bar.last_print_t = time.time()  # reset() would show step 0

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; needs no number from the device."""
        self._bar.update(step - self._step)
        self._step = step

    def record(
        self,
        step: int,
        *,
        epoch: int,
        total: float,
        loss: Mapping[str, float],
        lr: Mapping[str, float],
        grad_norm: float,
        images: int,
    ) -> None:
        """Logs one step.

        `total` is the weighted sum that is minimised, `loss` each dataset's own mean, `lr` each
        group's rate; `images` counts those trained on since the record before, from which, with
        the time since then, comes the rate. The numbers may be of a step before the bar's.
        """
        assert step > self._recorded, f"step {step} is already recorded"
        now = time.monotonic()
        rate = images / max(now - self._since, 1e-9)
        self._since, self._recorded = now, step
        numbers = {
            "step": step,
            "epoch": epoch,
            "total": total,
            "loss": dict(loss),
            "lr": dict(lr),
            "grad_norm": grad_norm,
            "images_per_s": rate,
            "time": _now(),
        }
        self._metrics.write(json.dumps(_finite(numbers)) + "\n")
        self._scalars(step, numbers)
        line = f"step {step}/{self._total} {_line(numbers)}"
        with self._writing:
            self._text.write(f"{numbers['time']} {line}\n")
        if self._bar.disable:
            print(line, flush=True)
        previous = total if self._smooth is None else self._smooth
        self._smooth = 0.9 * previous + 0.1 * total if math.isfinite(total) else previous
        self._bar.set_postfix_str(f"loss {self._smooth:.4f}, {rate:.2f} images/s", refresh=False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes what is done meanwhile out of the rate."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

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
        self._metrics.write(json.dumps(_finite(numbers)) + "\n")
        for name, own in means.items():
            for which, value in own.items():
                self._board.add_scalar(f"validation/{name}/{which}", value, step)
            told = ", ".join(f"{which} {value:.5f}" for which, value in own.items())
            self.message(f"step {step}/{self._total} validation {name}: {told}")

    def picture(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows a picture in TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def message(self, text: str) -> None:
        """Prints `text` above the bar and writes it, with the time, into train.log."""
        with self._writing:
            self._text.write(f"{_now()} {text}\n")
        tqdm.write(text)
        sys.stdout.flush()

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("jaxft").removeHandler(self._handler)
        self._bar.close()
        self._board.close()
        self._metrics.close()
        self._text.close()

    def _scalars(self, step: int, numbers: Mapping[str, Any]) -> None:
        for name in ("loss", "lr"):
            for key, value in numbers[name].items():
                self._board.add_scalar(f"{name}/{key}", value, step)
        self._board.add_scalar("total_loss", numbers["total"], step)
        self._board.add_scalar("grad_norm", numbers["grad_norm"], step)
        self._board.add_scalar("images_per_second", numbers["images_per_s"], step)


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
