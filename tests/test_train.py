"""The training program: stopped and resumed, it ends as if never stopped; what it leaves."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto import event_pb2

from jaxft import compiled, params, patterns, plan, tensor_file, train
from jaxft import config as configs
from jaxft.compiled import Programs
from jaxft.formats import hcp
from tests.conftest import ROOT, xla_flags
from tests.data_fixtures import photo_folder

STEPS = 30
RATES = (1e-3, 3e-3)
LAYERS = ([r"re:.*\.to_k$", r"re:.*\.to_v$", r"re:.*\.ff$"], [r"re:.*resnets$"])

ONE_SHAPE = ("train.train_steps=4", "data.dataset1.bucket.num_bucket=1", "export=null")


@pytest.fixture(scope="module")
def recipe(nano_model, tmp_path_factory) -> Path:
    """The configuration of all runs here, which share compiled programs: two shapes, batch 4."""
    folder = tmp_path_factory.mktemp("recipe")
    tree = {
        "_base_": ["configs/train/examples/layer-wise.yaml"],
        "mixed_precision": "no",
        "unet": [{"lr": lr, "layers": layers} for lr, layers in zip(RATES, LAYERS, strict=True)],
        "train": {
            "train_steps": STEPS,
            "save_step": 7,
            "log_step": 1,
            "workers": 2,
            "scheduler": {
                "name": "cosine",
                "num_warmup_steps": 3,
                "num_training_steps": STEPS,
            },
        },
        "model": {
            "pretrained_model_name_or_path": str(nano_model),
            "gradient_checkpointing": False,
        },
        "data": {
            "dataset1": {
                "batch_size": 1,
                "source": {"data_source1": {"img_root": str(photo_folder(folder / "photos", 8))}},
                "bucket": {"target_area": 64 * 64, "step_size": 32, "num_bucket": 2},
            }
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def arguments(recipe: Path, folder: Path, *overrides: str) -> list[str]:
    return ["--config", str(recipe), f"exp_dir={folder}", *overrides]


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory) -> Path:
    """The folder of a run from step 1 to the end."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert train.main(arguments(recipe, folder)) == 0
    return folder


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All logged of each step, apart from the clock's part."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("time", "images_per_s", "input_share")
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def losses(folder: Path) -> list[float]:
    return [line["total"] for line in numbers(folder)]


