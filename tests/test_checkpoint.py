"""Checkpoints: bit equality, what a crash or a damaged disk leaves, what is kept."""

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.checkpoint import Checkpoints
from jaxft.errors import UserError


def make_state(seed: int = 0) -> dict[str, Any]:
    """A training state as step.py has it: two groups with their own AdamW, after one update."""
    rng = np.random.default_rng(seed)
    params = {
        "unet": {"conv_in.weight": jnp.asarray(rng.normal(size=(8, 4, 3, 3)), jnp.float32)},
        "text_encoder": {"mlp.fc1.bias": jnp.asarray(rng.normal(size=8), jnp.bfloat16)},
    }
    tx = optax.multi_transform(
        {"unet": optax.adamw(1e-3), "text_encoder": optax.adamw(1e-4, mu_dtype=jnp.bfloat16)},
        {"unet": "unet", "text_encoder": "text_encoder"},
    )
    _, opt_state = tx.update(params, tx.init(params), params)
    return {
        "step": jnp.int32(seed),
        "trainable": params,
        "opt_state": opt_state,
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def abstract(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding(leaf) if sharding else None
        ),
        state,
    )


def assert_bits_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@contextlib.contextmanager
def opened(folder: Path, keep: int = 2) -> Iterator[Checkpoints]:
    with contextlib.closing(Checkpoints(folder, keep)) as checkpoints:
        yield checkpoints


def saved(folder: Path, *steps: int, keep: int = 9) -> Path:
    with opened(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"epoch": step})
    return folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 9 and 10. Not to be written to."""
    return saved(tmp_path_factory.mktemp("two") / "state", 9, 10)


def spread(leaf: jax.Array) -> NamedSharding:
    """Over four devices, where the first axis allows."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    split = leaf.ndim > 0 and leaf.shape[0] % 4 == 0
    return NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())


def test_restored_is_bit_equal_to_saved(two_steps: Path):
    state = make_state(10)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} > {"float32", "bfloat16", "int32"}
    with opened(two_steps) as checkpoints:
        assert checkpoints.latest() == 10
        found, extra = checkpoints.restore(10, abstract(state))
    assert_bits_equal(found, state)
    assert extra == {"epoch": 10}


def test_four_devices_restore_what_one_saved_and_back(two_steps: Path, tmp_path: Path):
    assert len(jax.devices()) >= 4
    state = make_state(9)
    with opened(two_steps) as checkpoints:
        found, _ = checkpoints.restore(9, abstract(state, spread))
    assert_bits_equal(found, state)
    assert len(found["trainable"]["unet"]["conv_in.weight"].sharding.device_set) == 4
    with opened(tmp_path) as checkpoints:
        checkpoints.save(9, found, {})
        checkpoints.wait()
        back, _ = checkpoints.restore(9, abstract(state))
    assert_bits_equal(back, state)


def test_a_process_with_one_device_restores_what_four_saved(tmp_path: Path):
    array = jnp.arange(64.0).reshape(8, 8)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(array, spread(array))}, {})
    code = (
        "import jax, sys; from pathlib import Path; from jaxft.checkpoint import Checkpoints\n"
        "assert jax.device_count() == 1\n"
        "want = {'w': jax.ShapeDtypeStruct((8, 8), 'float32')}\n"
        "found, _ = Checkpoints(Path(sys.argv[1]), 1).restore(1, want)\n"
        "print(found['w'].sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2016.0"], done.stderr  # 0 + 1 + ... + 63


