"""The log of a run, the lock of its folder, and the signals that stop it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto import event_pb2

from jaxft.errors import UserError
from jaxft.lock import lock
from jaxft.log import RunLog
from jaxft.signals import SAME_REQUEST, Stop


def record(log: RunLog, step: int, total: float = 0.5) -> None:
    log.count(8, {"main": {"0-249": np.array([1.0, 4.0]), "250-499": np.zeros(2)}})
    log.record(
        step,
        epoch=0,
        total=total,
        loss={"main": total, "class": 0.25},
        lr={"unet.0": 1e-5},
        grad_norm=1.5,
        grad_norms={"unet.0": 1.25},
    )


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def events(folder: Path) -> list[Any]:
    """Every event of the TensorBoard files, oldest file first, read without our code."""
    found, parse = [], event_pb2.Event.FromString  # pyright: ignore[reportAttributeAccessIssue]
    for path in sorted((folder / "tblog").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")  # TFRecord: size, its crc, data, its crc
            found.append(parse(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_every_number_is_in_all_three_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    with RunLog(tmp_path, total_steps=10) as log:
        log.start()
        log.advance(1)
        record(log, 1)
        log.message("hello")
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert metrics["loss"] == {"main": 0.5, "class": 0.25}
    assert metrics["images_per_s"] > 0
    assert metrics["loss_by_timestep"] == {"main": {"0-249": 0.25}}  # no image was at others
    values = {v.tag: v.simple_value for e in events(tmp_path) for v in e.summary.value}
    wanted = {"loss/main": 0.5, "loss/class": 0.25, "lr/unet.0": 1e-5, "grad_norm": 1.5}
    wanted |= {"grad_norms/unet.0": 1.25, "loss_by_timestep/main/0-249": 0.25, "total_loss": 0.5}
    assert {tag: values[tag] for tag in wanted} == pytest.approx(wanted)
    assert values["images_per_second"] == pytest.approx(metrics["images_per_s"])
    text = (tmp_path / "train.log").read_text()
    assert "step 1/10" in text
    assert "hello" in text
    printed = capsys.readouterr()
    assert "step 1/10" in printed.out  # no terminal here: lines, no bar
    assert not printed.err


def test_each_log_has_its_own_steps_and_tells_what_came_since_its_last(tmp_path: Path):
    with RunLog(tmp_path, 10, every={"text": 4, "tensorboard": 3}) as log:
        for step in range(1, 11):
            log.count(8, {"main": {"0-249": np.array([float(step), 1.0])}})
            log.record(step, epoch=0, total=1, loss={}, lr={}, grad_norm=1)
    assert steps(tmp_path) == list(range(1, 11))
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["1/10", "4/10", "8/10", "10/10"]
    means = {
        event.step: value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag == "loss_by_timestep/main/0-249"
    }
    assert means == {1: 1, 3: 2.5, 6: 5, 9: 8, 10: 10}


def test_time_lost_to_input_is_a_share_and_pauses_are_in_no_rate(tmp_path: Path):
    with RunLog(tmp_path, total_steps=10) as log:
        log.start()
        with log.waiting():
            time.sleep(0.2)
        with log.paused():
            time.sleep(0.4)
        time.sleep(0.2)
        record(log, 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 0.25 < json.loads(line)["input_share"] < 0.6
    assert 8 / 0.6 < json.loads(line)["images_per_s"] < 8 / 0.39


def test_weights_and_biases_gets_the_numbers_by_their_paths(tmp_path: Path, monkeypatch):
    sent: list[dict[str, Any]] = []
    run = types.SimpleNamespace(
        define_metric=lambda *_, **__: None, log=sent.append, finish=lambda: sent.append({})
    )
    library = types.ModuleType("wandb")
    library.init = lambda **options: sent.append(options) or run  # pyright: ignore
    library.Image = lambda pixels: pixels.shape  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", library)
    with RunLog(tmp_path / "a-run", 10, wandb="p") as log:
        record(log, 3)
        log.judge(3, {"main": {"trained": [0.5, 1.5]}}, [10, 20])
        log.picture(3, "preview/trained", np.zeros((4, 6, 3), np.uint8))
    options, numbers, judged, picture, end = sent
    assert options == {"project": "p", "name": "a-run", "dir": str(tmp_path / "a-run")}
    wanted = {"step": 3, "loss/main": 0.5, "lr/unet.0": 1e-5, "grad_norm": 1.5}
    wanted |= {"loss_by_timestep/main/0-249": 0.25}
    assert numbers.items() >= wanted.items()
    assert judged == {"step": 3, "validation/main/trained": 1.0}
    assert (picture, end) == ({"step": 3, "preview/trained": (4, 6, 3)}, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'jaxft\[wandb\]'"):
        RunLog(tmp_path / "b-run", 10, wandb="p")


@settings(max_examples=20, deadline=None)
@given(first=st.lists(st.integers(1, 50), unique=True), resumed=st.integers(0, 50))
def test_no_step_is_logged_twice(tmp_path_factory, first: list[int], resumed: int):
    folder = tmp_path_factory.mktemp("run")
    with RunLog(folder, 60) as log:
        for step in sorted(first):
            record(log, step)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tor')  # the write that a crash cut
    with RunLog(folder, 60, start_step=resumed) as log:
        for step in range(resumed + 1, 61, 7):
            record(log, step)
    kept = [step for step in sorted(first) if step <= resumed]
    assert steps(folder) == kept + list(range(resumed + 1, 61, 7))


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path: Path):
    for start in (0, 2):
        with RunLog(tmp_path, 10, start_step=start) as log:
            record(log, start + 1)
            record(log, start + 4)
    (purge,) = [event for event in events(tmp_path) if event.HasField("session_log")]
    assert purge.step == 3  # TensorBoard drops what has this step or a later one, before it


def test_nan_is_valid_json(tmp_path: Path):
    with RunLog(tmp_path, 10) as log:
        record(log, 1, total=math.nan)
    numbers = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert numbers["total"] is None
    assert numbers["loss"]["main"] is None


HOLD = """
import sys, time
from pathlib import Path
from jaxft.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_dead_one_is_no_obstacle(tmp_path: Path):
    arguments = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        begin = time.monotonic()
        with pytest.raises(UserError, match=f"process {holder.pid} on {os.uname().nodename}"):
            lock(tmp_path).__enter__()
        assert time.monotonic() - begin < 1
        holder.kill()
    with lock(tmp_path), pytest.raises(UserError, match=str(os.getpid())):
        lock(tmp_path).__enter__()
    with lock(tmp_path):
        pass


STOP = """
import hashlib, os, signal, time
from jaxft.signals import Stop
with Stop() as stop:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"x")
        time.sleep(10)
        os._exit(1)
    os.read(read, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.1)
    assert stop.requested is None  # a worker that is ended does not stop the run
    print("ready", flush=True)
    while stop.requested is None:
        time.sleep(0.01)
    print(stop.requested, flush=True)
    if os.environ["BUSY"]:  # minutes in C code, where no Python handler can run, as in a compile
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
raise SystemExit(128 + stop.requested)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", ["", "busy"])
def test_a_signal_is_a_request_and_the_second_one_the_end(number: int, busy: str):
    with subprocess.Popen(
        [sys.executable, "-c", STOP],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BUSY": busy},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.send_signal(number)  # as `timeout` does, to the process and to its group
        assert process.stdout.readline() == f"{int(number)}\n"
        if busy:
            time.sleep(SAME_REQUEST + 0.1)
            process.send_signal(number)
        _, printed = process.communicate(timeout=5)
    assert process.returncode == 128 + number
    assert printed.count("stopping after this step") == 1


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while stop.requested is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.requested == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
