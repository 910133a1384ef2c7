"""State in the host's memory: not a bit of a run changes, wherever it goes on."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxft import assembly, config, forecast, params, plan, step, train
from jaxft import mesh as meshes
from jaxft.compiled import Programs
from jaxft.errors import UserError
from jaxft.tuning import eight_bit, optimizers, schedule_free
from tests.test_step import Setup
from tests.test_train import ONE_SHAPE, arguments, numbers, recipe, state

__all__ = ["recipe"]

BOTH = ("opt_state", "average")
OFFLOAD = "train.offload=[optimizer,average]"
EMA = "model.ema={_target_: ModelEMA, power: 0.5}"

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="before, a CPU's programs cannot write to it"
)


class Trained:
    """Three updates of a UNet, each followed by its average."""

    def __init__(self, mesh: Any, optimizer: Any, accumulation: int, offloaded: tuple[str, ...]):
        setup = Setup()
        labels = {"unet": dict.fromkeys(setup.trainable["unet"], "all")}
        self.programs = Programs(
            setup.objective,
            optimizers.grouped(labels, {"all": optimizer}, 1.0),
            labels,
            mesh,
            loss_weights=[1.0],
            accumulation=accumulation,
            averages=True,
            offloaded=offloaded,
        )
        self.frozen = jax.device_put(setup.frozen, meshes.shardings(mesh, setup.frozen))
        key = jax.device_put(setup.key, meshes.replicated(mesh))
        self.abstract = self.programs.state(setup.trainable)
        self.programs.compile(self.abstract, self.frozen, key, [[setup.batch(0)]])
        self.state = self.begun = self.programs.init(jax.tree.map(jnp.array, setup.trainable))
        self.metrics = []
        for n in range(3):
            parts = [
                setup.put(mesh, setup.batch(accumulation * n + i)) for i in range(accumulation)
            ]
            self.state, told = self.programs.step(self.state, self.frozen, key, [parts])
            self.state = self.programs.average(self.state, 0.3)
            self.metrics.append(jax.device_get(told))


def layout(data: int, fsdp: int) -> Any:
    return meshes.make(data, fsdp, jax.devices()[: data * fsdp])


def kinds(tree: Any, large: bool) -> set[str]:
    """Where the large or the small arrays of a tree are."""
    return {
        leaf.sharding.memory_kind
        for leaf in jax.tree.leaves(tree)
        if (leaf.size >= meshes.SMALLEST_SHARDED) == large
    }


def assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


OPTIMIZERS = {
    "adamw": lambda: optimizers.adamw(2e-4, weight_decay=1e-2),
    "adamw_8bit": lambda: eight_bit.adamw_8bit(2e-4),
    "schedule_free": lambda: schedule_free.adamw_schedule_free(2e-4),
}


@functools.cache
def trained(
    optimizer: str, sizes: tuple[int, int], accumulation: int, offloaded: tuple[str, ...]
) -> Trained:
    return Trained(layout(*sizes), OPTIMIZERS[optimizer](), accumulation, offloaded)


@pytest.mark.parametrize(
    ("optimizer", "sizes", "accumulation"),
    [
        ("adamw", (1, 1), 1),
        ("adamw", (2, 2), 2),
        ("adamw_8bit", (1, 1), 1),
        ("schedule_free", (1, 1), 1),
    ],
)
def test_no_bit_changes_and_the_state_lies_where_it_should(optimizer, sizes, accumulation):
    plain, moved = (trained(optimizer, sizes, accumulation, which) for which in ((), BOTH))
    assert_same_bits(moved.metrics, plain.metrics)
    assert_same_bits(moved.state, plain.state)
    assert_same_bits(step.result(moved.state), step.result(plain.state))
    for tree in (moved.state, moved.abstract, moved.begun):
        for field in BOTH:
            assert kinds(getattr(tree, field), large=True) == {meshes.HOST}
        assert kinds(tree, large=False) == kinds(tree.trainable, large=True) == {"device"}
    assert kinds(plain.state, large=True) == {"device"}
    given_up = [leaf for field in BOTH for leaf in jax.tree.leaves(getattr(moved.begun, field))]
    assert all(leaf.is_deleted() for leaf in given_up)


@pytest.mark.parametrize(("sizes", "accumulation"), [((1, 1), 1), ((2, 2), 2)])
def test_what_a_device_holds_falls_by_what_is_offloaded(sizes, accumulation):
    plain, moved = (trained("adamw", sizes, accumulation, which) for which in ((), BOTH))
    (device, *_) = layout(*sizes).local_devices
    there = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(moved.state)
        for shard in leaf.addressable_shards
        if shard.device == device and leaf.sharding.memory_kind == meshes.HOST
    )
    found = moved.programs
    assert found.in_host(moved.state) == found.in_host(moved.abstract) == there > 0
    assert found.held(moved.state, moved.frozen) + there == plain.programs.held(
        plain.state, plain.frozen
    )
    assert found.brought(moved.state) == meshes.bytes_in_host(moved.state.opt_state)
    assert plain.programs.brought(plain.state) == plain.programs.in_host(plain.state) == 0


def arguments_of(program: str) -> dict[str, str]:
    """Of each argument in StableHLO, what is said of it."""
    (line,) = re.findall(r"func public @main\((.*)\) -> \(", program)
    return dict(re.findall(r"(%arg\d+): tensor<[^>]*> \{(.*?)\}(?=, %arg|$)", line))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_of_accelerators_bring_all_that_lies_in_the_host_and_reuse_its_memory(platform):
    """A CPU's programs read it where it is, so that their numbers do not show it."""
    moved = Trained(layout(2, 2), OPTIMIZERS["adamw"](), 1, BOTH)
    found, whole = moved.programs, moved.abstract
    rest = whole._replace(average={})
    weights = whole.trainable
    judged = [found._judged(Setup().batch(0))]
    update: Any = found._update(jax.tree.map(lambda leaf: leaf.sharding, rest))
    average: Any = found._average(whole.average)
    for program, given, own in (
        (update, (rest, (weights,), judged), rest.opt_state),
        (average, (whole.average, weights, np.float32(0)), whole.average),
    ):
        text = program.trace(*given).lower(lowering_platforms=(platform,)).as_text()
        there = {n: said for n, said in arguments_of(text).items() if meshes.HOST in said}
        large = [leaf for leaf in jax.tree.leaves(own) if leaf.size >= meshes.SMALLEST_SHARDED]
        assert len(there) == len(large) > 0
        assert all("tf.aliasing_output" in said for said in there.values())
        brought = r'@annotate_device_placement\((%arg\d+)\).*_xla_buffer_placement = "device"'
        assert {*re.findall(brought, text)} == {*there}
        uses = re.findall(r"%arg\d+", text.partition("-> (")[2])
        assert all(uses.count(name) == 1 for name in there)