def test_donated_buffers_do_not_reach_the_checkpoint(tmp_path: Path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(1 << 20)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        for _ in range(20):
            x = add(x)
        checkpoints.wait()
        found, _ = checkpoints.restore(1, abstract({"x": x}))
    assert not found["x"].any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t["unet"].pop("conv_in.weight"),
            "trainable/unet/conv_in.weight: not in this run",
        ),
        (lambda t: t.update(new=jnp.ones(1)), "trainable/new: not in the checkpoint"),
        (
            lambda t: t["unet"].update({"conv_in.weight": jnp.ones((8, 4))}),
            "unet/conv_in.weight: float32[8, 4] in this run, stored as float32[8, 4, 3, 3]",
        ),
        (
            lambda t: t["text_encoder"].update({"mlp.fc1.bias": jnp.ones(8, jnp.float32)}),
            "trainable/text_encoder/mlp.fc1.bias: float32[8] in this run, stored as bfloat16[8]",
        ),
    ],
)
def test_a_leaf_that_does_not_fit_is_named(two_steps: Path, change: Any, named: str):
    state = make_state(9)
    change(state["trainable"])
    with opened(two_steps) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(9, abstract(state))
    assert named in str(error.value)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1 << random.Random(len(data)).randrange(
        8
    )
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_to_any_file_is_found_and_named(two_steps: Path, tmp_path, caplog, damage: Any):
    names = [path.relative_to(two_steps) for path in (two_steps / "10").rglob("*")]
    names = [name for name in names if (two_steps / name).is_file()]
    names = [name for name in names if (two_steps / name).stat().st_size]
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = shutil.copytree(two_steps, tmp_path / str(number))
        damage(folder / name)
        caplog.clear()
        with opened(folder) as checkpoints:
            assert checkpoints.latest() == 9
            with pytest.raises(UserError, match=name.name):
                checkpoints.restore(10, abstract(make_state(10)))
        assert str(name) in caplog.text
        assert (folder / "10").exists()  # never deleted by itself


def test_only_whole_steps_count_and_the_rest_is_reported(two_steps: Path, tmp_path, caplog):
    folder = shutil.copytree(two_steps, tmp_path / "state")
    (folder / "99").mkdir()  # empty
    shutil.copytree(folder / "10" / "arrays", folder / "98" / "arrays")  # half copied
    shutil.copytree(folder / "10", folder / "97")  # another step's content
    (folder / "96.orbax-checkpoint-tmp").mkdir()
    (folder / "0100").mkdir()
    (folder / "95").write_text("a file")
    (folder / "11.tmp").mkdir()  # ours, of a crash
    os.utime(folder / "9")  # the older step has the newer time
    with opened(folder) as checkpoints:
        assert checkpoints.latest() == 10
    for name in ("99", "98", "97", "96.orbax-checkpoint-tmp", "0100", "95"):
        assert str(folder / name) in caplog.text
        assert (folder / name).exists()
    assert not (folder / "11.tmp").exists()
    with opened(tmp_path / "none") as checkpoints:
        assert checkpoints.latest() is None


@settings(max_examples=6, deadline=None)
@given(keep=st.integers(1, 3), steps=st.lists(st.integers(1, 99), min_size=1, max_size=5))
def test_the_last_k_steps_are_kept(tmp_path_factory, keep: int, steps: list[int]):
    steps = sorted(set(steps))
    folder = tmp_path_factory.mktemp("state")
    with opened(folder, keep) as checkpoints:
        for number, step in enumerate(steps):
            checkpoints.save(step, {"x": jnp.int32(step)}, {})
            whole = [int(path.parent.name) for path in folder.glob("*/manifest.json")]
            assert number == 0 or whole  # while saving, too
            checkpoints.wait()
            assert checkpoints.latest() == step
    assert sorted(int(path.name) for path in folder.iterdir()) == steps[-keep:]


def test_known_damage_is_not_counted_as_kept(tmp_path: Path):
    folder = saved(tmp_path, 1, 2, 3)
    flip(folder / "3" / "tree.json")
    with opened(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 2
        checkpoints.save(4, make_state(4), {})
        checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]


