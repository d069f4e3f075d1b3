"""What optim.lora trains of each task's model, what it starts from, what it costs and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.engine.build import engine_memory
from swinv2_train.engine.memory import EMA, GRADIENTS, MASTERS, MOMENTS, WEIGHTS
from swinv2_train.models.initial import initial_rule, on_meta
from swinv2_train.models.initial_rules import Constant, Uniform
from swinv2_train.models.lora import is_adapter
from swinv2_train.planning.memory import model_sizes
from swinv2_train.planning.trace import meta_task, trace_step
from swinv2_train.training.build import _identity
from swinv2_train.training.lora import build_trained_task
from swinv2_train.training.param_groups import build_param_groups
from tests.support.configs import composed
from tests.support.detector import DETECT
from tests.support.segmenter import SEGMENT
from tests.support.small_run import SMALL

RUN = ("run_dir=u", "data.shards=u")
CLASSIFY = ("task=classify", "data=cifar10", "model=demo", "task.num_classes=4", *SMALL, *RUN)
TASKS = {
    "classify": CLASSIFY,
    "simmim": ("task=simmim", "data=cifar10", "model=demo", "task.mask_unit_px=4", *SMALL, *RUN),
    "segment": (*SEGMENT, *RUN),
    "detect": (*DETECT, *RUN),
}
LORA = ("optim.lora.rank=2", "task.init_from=u.pth")


@pytest.mark.parametrize("task", TASKS)
def test_adapters_and_what_the_task_adds_are_trained(task):
    config = composed([*TASKS[task], *LORA])
    with on_meta():
        built = build_trained_task(config, torch.device("cpu"))
    prefix = "" if built.module is built.encoder else "encoder."
    for name, parameter in built.module.named_parameters():
        own = not name.startswith(prefix) or name.startswith(("head.", f"{prefix}mask_token"))
        assert parameter.requires_grad == (own or is_adapter(name)), name
    rules = {name: initial_rule(built.module, name) for name, _ in built.module.named_parameters() if is_adapter(name)}
    width = built.encoder.layers[0].blocks[0].attn.qkv.in_features
    assert rules[f"{prefix}layers.0.blocks.0.attn.qkv.lora_A"] == Uniform(1 / math.sqrt(width))
    assert rules[f"{prefix}layers.0.blocks.0.attn.qkv.lora_B"] == Constant(0.0)
    groups = build_param_groups(built.module, config.optim)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in built.module.parameters())


@pytest.mark.parametrize("engine", ["local", "zero1", "zero2", "zero3"])
def test_the_planner_counts_gradients_and_states_of_what_is_trained_alone(engine):
    precision = "fp32" if engine == "local" else "bf16"
    base = [*CLASSIFY, f"engine={engine}", f"engine.precision={precision}"]
    config = composed([*base, *LORA])
    sizes = model_sizes(meta_task(config), config)
    plain = model_sizes(meta_task(composed(base)), composed(base))
    assert plain.trained == plain.parameters < sizes.parameters
    adapters = sizes.parameters - plain.parameters
    assert sizes.trained == adapters + 4 * 16 + 4  # the head
    memory = engine_memory(config.engine, sizes, 1, 1, True, True).resident
    assert memory.get(MASTERS, 4 * sizes.trained) == memory[EMA] == 4 * sizes.trained
    assert memory[MOMENTS] == 8 * sizes.trained and memory.get(GRADIENTS, 0) <= 4 * sizes.trained
    assert memory[WEIGHTS] >= (4 if precision == "fp32" else 2) * sizes.parameters
    made = trace_step(config, 4.0).gradients
    assert sum(numel for _, numel in made) == sizes.trained


def test_a_run_keeps_its_adapters():
    ours, other, none = (_identity(composed([*CLASSIFY, *more])) for more in (LORA, (*LORA, "optim.lora.alpha=3"), ()))
    assert ours != other and ours["optim.lora.rank"] != none["optim.lora.rank"]
    assert _identity(composed([*CLASSIFY, "optim.lora.alpha=3"])) == none


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lora.rank=-1"], r"optim.lora.rank \(-1\) must be at least 0"),
        (["optim.lora.rank=2"], r"task.init_from is null: it would stay random; name its weights"),
        ([*LORA, "optim.lora.targets=[]"], r"optim.lora.targets \(\[\]\) leaves no layer"),
        ([*LORA, "optim.lora.targets=[q]"], r"optim.lora.targets .*q"),
        ([*LORA, "optim.lora.alpha=0"], r"optim.lora.alpha \(0.0\) must be more than 0"),
        ([*LORA, "task.init_bands=fresh"], r"with task.init_bands=fresh it would stay random"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed([*CLASSIFY, *overrides])


def test_a_rank_larger_than_a_layer_is_refused_with_the_largest():
    config = composed([*CLASSIFY, *LORA, "optim.lora.rank=9"])
    with on_meta(), pytest.raises(ConfigError, match=r"optim.lora.rank \(9\): .* set at most 8"):
        build_trained_task(config, torch.device("cpu"))