def logged(folder: Path) -> int:
    """Complete lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def state(folder: Path, step: int) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as reader:
        return jax.tree.map(np.asarray, reader.restore(folder / "state" / str(step) / "arrays"))


def assert_same_end(folder: Path, other: Path) -> None:
    ours, theirs = state(folder, STEPS), state(other, STEPS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    part = f"ckpts/unet-{STEPS}.safetensors"
    assert (folder / part).read_bytes() == (other / part).read_bytes()
    assert numbers(folder) == numbers(other)


# ------------------------------------------------------------------------------ stop and resume


def killed(argv: list[str], output: Path, when: Callable[[str], bool]) -> None:
    """Runs the program in a process and kills it as soon as `when(what it printed)`."""
    with output.open("wb") as file:
        command = [sys.executable, "-m", "jaxft.train", *argv]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        while not when(output.read_text()):
            assert process.poll() is None, output.read_text()[-2000:]
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_killed_at_three_points_and_resumed_it_ends_like_the_unbroken_run(
    recipe, unbroken, tmp_path
):
    """Equal losses of every step prove the order of the data, too."""
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    resume, saved = ["--resume", str(folder)], folder / "state"
    killed(
        arguments(recipe, folder),
        output,
        lambda text: "step 9/30" in text and (saved / "7").exists(),
    )
    killed(resume, output, lambda text: "step 14/30" in text and any(saved.glob("*.tmp")))
    killed(resume, output, lambda text: "step 24/30" in text)
    assert train.main(resume) == 0
    assert_same_end(folder, unbroken)


@pytest.fixture
def send() -> Iterator[Callable]:
    """`send(number, when)`: a thread sends this process a signal as soon as `when`."""
    over = threading.Event()
    threads = []

    def start(number: int, when: Callable[[], bool]) -> None:
        def watch() -> None:
            while not when():
                if over.wait(0.001):
                    return
            os.kill(os.getpid(), number)

        threads.append(threading.Thread(target=watch))
        threads[-1].start()

    yield start
    over.set()
    for thread in threads:
        thread.join()


def test_signals_save_and_end_a_run_that_can_go_on(recipe, unbroken, tmp_path, send):
    folder = tmp_path / "run"
    argv = arguments(recipe, folder)
    for number, after in ((signal.SIGINT, 3), (signal.SIGTERM, 16)):
        send(number, lambda after=after: logged(folder) >= after)
        assert train.main(argv) == 128 + number
        step = len(losses(folder))
        assert after <= step < STEPS
        assert state(folder, step)["step"] == step
        assert (folder / f"ckpts/unet-{step}.safetensors").exists()
        assert f"--resume {folder}" in (folder / "train.log").read_text()
        argv = ["--resume", str(folder)]
    assert train.main(argv) == 0
    assert_same_end(folder, unbroken)


def test_resume_says_that_the_data_has_changed(unbroken, tmp_path):
    changed = "data.dataset1.source.data_source1.word_names.pt1=sks"
    for overrides, says in (([], False), ([changed], True)):
        folder = Path(shutil.copytree(unbroken, tmp_path / f"copy{len(overrides)}"))
        assert train.main(["--resume", str(folder), "export=null", *overrides]) == 0
        assert ("have changed since" in (folder / "train.log").read_text()) == says


def test_order_of_images_depends_on_the_configuration_alone(recipe, tmp_path):
    def order(places: list[int]) -> dict[int, list[int]]:
        prepared = plan.prepare(*configs.load(str(recipe), [f"exp_dir={tmp_path}"]))
        return {n: prepared.datasets[0].plan[n].images.tolist() for n in places}

    forwards, backwards = order(list(range(12))), order(list(range(11, -1, -1)))
    assert forwards == backwards
    assert len({tuple(images) for images in forwards.values()}) > 3  # an epoch has 3 batches


# ------------------------------------------------------------------------------ what a run leaves


def test_configuration_of_a_run_repeats_it_elsewhere(recipe, unbroken, tmp_path):
    first, _ = configs.load(str(recipe), [f"exp_dir={tmp_path}"])
    again, _ = configs.load(str(unbroken / "cfg.yaml"), [f"exp_dir={tmp_path}"])
    assert again == first
    anywhere, _ = configs.load(str(unbroken / "cfg.yaml"))
    assert Path(anywhere.exp_dir) != unbroken
    assert anywhere.train.resume is None


def test_plan_and_log_are_readable(unbroken):
    text = (unbroken / "plan.txt").read_text()
    assert "unet.0" in text
    assert "unet.1" in text
    assert "8 images" in text
    log = (unbroken / "train.log").read_text()
    assert all(line in log for line in text.splitlines())
    assert f"step {STEPS}/{STEPS}" in log
    assert "export" in log
    assert [line["step"] for line in numbers(unbroken)] == list(range(1, STEPS + 1))


def events(folder: Path) -> Iterator[Any]:
    """TensorBoard's records: length, checksum of it, content, checksum of it."""
    for path in sorted((folder / "tblog").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            content = data[12 : 12 + size]
            yield event_pb2.Event.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
            data = data[16 + size :]


def test_tensorboard_shows_the_logged_numbers(unbroken):
    shown: dict[str, dict[int, float]] = {}
    for event in events(unbroken):
        for value in event.summary.value:
            shown.setdefault(value.tag, {})[event.step] = value.simple_value
    lines = numbers(unbroken)
    for tag, of in {
        "total_loss": lambda line: line["total"],
        "loss/dataset1": lambda line: line["loss"]["dataset1"],
        "lr/unet.1": lambda line: line["lr"]["unet.1"],
        "grad_norm": lambda line: line["grad_norm"],
    }.items():
        wanted = {line["step"]: of(line) for line in lines}
        assert shown[tag] == pytest.approx(wanted, rel=1e-6)  # float32 there


def test_rates_follow_the_schedule_of_each_group(unbroken):
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in RATES])
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, STEPS)
    for line in numbers(unbroken):
        rates = [line["lr"]["unet.0"], line["lr"]["unet.1"]]
        theirs = [float(rate) for rate in schedule.get_last_lr()]
        np.testing.assert_allclose(rates, theirs, rtol=1e-5, atol=1e-10)
        optimizer.step()
        schedule.step()


