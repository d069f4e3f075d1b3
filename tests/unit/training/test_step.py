"""What a training step leaves out: waits for the device, collections of garbage, a loop in the optimizer."""

from __future__ import annotations

import gc
import inspect
import math
import subprocess
import sys
import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_train import train
from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.engine.adamw import adamw
from swinv2_train.monitoring.activity import RankActivity
from swinv2_train.runtime import StopRequest
from swinv2_train.training import loop
from swinv2_train.training.garbage_collection import ManualGC
from swinv2_train.training.prefetch import GO, STOP, StepPrefetcher
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.small_run import SMALL

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")
"""Operations whose result the host needs: on an accelerator each waits until all work before it is done."""


def place() -> str:
    """What the training loop is at; "deepspeed" for what it does within a forward or backward pass."""
    frames = traceback.extract_stack()
    stack = [frame.name for frame in frames]
    if "prepare" in stack:
        return "agreement"
    if "step" in stack:
        return "optimizer"
    return "deepspeed" if any("/deepspeed/runtime/" in frame.filename for frame in frames) else "elsewhere"


class HostReads(TorchDispatchMode):
    """Where the host reads a tensor's content, by the step before which it does."""

    def __init__(self, run: loop.Run) -> None:
        super().__init__()
        self.run = run
        self.found: dict[int, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in READS:
            self.found.setdefault(self.run.position.step + 1, Counter())[place()] += 1
        return func(*args, **(kwargs or {}))


def host_reads(config: Any) -> dict[int, Counter[str]]:
    """HostReads by step of a whole run on one process."""

    def command(world: Any) -> tuple[int, dict[int, Counter[str]]]:
        found: dict[int, Counter[str]] = {}
        fit = loop.fit

        def watched(run: loop.Run, stop: StopRequest) -> bool:
            with HostReads(run) as reads:
                done = fit(run, stop)
            found.update(reads.found)
            return done

        loop.fit = watched
        return guarded(lambda: train.train(config)), found

    ((code, found),) = run_distributed(command, 1, init=False)
    assert code == EXIT_DONE
    return found


def six_steps(engine: str, task: str, run_dir: Any, shards: tuple[str, str], *more: str) -> Any:
    """Two micro-batches of two images a step on one process; steps 1, 4 and 6 are logged, the last one is saved."""
    settings = [setting for setting in SMALL if not setting.startswith(("engine", "train.log_every"))]
    of_task = {"finetune": ["task.init_from=null", "task.num_classes=4", "optim.layer_decay=0.9"]}
    return composed([
        f"experiment=cifar10_{task}", f"run_dir={run_dir}", *settings, shards[0], "data.eval_shards=null",
        f"engine={engine}", "train.max_steps=6", "train.log_every_steps=4", "train.global_batch_size=4",
        "train.micro_batch_size=2", "train.checkpoint_every_steps=100", "train.picture_every_steps=100",
        *of_task.get(task, ["task.mask_unit_px=4"]), *more,
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "task", "optimizer"),
    [("local", "finetune", 1), ("zero1", "simmim", 2), ("zero2", "finetune", 1), ("zero3", "simmim", 1)],
)
def test_a_step_without_a_log_line_waits_for_the_device_at_one_place(engine, task, optimizer, shards, tmp_path):
    """After the backward pass: for the ranks' agreement on the next step and for the gradient norm, and DeepSpeed's
    stage 1 in bf16 compares the norm once more.  Layer decay makes many parameter groups; none costs a read."""
    found = host_reads(six_steps(engine, task, tmp_path / "run", shards, "data.num_workers=0"))
    for step in (3, 4):  # the first one is logged
        assert found[step] == {"agreement": 1, "optimizer": optimizer}, found
    assert found[5]["elsewhere"] > 0, "step 4 is logged after it is counted, so a read can be seen at all"


def prefetcher_of(batches: list[Any], stop: StopRequest, waits: list[str]) -> StepPrefetcher:
    class Waiting:
        def __enter__(self) -> None:
            waits.append("wait")

        def __exit__(self, *exc_info: object) -> None: ...

    return StepPrefetcher(iter(batches), 2, torch.device("cpu"), stop, RankActivity(), Waiting)


def test_the_feed_gives_every_step_its_micro_batches_in_order():
    """Prepared ahead or not, nothing is lost, doubled or mixed."""
    waits: list[str] = []
    prefetcher = prefetcher_of([{"number": number} for number in range(8)], StopRequest(), waits)
    steps = []
    for step in range(4):
        upcoming = prefetcher.take()
        if step in (0, 1):  # before the optimizer
            prefetcher.prepare()
            assert len(waits) == step + 2
        assert upcoming.state == GO
        assert [batch["number"] for batch in upcoming.copies] == [batch["number"] for batch in upcoming.micro_batches]
        steps.append([batch["number"] for batch in upcoming.micro_batches])
    assert steps == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_what_is_wrong_with_the_next_steps_data_comes_with_that_step():
    """The step before it is still taken; a stop is agreed on when the step is made ready."""

    def batches():
        yield from ({"number": number} for number in range(3))
        raise ConfigError("torn")

    stop = StopRequest(after_sec=math.inf)
    prefetcher = prefetcher_of(batches(), stop, [])
    assert prefetcher.take().state == GO
    prefetcher.prepare()
    with pytest.raises(ConfigError, match="^torn$"):
        prefetcher.take()
    assert prefetcher_of([{}], StopRequest(after_sec=0), []).take().state == STOP


@pytest.mark.slow
def test_a_run_collects_at_its_steps_alone_and_leaves_the_collector_as_it_was(shards, tmp_path):
    """50 steps: the collector runs at every 20th and at no other time, and what is alive does not grow."""
    settings = (*SMALL, "train.max_steps=50", "train.checkpoint_every_steps=100", "train.picture_every_steps=100")
    config = composed([
        "experiment=cifar10_finetune", f"run_dir={tmp_path / 'run'}", *settings, *shards, "task.init_from=null",
        "task.num_classes=4", "runtime.gc_every_steps=20",
    ])  # fmt: skip

    def command(world: Any) -> tuple[int, list[int], list[int], bool]:
        collected, alive = [], []
        step_done = RankActivity.step_done

        def count(self: RankActivity, step: int) -> None:
            step_done(self, step)
            now.append(step)
            if step in (10, 50):
                alive.append(len(gc.get_objects()))

        now: list[int] = [0]
        RankActivity.step_done = count
        fit = loop.fit

        def watched(run: loop.Run, stop: StopRequest) -> bool:
            gc.callbacks.append(lambda phase, info: phase == "start" and collected.append(now[-1]))
            done = fit(run, stop)
            gc.callbacks.clear()
            return done

        loop.fit = watched
        code = guarded(lambda: train.train(config))
        return code, collected, alive, gc.isenabled()

    ((code, collected, alive, enabled),) = run_distributed(command, 1, init=False)
    assert code == EXIT_DONE and collected == [20, 40] and enabled
    assert alive[1] - alive[0] < 1000, alive  # measured 60; a leaked batch of 8 is 20 objects a step


def test_garbage_is_left_to_python_without_a_period():
    """null: nothing is switched off, nothing is collected."""
    count = inspect.unwrap(gc.get_freeze_count)
    enabled, frozen = gc.isenabled(), count()
    with ManualGC(None) as manual_gc:
        manual_gc.after_step(1)
        assert (gc.isenabled(), count()) == (enabled, frozen)
    assert gc.isenabled() == enabled


@pytest.mark.parametrize("frozen", [True, False])
def test_what_a_process_has_set_aside_of_its_own_stays_so(frozen):
    """A program's, or a fork's of what belongs to its parent: a run inside it has no right to collect that."""

    def body(_: object) -> tuple[bool, bool]:
        gc.get_freeze_count = inspect.unwrap(gc.get_freeze_count)  # conftest's stand-in counts once
        if not frozen:
            gc.unfreeze()
        before = gc.get_freeze_count()
        with ManualGC(1) as manual_gc:
            inside = gc.get_freeze_count()
            manual_gc.after_step(1)
        return inside > 0, abs(gc.get_freeze_count() - before) < 100

    assert run_distributed(body, 1, init=False) == [(True, True)]


def reference_adamw(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """arXiv:1711.05101 algorithm 2 in float64; betas 0.9 and 0.999, eps 1e-8."""
    w, first, second = weight.double(), torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for number, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        step = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        w = w - lr * decay * w - lr * step
    return w


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_engines_adamw_is_the_published_one(scale):
    """Fused, on this device, to the rounding of float32; a resume in the middle changes no bit."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4099, generator=generator)
    gradients = [scale * torch.randn(4099, generator=generator) for _ in range(20)]

    def stepped(parameter: torch.nn.Parameter, optimizer: torch.optim.AdamW, these: list[torch.Tensor]) -> None:
        for gradient in these:
            parameter.grad = gradient.clone()
            optimizer.step()

    def build(start: torch.Tensor) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        parameter = torch.nn.Parameter(start.clone())
        return parameter, adamw([{"params": [parameter], "weight_decay": 0.05}], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)

    parameter, optimizer = build(weight)
    assert optimizer.defaults["fused"]
    stepped(parameter, optimizer, gradients)
    worst = float((parameter.detach() - reference_adamw(weight, gradients, 1e-3, 0.05)).abs().max())
    assert worst < 5e-6, worst  # measured worst 3.5e-6, of the loop over tensors too, at weights of up to 4
    first, optimizer = build(weight)
    stepped(first, optimizer, gradients[:7])
    again, resumed = build(first.detach())
    resumed.load_state_dict(optimizer.state_dict())
    stepped(again, resumed, gradients[7:])
    assert torch.equal(again, parameter)


@pytest.mark.slow
def test_attention_of_our_own_and_recomputation_do_not_import_the_compiler():
    """The first call of a custom operation would, for seconds, to mark it as not to be compiled, and torch's checkpoint
    to read a setting.
    """
    code = """
import sys
import torch
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.engine.adamw import avoid_compiler
from swinv2_train.models import swin_v2
from swinv2_train.models.swin_v2 import SwinBlock
avoid_compiler()
model = swin_v2("tiny", img_size=32, window_size=4, fused_attention=True)
apply_recompute(model, "blocks", (SwinBlock,))
model(torch.randn(1, 3, 32, 32)).sum().backward()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "False"