def test_a_step_saved_anew_leaves_the_damaged_one_aside(tmp_path: Path):
    folder = saved(tmp_path, 1, 2)
    flip(folder / "2" / "extra.json")
    with opened(folder) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.restore(1, abstract(make_state(1)))
        checkpoints.save(2, make_state(2), {"epoch": 5})
        checkpoints.wait()
        assert checkpoints.latest() == 2
        assert checkpoints.restore(2, abstract(make_state(2)))[1] == {"epoch": 5}
        before = (folder / "2" / "manifest.json").stat().st_mtime_ns
        checkpoints.save(2, make_state(2), {"epoch": 5})  # what a signal right after a save does
    assert (folder / "2" / "manifest.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "2.old-1"]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail with EFBIG: a full disk that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failure_in_the_background_is_told_and_harms_nothing(tmp_path: Path):
    folder = saved(tmp_path, 1)
    noise = {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}
    with opened(folder, keep=1) as checkpoints:
        with file_size_limit(1 << 20):
            checkpoints.save(2, noise, {})
            with pytest.raises(UserError, match=f"{folder}/2: step 2 .* MiB free: .*[Tt]oo large"):
                checkpoints.wait()
        checkpoints.wait()  # told once
        assert sorted(path.name for path in folder.iterdir()) == ["1"]
        assert checkpoints.latest() == 1
        checkpoints.save(2, noise, {})
        checkpoints.wait()
        assert checkpoints.latest() == 2


def test_close_tells_of_a_failure(tmp_path: Path):
    noise = {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}
    checkpoints = Checkpoints(tmp_path, 1)
    with file_size_limit(1 << 20):
        checkpoints.save(1, noise, {})
        with pytest.raises(UserError, match="step 1 was not saved"):
            checkpoints.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "state").write_text("a file")
    with opened(tmp_path / "state") as checkpoints, pytest.raises(UserError, match="state/1: "):
        checkpoints.save(1, make_state(), {})


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path):
    size = shutil.disk_usage(tmp_path).total  # never free, times 1.2

    class Huge:
        shape, dtype, nbytes = (size,), np.dtype("uint8"), size

    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match="make room"):
        checkpoints.save(1, {"x": Huge()}, {})
    assert not list(tmp_path.iterdir())


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from jaxft.checkpoint import Checkpoints  # JAX is imported once; devices start in the children

folder, kills = Path(sys.argv[1]), int(sys.argv[2])

def state(step):
    import jax.numpy as jnp, numpy as np
    x = np.random.default_rng(step).random(1 << 19, np.float32)
    return {"x": jnp.asarray(x), "step": jnp.int32(step)}

def resume(pipe):
    import jax, numpy as np
    checkpoints = Checkpoints(folder, 2)
    step = checkpoints.latest() or 0
    if step:
        abstract = {"x": jax.ShapeDtypeStruct((1 << 19,), "float32"),
                    "step": jax.ShapeDtypeStruct((), "int32")}
        found, extra = checkpoints.restore(step, abstract)
        assert np.array_equal(found["x"], state(step)["x"]) and found["step"] == step
        assert extra == {"step": step}
    os.write(pipe, b"resumed %d\\n" % step)
    while True:
        step += 1
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
        os.write(pipe, b"saved %d\\n" % step)

rng, told = random.Random(0), 0
for _ in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resume(write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as lines:
        resumed = int(lines.readline().split()[1])
        assert resumed >= told, (resumed, told)  # what was told to be saved is saved
        told = int(lines.readline().split()[1])
        time.sleep(rng.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        told = max([told, *(int(line.split()[1]) for line in lines)])
    os.waitpid(child, 0)
    leftovers = [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
    print(json.dumps({"resumed": resumed, "told": told, "inside": bool(leftovers)}), flush=True)
"""


def kill_trials(folder: Path, kills: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(kills)],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_while_saving_the_last_whole_step_is_there(tmp_path: Path):
    trials = kill_trials(tmp_path, 6)
    assert any(trial["inside"] for trial in trials)  # else nothing was tested
    assert trials[-1]["resumed"] > 0


@pytest.fixture(autouse=True)
def quiet():
    """Orbax' own tracebacks of the failures that are meant."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