def test_only_the_chosen_layers_change(nano_model, unbroken):
    base = params.load(nano_model / "unet" / "diffusion_pytorch_model.safetensors")
    chosen = patterns.match([p for group in LAYERS for p in group], base, "layers")
    part = unbroken / f"ckpts/unet-{STEPS}.safetensors"
    assert set(params.load(part)) == {f"base:{name}" for name in chosen}
    told = tensor_file.read_header(part).metadata
    assert told["ss_steps"] == str(STEPS)
    assert "ss_unet_lr" in told
    trained = hcp.read_part(part)
    assert all(weight.dtype == np.float32 for weight in trained.values())
    assert all((trained[name] != base[name]).any() for name in chosen)
    assert 0 < len(chosen) < len(base)


def test_export_opens_in_diffusers_with_the_trained_weights(nano_model, unbroken):
    (file,) = (unbroken / "export").iterdir()
    opened = StableDiffusionPipeline.from_single_file(
        str(file), config=str(nano_model), safety_checker=None, local_files_only=True
    )
    base = params.load(nano_model / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = base | hcp.read_part(unbroken / f"ckpts/unet-{STEPS}.safetensors")
    found = opened.unet.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        half = np.asarray(wanted[name]).astype(np.float16)
        np.testing.assert_array_equal(weight.to(torch.float16).numpy(), half, name)


# ----------------------------------------------------------------------------- equal computations


@pytest.fixture(scope="module")
def four_losses(recipe, tmp_path_factory) -> list[float]:
    """Of the first steps with one shape: one program less to compile in each test below."""
    folder = tmp_path_factory.mktemp("runs") / "one_shape"
    assert train.main(arguments(recipe, folder, *ONE_SHAPE)) == 0
    assert "devices   4 ×" in (folder / "plan.txt").read_text()
    return losses(folder)


def test_four_devices_of_one_image_are_one_device_of_four(recipe, four_losses, tmp_path):
    folder = tmp_path / "alone"
    argv = arguments(recipe, folder, *ONE_SHAPE, "data.dataset1.batch_size=4")
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
    command = [sys.executable, "-m", "jaxft.train", *argv]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert "devices   1 ×" in (folder / "plan.txt").read_text()
    np.testing.assert_allclose(losses(folder), four_losses, rtol=1e-5)


def test_encoding_in_the_step_gives_the_losses_of_the_cache(recipe, four_losses, tmp_path):
    folder = tmp_path / "uncached"
    argv = arguments(recipe, folder, *ONE_SHAPE, "data.dataset1.cache_latents=false")
    assert train.main(argv) == 0
    np.testing.assert_allclose(losses(folder), four_losses, rtol=1e-5)


def test_second_start_compiles_in_a_third_of_the_time(recipe, tmp_path, monkeypatch):
    times = []
    compile_all = Programs.compile

    def timed(*args: Any) -> None:
        start = time.process_time()  # of all threads; not the rest of the machine
        compile_all(*args)
        times.append(time.process_time() - start)

    usual = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(compiled, "options", lambda _: usual)
    monkeypatch.setattr(Programs, "compile", timed)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in options}
    overrides = (
        f"compile_cache={tmp_path / 'cache'}",
        "unet=[{lr: 1e-3, layers: [up_blocks.1]}]",
        *ONE_SHAPE,
    )
    try:
        for name in ("cold", "warm"):
            compilation_cache.reset_cache()
            jax.clear_caches()
            assert train.main(arguments(recipe, tmp_path / name, *overrides)) == 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    cold, warm = times
    assert warm <= cold / 3


# ---------------------------------------------------------------------------- counts in the plan


def prepared(recipe: Path, *overrides: str) -> plan.Plan:
    return plan.prepare(*configs.load(str(recipe), list(overrides)))


def test_scale_lr_multiplies_every_rate_by_the_images_of_an_update(recipe):
    scaled = prepared(
        recipe,
        "train.scale_lr=true",
        "train.gradient_accumulation_steps=3",
        "data.dataset1.batch_size=2",
    )
    assert scaled.images_per_step == 2 * 3 * jax.device_count()
    for group, lr in zip(scaled.selection.groups, RATES, strict=True):
        assert group.lr == pytest.approx(lr * scaled.images_per_step)


def test_epochs_become_steps(recipe):
    whole = prepared(recipe, "train.train_epochs=4")
    assert whole.total_steps == 4 * whole.datasets[0].num_batches == 4 * 3
    assert whole.epoch(whole.total_steps) == 4
    halved = prepared(recipe, "train.train_epochs=4", "train.gradient_accumulation_steps=2")
    assert halved.total_steps == whole.total_steps // 2
    assert halved.epoch(halved.total_steps) == 4
