"""What a plan says of memory and operations, beside what is compiled and what PyTorch counts."""

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jaxft import assembly, caches, config, costs, forecast, params, plan
from jaxft.models import encoder
from jaxft.models.unet import UNet2DConditionModel
from tests.test_offload import pytestmark as needs_host_memory
from tests.test_train import recipe

__all__ = ["recipe"]

LARGE = ("data.dataset1.batch_size=6", "data.dataset1.bucket.num_bucket=1")


def prepared(recipe, *overrides):
    return plan.prepare(*config.load(str(recipe), [*LARGE, *overrides]))


def test_operations_are_those_that_pytorch_counts(tiny_pipeline):
    unet = tiny_pipeline.unet
    inputs = torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 77, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(*inputs)
    graphdef, shapes = params.abstract(lambda: UNet2DConditionModel(dict(unet.config)))

    def predict(weights, *inputs):
        return params.bind(graphdef, weights)(*inputs)

    ours = jnp.zeros((2, 16, 16, 4)), jnp.zeros(2, jnp.int32), jnp.zeros((2, 77, 32))
    assert costs.of(predict, shapes, *ours).flops == counter.get_total_flops()


def test_a_loop_counts_as_often_as_it_runs():
    square = jnp.zeros((8, 8))

    def looped(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=5)[0]

    assert costs.of(looped, square).flops == 5 * 2 * 8**3
    assert costs.of(jax.grad(lambda x: looped(x).sum()), square).flops == 15 * 2 * 8**3


def test_live_bytes_end_with_the_last_reader():
    def two_at_a_time(x):
        for _ in range(6):
            x = jnp.sin(x)  # the last is the result
        return x

    x = jnp.zeros(1000)
    assert costs.of(two_at_a_time, x).peak_bytes == 2 * x.nbytes
    assert costs.of(lambda x: [two_at_a_time(x), two_at_a_time(x)], x).peak_bytes == 2 * x.nbytes


@pytest.mark.parametrize(
    "overrides",
    [
        ('unet=[{lr: 1e-3, layers: [""]}]',),
        pytest.param(
            ('unet=[{lr: 1e-3, layers: [""]}]', "train.offload=[optimizer]"),
            marks=needs_host_memory,
        ),
        ("unet=[]", 'lora_unet=[{lr: 1e-3, layers: ["re:.*attn1$"], rank: 2}]'),
    ],
    ids=["full", "offloaded", "lora"],
)
def test_memory_is_within_a_tenth_of_the_compiled_steps(recipe, overrides):
    made = prepared(recipe, *overrides)
    (told,) = forecast.of_plan(made, "none")
    run = assembly.assemble(caches.blank(made))
    state = run.programs.state(assembly.initial(made))
    assembly.compile_all(run, state)
    assert told.memory == pytest.approx(run.programs.memory(state, run.frozen), rel=0.1)


def test_auto_recomputes_the_least_that_fits(recipe):
    made = prepared(recipe)
    needed = {name: forecast.of_plan(made, name)[0].memory for name in encoder.REMAT}
    none, attention, blocks, full = needed.values()
    assert none > attention > min(blocks, full)
    for name in ("none", "attention", "blocks"):
        assert forecast.fitting(made, round(needed[name] / forecast.ROOM) + 1) == name
    assert forecast.fitting(made, 1) == "full"
    assert forecast.fitting(made, None) == "none"


def test_a_cpu_recomputes_nothing(recipe):
    assert forecast.policy(prepared(recipe, "model.gradient_checkpointing=full")) == "none"


def test_other_buckets_take_their_share(recipe):
    made = prepared(recipe, "data.dataset1.bucket.num_bucket=2")
    one, other = forecast.of_plan(made, "none")
    areas = [width * height for width, height in (one.size, other.size)]
    assert areas[0] != areas[1]
    assert one.flops / other.flops == pytest.approx(areas[0] / areas[1])


def test_the_forecast_is_for_people(recipe):
    told = forecast.told(prepared(recipe))
    assert "GFLOP, about" in told
    assert "GiB on each device, recomputing none" in told