# ----------------------------------------------------------------------------------------- programs

LENGTH, SAVED = 4, 2
SHORT = (*ONE_SHAPE, EMA, f"train.save_step={SAVED}", "data.dataset1.held_out=0.25")
SPLIT = ("mesh.data=2", "mesh.fsdp=2")


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory) -> dict[str, Path]:
    """One on the devices and one in the host's memory, both of weights that devices share, with
    losses and images of their average."""
    folder = tmp_path_factory.mktemp("offload")
    painted = {
        "_base_": ["configs/infer/preview.yaml"],
        "prompt": ["a photo"],
        "bs": 1,
        "dtype": "fp32",
        "infer_args": {"width": 64, "height": 64, "num_inference_steps": 1},
    }
    (folder / "infer.yaml").write_text(yaml.safe_dump(painted))
    watched = (f"previewer.infer_cfg={folder / 'infer.yaml'}", "previewer.weights=both")
    for name, own in {"plain": (), "moved": (OFFLOAD,)}.items():
        assert train.main(arguments(recipe, folder / name, *SHORT, *SPLIT, *watched, *own)) == 0
    return {name: folder / name for name in ("plain", "moved")}


def assert_same_run(folder: Path, other: Path) -> None:
    ours, theirs = state(folder, LENGTH), state(other, LENGTH)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    assert numbers(folder) == numbers(other)
    for part in (folder / "ckpts").iterdir():
        ours, theirs = params.load(part), params.load(other / "ckpts" / part.name)
        assert_same_bits(ours, theirs)
    pictures = sorted(path.name for path in (folder / "preview").iterdir())
    assert {f"{LENGTH}-ema.png", f"{LENGTH}.png"} < {*pictures}
    for name in pictures:
        assert (folder / "preview" / name).read_bytes() == (other / "preview" / name).read_bytes()


