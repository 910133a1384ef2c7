"""One, two, four and eight devices, batches or weights or both split: the same training."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, xla_flags
from tests.layouts import LAYOUTS, STEPS, Training

NAMES = [f"{data}x{fsdp}" for data, fsdp in LAYOUTS]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """Layout -> what a process of eight devices says of it."""
    folder = tmp_path_factory.mktemp("layouts")
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices=8)}
    command = [sys.executable, "-m", "tests.layouts", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_one_device(found, name):
    losses = found[name]["losses"]
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, found["1x1"]["losses"], rtol=1e-5)
    assert losses[0] - losses[-1] > 1e-3 * losses[0]  # the weights move


@pytest.mark.parametrize("name", NAMES)
def test_a_device_holds_its_share_of_weights_moments_and_average(found, name):
    """Of the arrays that are large enough, and have an axis that can be divided."""
    fsdp = int(name.partition("x")[2])
    assert found[name]["bytes"] * fsdp == found[name]["whole"] > 2**21


@pytest.mark.parametrize("name", NAMES)
def test_noise_and_restored_states_are_equal_to_the_bit(found, name):
    assert found[name]["same_noise"]
    assert found[name]["restores"]


@pytest.mark.parametrize("name", NAMES[1:])
def test_devices_exchange_weights_and_gradients_alone(found, name):
    """No activation is sent: gathered are weights that are split, added up gradients and losses."""
    weights = {int(np.prod(w.shape)) for w in Training().trainable["unet"].values()}
    fsdp = int(name.partition("x")[2])
    said = found[name]["collectives"]
    assert {kind for kind, _ in said} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = [size for kind, size in said if kind == "all-gather"]
    assert bool(gathered) == (fsdp > 1)
    assert set(gathered) <= weights


@pytest.mark.parametrize("name", NAMES[1:])
def test_each_gradient_is_added_up_once(found, name):
    """Besides them the loss, and by what it is divided. XLA on a CPU adds up whole gradients, of
    which a device then keeps its share; a reduce-scatter does both."""
    fsdp = int(name.partition("x")[2])
    added = sum(
        size * (fsdp if kind == "reduce-scatter" else 1)
        for kind, size in found[name]["collectives"]
        if kind != "all-gather"
    )
    weights = Training().trainable["unet"].values()
    assert added == sum(weight.size for weight in weights) + 2
