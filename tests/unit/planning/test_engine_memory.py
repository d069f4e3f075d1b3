"""The engine's formulas against what DeepSpeed and AdamW really allocate, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swinv2_train.config import Config
from swinv2_train.distributed import World
from swinv2_train.engine import build_engine
from swinv2_train.engine.build import engine_memory
from swinv2_train.engine.memory import COPIES
from swinv2_train.engine.model_sizes import LayerSizes, ModelSizes
from swinv2_train.models.kernels import cpu_products
from swinv2_train.planning.hardware import fill_from_machine
from swinv2_train.planning.memory import LOADER, plan_memory
from swinv2_train.tasks import build_task
from swinv2_train.training.param_groups import build_param_groups
from tests.support import configs
from tests.support.harness import run_distributed
from tests.support.live_bytes import allocated_peak

BASE = ["model=demo", "model.img_size=32", "model.embed_dim=192", "task=classify", "task.num_classes=10",
        "train.micro_batch_size=2", "train.global_batch_size=4", "hardware=cpu"]  # fmt: skip
ENGINES = {
    "zero0": ["engine=zero0"],
    "zero1": ["engine=zero1"],
    "zero1 fp32": ["engine=zero1", "engine.precision=fp32"],
    "zero2": ["engine=zero2"],
    "zero1 fp32 sums": ["engine=zero1", "engine.communication_data_type=fp32"],
    "zero2 fp32 sums": ["engine=zero2", "engine.communication_data_type=fp32"],
    "zero3 fp32 sums": ["engine=zero3", "engine.communication_data_type=fp32"],
    "zero3": ["engine=zero3"],
    "zero3 fp32": ["engine=zero3", "engine.precision=fp32"],
    "zero3 blocks": ["engine=zero3", "model.recompute=blocks"],
    "zero3 bf16 states": ["engine=zero3", "engine.optimizer_states=bf16", "optim.betas=[0.9,0.99]"],
}


def composed(*overrides: str) -> Config:
    return configs.composed(["run_dir=unused", "data.shards=unused", *BASE, *overrides])


def step_peak(world: World, overrides: list[str]) -> float:
    """MiB that a step has allocated at its peak over what there was before it, by torch's allocator: the least of three
    steps after the first two, because late frees and early gathers only ever add."""
    config = composed(*overrides)
    cpu_products.mkl_is_slow = lambda: False  # torch's own products are planned, on every processor
    task = build_task(config, world.device)
    engine = build_engine(
        task.module, build_param_groups(task.module, config.optim), config, world, 1, task.block_types
    )
    batch: dict[str, Any] = {
        "images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "labels": torch.tensor([1, 2]), "weight": torch.ones(2)
    }  # fmt: skip

    def step() -> None:
        engine.backward(task.loss(engine.forward, batch))
        engine.step(1e-4)

    for _ in range(2):
        step()
    return min(allocated_peak(step) for _ in range(3)) / 2**20


QUICK = ("zero1",)  # buckets and copies; each costs seconds of CPU


@pytest.mark.parametrize(
    "engine", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]
)
def test_a_step_takes_what_the_formulas_say(engine: str) -> None:
    """Gradients, buckets, live weights, and copies over a model whose activations are small."""
    config = composed(*ENGINES[engine])
    plan, _ = plan_memory(config, fill_from_machine(config.hardware, 2, rates=False), 2)
    predicted = (plan.peak - plan.resident - plan.phases[plan.peak_phase].get(LOADER, 0)) / 2**20
    measured = max(run_distributed(step_peak, 2, ENGINES[engine]))
    # Measured worst 0.1 % (zero0, zero1), 9 % (zero2), 13 % too much (zero1 fp32).  Under ZeRO-3 the same step takes
    # 16.8 to 19.0 MiB from run to run, as gathers come early or late: 17 %.
    assert predicted == pytest.approx(measured, rel=0.25 if "zero3" in engine else 0.15), plan.phases


def model_sizes_of(parameters: int, largest_parameter: int, largest_group: int, layers: LayerSizes) -> ModelSizes:
    groups = (largest_group, parameters - largest_group)
    return ModelSizes(parameters, largest_parameter, groups, layers, blocks=(), others=())


def test_the_bytes_of_giant() -> None:
    """GiB of one of 16 ranks, worked out by hand from the table in engine/deepspeed/memory.py: N = 3.0e9."""
    sizes = model_sizes_of(3_000_000_000, 50_000_000, 1_500_000_000, LayerSizes(200_000_000, 10_000, 1_000_000))
    expected = {
        "engine=zero1": 2 * 3 + 4 * 3 + 12 * 3 / 16,
        "engine=zero2": 2 * 3 + 12 * 3 / 16,
        "engine=zero3": (2 + 4 + 8 + 4) * 3 / 16 + 0.002 + 2 * 0.1,
    }
    for engine, gigabytes in expected.items():
        memory = engine_memory(composed(engine).engine, sizes, 16, 1, on_cpu=False)
        assert sum(memory.resident.values()) / 1e9 == pytest.approx(gigabytes, rel=1e-3), engine


def test_what_is_offloaded_counts_on_the_host() -> None:
    sizes = model_sizes_of(1_000_000, 50_000, 500_000, LayerSizes(100_000, 1000, 5000))
    here, there = (
        engine_memory(composed("engine=zero3", f"engine.offload_optimizer={place}").engine, sizes, 2, 1, False)
        for place in ("none", "cpu")
    )
    moved = sum(here.resident.values()) - sum(there.resident.values())
    assert moved == 8 * 1_000_000  # masters, moments and gradients: 16 bytes over 2 ranks
    assert sum(there.host.values()) >= moved  # the gradients are there in two copies


def test_gradients_of_earlier_micro_batches_rest() -> None:
    sizes = model_sizes_of(1_000_000, 50_000, 500_000, LayerSizes(100_000, 1000, 5000))
    one, four = (engine_memory(composed("engine=zero0").engine, sizes, 2, n, False) for n in (1, 4))
    assert (one.kept_gradient_bytes, four.kept_gradient_bytes) == (4, 0)
    assert sum(four.resident.values()) - sum(one.resident.values()) == 4_000_000


def test_what_zero_3_gathers_is_there_twice() -> None:
    """On a card a block's flat buffer stands beside the weights that are cut out of it; one rank gathers nothing."""
    overrides = ["engine=zero3", "model.recompute=blocks", "hardware=a100_40gb"]
    config = composed(*overrides)
    plan, trace = plan_memory(config, fill_from_machine(config.hardware, 2, rates=False), 2)
    assert plan.phases["forward"][COPIES] == 2 * plan.sizes.layers.largest_block
    for ranks, copied in ((1, 0), (2, 2 * plan.sizes.layers.largest_block)):
        memory = engine_memory(config.engine, plan.sizes, ranks, 1, on_cpu=False)
        assert memory.in_forward(trace, trace.forward).get(COPIES, 0) == copied