def test_a_run_is_the_same_wherever_its_state_lies(runs):
    assert_same_run(runs["moved"], runs["plain"])
    assert any("average" in name for name in state(runs["moved"], LENGTH))


@pytest.mark.parametrize(("begun", "goes_on"), [("plain", OFFLOAD), ("moved", "train.offload=[]")])
def test_a_run_goes_on_wherever_its_state_lay(runs, tmp_path, begun, goes_on):
    folder = Path(shutil.copytree(runs[begun], tmp_path / "run"))
    shutil.rmtree(folder / "state" / str(LENGTH))
    assert train.main(["--resume", str(folder), goes_on]) == 0
    assert_same_run(folder, runs["plain"])


# --------------------------------------------------------------------------------- what a plan says


def prepared(recipe: Path, *overrides: str) -> plan.Plan:
    return plan.prepare(*config.load(str(recipe), [*ONE_SHAPE, *overrides]))


SMALL = "data.dataset1.bucket.target_area=1024"


@pytest.mark.parametrize(
    ("offload", "largest", "images", "while_changing"),
    [
        ("[optimizer]", "[optimizer]", 1, True),
        ("[optimizer]", "[optimizer]", 16, False),
        ("[average]", "[average]", 1, False),
        ("[optimizer,average]", "[optimizer]", 1, True),
    ],
)
def test_the_forecast_is_the_larger_of_both_times(recipe, offload, largest, images, while_changing):
    """While gradients are computed, and while the largest of what is offloaded changes."""
    everything = (f'{part}=[{{lr: 1e-3, layers: [""]}}]' for part in ("unet", "text_encoder"))
    trained = (*everything, EMA, SMALL, f"data.dataset1.batch_size={images}")
    made = prepared(recipe, *trained)
    (plain,) = forecast.of_plan(made, "none")
    outline, begun = assembly.outline(made), assembly.initial_shapes(made)
    held = outline.programs.held(outline.programs.state(begun), outline.frozen)
    moved, alone = (
        forecast.of_plan(prepared(recipe, *trained, f"train.offload={words}"), "none")[0]
        for words in (offload, largest)
    )
    assert plain.in_host == 0 < alone.in_host
    changing = held - moved.in_host + alone.in_host
    computing = plain.memory - moved.in_host
    assert (changing > computing) == while_changing
    assert moved.memory == max(changing, computing)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("train.offload=[optimiser]",), r"train\.offload: 'optimiser': .*optimizer and average"),
        (("train.offload=[average]",), r"train\.offload: average: .*model\.ema"),
        (("train.offload=optimizer",), r"train\.offload: must be a list of text"),
    ],
)
def test_words_that_mean_nothing_are_refused(recipe, overrides, says):
    with pytest.raises(UserError, match=says):
        prepared(recipe, *overrides)


def test_devices_without_it_are_refused(recipe, monkeypatch):
    monkeypatch.setattr(meshes, "HOST", "memory_of_nobody")
    prepared(recipe)
    with pytest.raises(UserError, match=r"train\.offload: programs of cpu .*memory_of_nobody"):
        prepared(recipe, "train.offload=[optimizer]")


def test_the_plan_and_the_forecast_tell_of_it(recipe):
    made = prepared(recipe, EMA, OFFLOAD)
    assert "offloaded optimizer, average: in the host's memory" in plan.describe(made)
    assert "GiB more for each in the host's memory" in forecast.told(made)
    assert "host's memory" not in forecast.told(prepared(recipe, EMA))
