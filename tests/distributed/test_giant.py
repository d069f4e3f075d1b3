"""The giant's experiments take steps on a cluster that is not there: wrong shapes and names cannot hide.

DeepSpeed's own ZeRO-3 engine runs on rank 0 of 4, over torch's fake process group, with the model at its full width
and input, and of its third stage one period of its extra norms: 6 blocks and the first of the next, instead of 42.
Tensors are fake (torch's FakeTensorMode: shapes, dtypes and devices without memory), so every operation of forward,
loss, backward, reduction and AdamW checks its operands, and none computes.  What is asked of a value (is the
norm finite?) is answered with 1.  What the numbers are is the matter of test_construct.py and test_swin_engines.py.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from swinv2_train.distributed import World
from swinv2_train.engine import build_engine
from swinv2_train.models.initial import initial_rule, on_meta
from swinv2_train.tasks import build_task
from swinv2_train.training.param_groups import build_param_groups
from tests.support.configs import composed
from tests.support.harness import run_distributed

RANKS = 4  # what a parameter costs here grows with them: DeepSpeed cuts it into as many pieces
PARAMETERS = {
    "giant_1536": 3_001_940_680, "simmim_giant_192": 3_010_430_176, "simmim_satvision_giant_128": 2_653_783_008
}  # fmt: skip
DEPTHS = "model.depths=[2,2,7,2]"
ZERO_3 = "engine=zero3"  # also of SatVision's, which is published with ZeRO-2
STEPS = {"giant_1536": 1, "simmim_giant_192": 1, "simmim_satvision_giant_128": 2}  # a second adds what the engine does


class Rules:
    """Values that are not made: only their names and places are looked at."""

    def __init__(self, model):
        self.model = model
        self.pieces = {}

    def fill(self, target, name, start):
        initial_rule(self.model, name)  # or it raises
        self.pieces[name] = (start, target.numel(), target.dtype)


def fake_batch(config):
    batch, size, patches = config.train.micro_batch_size, config.model.img_size, config.model.img_size // 4
    bands, dtype = config.model.in_chans, torch.uint8 if config.model.in_chans == 3 else torch.float32
    common = {"images": torch.zeros(batch, bands, size, size, dtype=dtype), "weight": torch.ones(batch)}
    if config.task.name == "simmim":
        return {**common, "mask": torch.zeros(batch, patches, patches, dtype=torch.bool)}
    return {**common, "labels": torch.zeros(batch, dtype=torch.int64)}


def take_steps(world, name):
    """In a process of its own: the engine as the trainer builds it, but for one micro-batch a step."""
    import torch.distributed as dist
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode

    class Answers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else int(args[0].dtype != torch.bool)
            return func(*args, **(kwargs or {}))

    # Fewer chunks than the shipped 256 MiB make: each is a pass through the same operations.
    config = composed([f"experiment={name}", "data.shards=x", DEPTHS, ZERO_3, "model.attention_chunk_mib=8192"])
    world = World(0, 0, RANKS, 2, torch.device("cpu"))
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        Answers(),
        mock.patch.object(
            torch.nn.Module, "to", lambda module, *args, **kwargs: module
        ),  # no weak reference survives it
        mock.patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda numbers: None),
    ):
        task = build_task(config, world.device)  # drawn, in fake memory
        shapes = {key: tuple(p.shape) for key, p in task.module.named_parameters()}
        groups = build_param_groups(task.module, config.optim)
        engine = build_engine(task.module, groups, config, world, 1, task.block_types)
        rules = Rules(task.module)
        engine.initialise(rules)
        for _ in range(STEPS[name]):
            loss = task.loss(engine.forward, fake_batch(config))
            assert loss.shape == () and loss.dtype == torch.float32
            engine.backward(loss)
            engine.step(config.optim.lr)
        optimizer = engine._ds.optimizer
        moments = sum(state["exp_avg"].numel() for state in optimizer.optimizer.state.values())
        return shapes, rules.pieces, moments, len(groups), optimizer.dtype


def on_meta_module(config):
    with on_meta():
        return build_task(config, torch.device("cpu")).module


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_giant_takes_its_steps_on_several_ranks(name):
    """Each rank holds its share of masters and moments, every parameter has a rule for its initial values, and the
    trainer's model without values has the same names and shapes."""
    ((shapes, pieces, moments, num_groups, dtype),) = run_distributed(take_steps, 1, name, timeout_sec=600, init=False)
    config = composed([f"experiment={name}", "data.shards=x"])
    assert config.model.recompute == "blocks"
    assert config.model.sequential_stages == ([] if config.model.window_size == 8 else [1, 2])
    assert sum(p.numel() for p in on_meta_module(config).parameters()) == PARAMETERS[name]
    module = on_meta_module(composed([f"experiment={name}", "data.shards=x", DEPTHS]))
    assert shapes == {key: tuple(p.shape) for key, p in module.named_parameters()}
    numels = {key: p.numel() for key, p in module.named_parameters()}
    assert pieces == {key: (0, -(-numel // RANKS), torch.float32) for key, numel in numels.items()}
    assert moments == sum(-(-numel // RANKS) for numel in numels.values())
    assert dtype == torch.bfloat16
    assert num_groups == len(build_param_groups(module, config.optim)) >= 2
