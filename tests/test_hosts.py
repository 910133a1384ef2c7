"""Several processes as one run: they find each other, agree, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.clusters import ClusterEnv

from jaxft import hosts, train
from jaxft import mesh as meshes
from jaxft.checkpoint import Checkpoints
from jaxft.errors import UserError
from jaxft.formats import hcp
from tests.conftest import ROOT, xla_flags
from tests.test_train import arguments, losses, recipe

__all__ = ["recipe"]

OPTIONS = (
    "data.dataset1.bucket.num_bucket=1",
    "unet=[{lr: 1e-3, layers: [up_blocks.1]}]",
    "train.train_steps=40",
    "train.save_step=10",
    "export=null",
)
"""Of all runs here; what is trained compiles quickly."""


def restored(folder: Path, step: int) -> dict[str, np.ndarray]:
    """A state on one device of this process."""
    tree = json.loads((folder / "state" / str(step) / "tree.json").read_text())
    wanted = {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in tree.items()}
    with closing(Checkpoints(folder / "state", 2)) as checkpoints:
        arrays, _ = checkpoints.restore(step, wanted)
    return jax.tree.map(np.asarray, arrays)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Process(subprocess.Popen):
    """One of two processes of a run, with two devices."""

    def __init__(self, number: int, port: int, output: Path, argv: list[str]):
        self.output = output
        launch = {
            "coordinator_address": f"127.0.0.1:{port}",
            "num_processes": 2,
            "process_id": number,
        }
        argv = argv + [f"distributed.{name}={value}" for name, value in launch.items()]
        environment = os.environ | {"XLA_FLAGS": xla_flags(devices=2)}
        with output.open("wb") as file:
            command = [sys.executable, "-m", "jaxft.train", *argv]
            super().__init__(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def until(self, pattern: str) -> None:
        """Waits until the process has printed it."""
        while not re.search(pattern, self.output.read_text()):
            assert self.poll() is None, self.output.read_text()[-2000:]
            time.sleep(0.01)


@contextmanager
def two(tmp_path: Path, argv: list[str], *own: list[str]) -> Iterator[list[Process]]:
    """Two processes of one run; `own`: what each is told besides."""
    port = free_port()
    started = [
        Process(number, port, tmp_path / f"process{number}.txt", argv + list(extra))
        for number, extra in enumerate(own or ([], []))
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_two_processes_stop_together_and_go_on_as_one(recipe, tmp_path):
    """A signal to one ends both after the same step. Then one is killed, and ends the other with a
    message; one process of four devices goes on, with the losses of a run that was always one."""
    folder = tmp_path / "run"
    layout = ("mesh.data=2", "mesh.fsdp=2")
    with two(tmp_path, arguments(recipe, folder, *OPTIONS, *layout)) as (first, second):
        first.until("step 3/")
        second.send_signal(signal.SIGTERM)
        assert [first.wait(), second.wait()] == [128 + signal.SIGTERM] * 2
    (saved,) = (int(path.name) for path in (folder / "state").iterdir())
    assert 3 < saved == len(losses(folder)) < 40
    assert f"--resume {folder}" in (folder / "train.log").read_text()
    assert "step 3/" not in second.output.read_text()

    part = hcp.read_part(folder / f"ckpts/unet-{saved}.safetensors")
    kept = restored(folder, saved)
    for name, weight in part.items():  # gathered from both, and restored on this one's devices
        np.testing.assert_array_equal(kept[f"trainable/unet/{name}"], weight)

    with two(tmp_path, ["--resume", str(folder)]) as (first, second):
        first.until(f"step {saved + 1}/")
        second.kill()
        assert first.wait() not in (0, None)
        assert re.search(r"another (may have ended|task died)", first.output.read_text())

    assert train.main(["--resume", str(folder)]) == 0
    alone = tmp_path / "alone"
    assert train.main(arguments(recipe, alone, *OPTIONS)) == 0
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=1e-6)


def test_processes_that_disagree_are_named_with_the_key(recipe, tmp_path):
    argv = arguments(recipe, tmp_path / "run", *OPTIONS)
    with two(tmp_path, argv, ["seed=1"], ["seed=2"]) as started:
        assert [process.wait() for process in started] == [2, 2]
    for number, process in enumerate(started):
        text = process.output.read_text()
        assert f"error: process {number} of 2: the processes do not have the same conf" in text
        assert "process 1: seed is 2, in process 0 1" in text
        assert "compiling" not in text


def join(*given) -> Callable[[], None]:
    def enter() -> None:
        with hosts.joined(*given):
            raise AssertionError

    return enter


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("h:1", None, None), "num_processes and process_id must be given too"),
        ((None, 2, 0), "coordinator_address must be given too"),
        (("h:1", 2, 2), "process_id: 2 is not below num_processes, 2"),
        (("h", 2, 1), "coordinator_address: 'h' is not HOST:PORT"),
        (("h:99999", 2, 1), "is not HOST:PORT"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(given, says):
    with pytest.raises(UserError, match=says):
        join(*given)()


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"choose another: port {port} cannot be used .*in use"):
            join(f"127.0.0.1:{port}", 2, 0)()


@pytest.mark.parametrize(
    "launcher",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        | {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"},
        {
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        }
        | {"OMPI_MCA_orte_hnp_uri": "28672.0;tcp://127.0.0.1:1"},
    ],
)
def test_a_port_in_use_that_a_launcher_implies_is_named(launcher, monkeypatch):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    cluster = next(own for own in ClusterEnv._cluster_types if own.is_env_present())
    implied = cluster.get_coordinator_address(1, None).rpartition(":")[2]
    for port in (int(implied), 0):
        with socket.create_server(("127.0.0.1", port)) as server:
            taken = server.getsockname()[1]
            if not port:
                monkeypatch.setenv(hosts.PORT, str(taken))
            with pytest.raises(UserError, match=f"{hosts.PORT} must name another: port {taken} "):
                join(None, None, None)()


def test_one_process_has_no_launcher(monkeypatch):
    """Of the variables that launchers set, one process has none, or a count of one."""
    for name in hosts.COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with hosts.joined(None, None, None):
        assert jax.process_count() == 1
    with hosts.guarded(), pytest.raises(ZeroDivisionError), hosts.guarded():
        raise ZeroDivisionError


def test_rows_of_all_processes_are_the_batch_once(monkeypatch):
    """Each process asks for the rows of its devices, here of one in two."""
    mesh = meshes.make(2, 2, jax.devices()[:4])
    where = meshes.batch_sharding(mesh).devices_indices_map((8,))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    rows = []
    for own in (jax.devices()[:4:2], jax.devices()[1:4:2]):
        places = {device: where[device] for device in own}
        kind = type(meshes.batch_sharding(mesh))
        monkeypatch.setattr(kind, "addressable_devices_indices_map", lambda *_, p=places: p)
        rows.append(np.asarray(meshes.own_rows(mesh, 8)).tolist())
    assert rows == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_what_is_made_for_all_is_shared_out(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts, "largest", lambda number: number)
    made = []
    for number in range(3):
        monkeypatch.setattr(jax, "process_index", lambda n=number: n)
        own, everything = hosts.shares(range(8), kept_in_common=True)
        assert list(everything) == list(range(8))
        made += own
        assert list(hosts.shares(range(8), kept_in_common=False)) == [range(8)]
    assert sorted(made) == list(range(8))
