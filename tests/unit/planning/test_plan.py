"""The planner: activations as they are, engine bytes by formula, speed, what fits and what to change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.config import Config, ConfigError
from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.config.load import config_yaml
from swinv2_train.data.loading.rows import tensors_of
from swinv2_train.distributed import World
from swinv2_train.engine.activation_checkpointing import apply_recompute
from swinv2_train.engine.build import engine_memory
from swinv2_train.models.kernels import cpu_passes
from swinv2_train.plan import parse, plan
from swinv2_train.planning import trace as trace_module
from swinv2_train.planning.hardware import fill_from_machine
from swinv2_train.planning.memory import BACKWARD, FORWARD, LOADER, PINNED, extrapolated, model_sizes, plan_memory
from swinv2_train.planning.op_cost import Operation, cost_of, fused
from swinv2_train.planning.search import Search, Setting
from swinv2_train.planning.speed import extrapolated_pass, pass_seconds, plan_speed
from swinv2_train.planning.start_warning import memory_warning, rough_bytes
from swinv2_train.planning.table import time_text
from swinv2_train.planning.trace import evaluation_bytes, meta_task, trace_step
from swinv2_train.runtime.environment import GIB
from swinv2_train.tasks import build_task
from tests.support import configs
from tests.support.live_bytes import allocated_peak

ONE_BY_ONE = ("task.mixup_alpha=0", "task.cutmix_alpha=0")  # mixing wants micro-batches of pairs
SMALL = [
    "model=demo",
    "model.img_size=64",
    "model.window_size=8",
    "task=classify",
    "task.num_classes=10",
    *ONE_BY_ONE,
    "engine=local",
]
TINY = ["model=tiny", "model.img_size=256", "task=classify", *ONE_BY_ONE, "engine=local", "train.micro_batch_size=1"]


def bands(count: int) -> list[str]:
    return [f"model.in_chans={count}", f"data.mean={[0] * count}", f"data.std={[1] * count}"]


POLICIES = {
    "none": [],
    "blocks": ["model.recompute=blocks"],
    "attention": ["model.recompute=attention"],
    "every second": ["model.recompute=every:2"],
    "stage 1": ["model.recompute=stages:1"],
    "fairscale": ["model.recompute=blocks@fairscale"],
    "chunks": ["model.sequential_stages=[1,2]", "model.attention_chunk_windows=2"],
    "chunks recomputed": ["model.sequential_stages=[1]", "model.attention_chunk_windows=2", "model.recompute=blocks"],
    "simmim": ["task=simmim", "task.mask_unit_px=8"],
    "simmim of 14 bands": ["task=simmim", "task.mask_unit_px=8", "data.nodata=[nan]", *bands(14)],
}


def composed(*overrides: str) -> Config:
    return configs.composed(["run_dir=unused", "data.shards=unused", *overrides])


def table_of_operations(coordinates: Tensor, first: Tensor, bias: Tensor, second: Tensor, range: float) -> Tensor:
    return range * F.linear(F.linear(coordinates, first, bias).relu_(), second).sigmoid()


def allocated(config: Config) -> int:
    """The most that a real forward and backward pass has allocated on the CPU, by torch's own allocator.

    A CPU's pass over position biases keeps nothing of their MLP, which a card does and a trace counts: a few percent of
    models as small as these.
    """
    task = build_task(config, torch.device("cpu"))
    apply_recompute(task.module, config.model.recompute, task.block_types)
    batch: dict[str, Any] = {
        name: torch.zeros_like(tensor, device="cpu")
        for name, tensor in task.meta_batch(config.train.micro_batch_size).items()
    }
    batch["weight"] += 1
    if "mask" in batch:
        batch["mask"][:, :2] = True

    def passes() -> None:
        torch.autograd.backward(task.loss(task.module.train().__call__, batch))

    with patch.object(cpu_passes, "position_table", table_of_operations):
        passes()  # tables are made, and gradients: the second pass adds to them
        for parameter in task.module.parameters():
            parameter.grad = None
        return allocated_peak(passes)


@pytest.mark.parametrize("policy", POLICIES)
def test_activations_are_those_that_torch_allocates(policy: str) -> None:
    """Whatever the policy, because it is run.  Kernels' own workspaces are all that a trace does not see."""
    overrides = [*SMALL, "train.micro_batch_size=8", *POLICIES[policy]]
    if policy.startswith("simmim"):
        overrides = [*SMALL[:3], "engine=local", *overrides[len(SMALL) :]]
    config = composed(*overrides)
    trace = trace_step(config, 4, on_cpu=True)
    predicted = max(trace.forward.total, trace.backward.total) - trace.backward.tables
    assert predicted == pytest.approx(allocated(config), rel=0.04)  # measured worst 2.6 %


def test_every_byte_of_images_of_any_number_of_bands_is_counted() -> None:
    """A photograph has a byte for a pixel and colour, values have four for a pixel and band: where the loader makes
    them, page-locked, and on the card, where the next micro-batch lies beside the one at work."""
    common = ["model=base", "task=simmim", "model.img_size=192", "train.micro_batch_size=8", "data.num_workers=3"]
    more = {}
    for count, pixel in ((3, 3), (14, 4 * 14)):
        config = composed(
            *common, "train.global_batch_size=32", "hardware=a100_40gb", *(bands(14) if count > 3 else ())
        )
        plan, trace = plan_memory(config, fill_from_machine(config.hardware, 2, rates=False), 2)
        batch = 8 * (pixel * 192 * 192 + 48 * 48 + 4)  # values, mask, weight
        assert trace.batch_bytes == batch
        assert plan.host[LOADER] == plan.host[PINNED] == batch * (2 + 3 * config.data.prefetch_batches)
        assert all(phase[LOADER] == 2 * batch for phase in plan.phases.values())
        more[count] = plan.sizes.parameters
    assert more[14] - more[3] == 11 * (16 * 128 + 32**2 * (1024 + 1))  # patch embedding and decoder


def test_a_batch_takes_what_the_plan_counts() -> None:
    """The row that the loader's own transform makes."""
    for task in (["task=simmim", "task.mask_unit_px=8"], ["task=classify", "task.rand_augment=null", *ONE_BY_ONE]):
        for chosen in ([], bands(5)):
            built = meta_task(composed(*SMALL[:3], *task, *chosen))
            channels, dtype = (5, torch.float32) if chosen else (3, torch.uint8)
            image = torch.zeros(channels, 70, 80, dtype=dtype)
            row = tensors_of(built.train_transform(image, {"label": 1}, np.random.default_rng(0)))
            counted = {name: (t.dtype, t.shape[1:]) for name, t in built.meta_batch(2).items() if name != "weight"}
            assert counted == {name: (tensor.dtype, tensor.shape) for name, tensor in row.items()}


SEGMENT = [
    "model=tiny", "model.img_size=128", "model.window_size=8", "model.embed_dim=24", "model.depths=[1,1,2,1]",
    "model.num_heads=[1,2,4,8]", "task=segment", "task.num_classes=30", "task.head_channels=64", "task.aux_channels=32",
    "engine=local", "train.micro_batch_size=2",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["task.head_norm=group", "task.loss_denominator=valid", "task.aux_channels=0"],
        ["model.recompute=blocks", "task.num_classes=200", "task.ignore_index=255"],
        ["task.head_norm=batch", "model.attention=reference", "model.img_size=[96,160]"],
    ],
)
def test_a_segmenters_activations_are_those_that_torch_allocates(overrides: list[str]) -> None:
    """Crop, both heads, and the scores of one image's pixels at a time."""
    config = composed(*SEGMENT, *overrides)
    trace = trace_step(config, 4, on_cpu=True)
    predicted = max(trace.forward.total, trace.backward.total) - trace.backward.tables
    assert predicted == pytest.approx(allocated(config), rel=0.02)  # measured worst 0.05 %


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (["task.resize_long_px=600", "task.resize_short_px=288", "task.eval_scales=[0.5,1.0]"], (1, 288, 600)),
        (["task.eval_mode=slide", "task.eval_crop=[288,224]", "train.micro_batch_size=3"], (3, 288, 224)),
    ],
)
def test_a_segmenters_evaluation_takes_what_torch_allocates(overrides: list[str], seen: tuple[int, ...]) -> None:
    """Of the largest image, or of as many tiles as a pass has."""
    config = composed(*SEGMENT, *overrides)
    assert config.task.evaluated_at_once(config) == seen
    module = build_task(config, torch.device("cpu")).module.eval()

    def passes() -> None:
        with torch.no_grad():
            module(images=torch.zeros(seen[0], 3, *seen[1:]))

    passes()  # tables are made
    assert evaluation_bytes(config, on_cpu=True) == pytest.approx(allocated_peak(passes), rel=0.15)  # 10 %
    assert evaluation_bytes(composed(*SMALL)) is None


def test_recomputation_keeps_less_and_computes_more() -> None:
    """The order that every user expects; a trace that lost the policy would see no difference."""
    none, attention, blocks = (trace_step(composed(*TINY, f"model.recompute={each}"), 0) for each in (
        "none", "attention", "blocks"))  # fmt: skip
    assert none.backward.total > attention.backward.total > blocks.backward.total
    assert none.flops < attention.flops < blocks.flops
    assert sum(blocks.backward.kept.values()) < 0.15 * sum(none.forward.kept.values())


def test_inputs_on_the_cpu_count_there() -> None:
    stay, cpu = (trace_step(composed(*TINY, f"model.recompute={each}"), 0) for each in ("blocks", "blocks@cpu"))
    assert stay.host_bytes == 0
    blocks = meta_task(composed(*TINY)).module.layers  # type: ignore[union-attr]
    tokens = [(64 // 2**i) ** 2 * 96 * 2**i * 4 for i in range(4)]  # bytes of a block's input
    assert cpu.host_bytes == sum(len(stage.blocks) * nbytes for stage, nbytes in zip(blocks, tokens, strict=True))  # type: ignore[arg-type]
    assert sum(cpu.forward.kept.values()) < sum(stay.forward.kept.values())


def test_autograd_holds_the_weights_whose_gradients_are_still_to_be_made() -> None:
    """ZeRO-3 cannot free them; where the backward pass has been they are free, and recomputed blocks hold none."""
    for policy, least, most in (("none", 0.9, 1.0), ("blocks", 0.0, 0.1)):
        trace = trace_step(composed(*TINY, f"model.recompute={policy}"), 0)
        held = {peak.place: peak.held_weights for peak in trace.backward_peaks}
        assert list(held) == ["ends", "stage 4", "stage 3", "stage 2", "stage 1"]
        assert least * trace.weight_bytes <= held["ends"] <= most * trace.weight_bytes
        assert held["stage 1"] < 0.02 * trace.weight_bytes
        assert trace.forward_peaks[1].held_weights < 0.02 * trace.weight_bytes  # stage 1


def test_zero_3_gathers_ahead_no_more_than_is_still_to_come() -> None:
    """In the backward pass of stage 1, where the activations are, nearly all weights are done with."""
    config = composed(*TINY[:5], "train.micro_batch_size=1", "engine=zero3", "model.recompute=blocks", "hardware=cpu")
    sizes = model_sizes(meta_task(config), config)
    engine, trace = engine_memory(config.engine, sizes, 2, 1, on_cpu=False), trace_step(config, 0)
    parts = {peak.place: engine.in_backward(trace, peak) for peak in trace.backward_peaks}
    stage_1 = sum(numel for place, numel in trace.gradients if place == "stage 1")
    held = {peak.place: peak.held_weights for peak in trace.backward_peaks}
    assert parts["stage 1"] == {"ZeRO-3 live weights": 2 * stage_1 + held["stage 1"], "gradient copies": 2 * stage_1}
    window = 2 * 2 * sizes.layers.largest_block  # bf16, the block in use and the next
    assert parts["stage 4"]["ZeRO-3 live weights"] == window + held["stage 4"]
    bucket = sizes.layers.largest_block * (2 + 4 // 2)  # together, and half of it in fp32
    gathered = window // 2  # a block's flat buffer, beside the weights that are cut out of it
    assert parts["stage 3"]["gradient copies"] == parts["stage 4"]["gradient copies"] == bucket + gathered
    assert parts["ends"]["gradient copies"] == gathered  # the head's gradients do not fill a bucket


@pytest.mark.slow
def test_fairscale_counts_as_itself_on_the_cpu() -> None:
    """It keeps a gradient and an output longer than torch's recomputation, which is as good a guess at first sight."""
    config = composed(*TINY, "model.recompute=blocks@fairscale")
    trace = trace_step(config, 4, on_cpu=True)
    predicted = max(trace.forward.total, trace.backward.total) - trace.backward.tables
    assert predicted == pytest.approx(allocated(config), rel=0.004)  # measured 0.05 %; torch's takes 1 % less


def test_remembered_results_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operation returned is made again for equal arguments: the same bytes and flops as when all are run."""
    config = composed(*SMALL, "train.micro_batch_size=2", *POLICIES["chunks recomputed"])
    trace_step(config, 0)  # makes the tables
    quick = trace_step(config, 0)
    monkeypatch.setattr(trace_module.Results, "call", lambda self, func, args, kwargs, key: func(*args, **kwargs))
    slow = trace_step(config, 0)
    assert (quick.forward, quick.backward, quick.flops) == (slow.forward, slow.backward, slow.flops)


def test_forward_flops_are_twice_the_multiply_adds() -> None:
    """Two counts of one thing; the trace leaves norms out and has the position bias's MLP."""
    config = composed(*TINY)
    trace = trace_step(config, 0)
    forward = sum(operation.flops for operation in trace.operations[: trace.forward_operations])
    assert forward == pytest.approx(2 * meta_task(config).multiply_adds, rel=0.02)  # measured 0.6 %
    assert trace.flops == pytest.approx(3 * forward, rel=0.02)  # measured 0.3 %


def test_fused_attention_is_counted_as_it_runs() -> None:
    """The forward pass multiplies as much as the reference's, and keeps nothing of tokens x tokens."""
    config = composed(*TINY, "model.attention=reference")
    fused = composed(*TINY, "model.attention=fused")
    plain, without = trace_step(config, 0), trace_step(fused, 0)
    one, other = (sum(o.flops for o in t.operations[: t.forward_operations]) for t in (plain, without))
    assert one == other and plain.flops < without.flops < 1.2 * plain.flops  # the scores once more
    assert without.backward.total < 0.8 * plain.backward.total


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["reference", "fused"])
def test_many_images_are_foretold_from_two_and_four(attention: str) -> None:
    """The search draws straight lines: operations take exactly as long, and no peak is higher than it is."""
    hardware = fill_from_machine(composed("hardware=rtx4090").hardware, 1)
    reference = [*TINY[:-1], f"model.attention={attention}"]
    trace_step(composed(*reference, "train.micro_batch_size=1"), 0)  # makes the tables
    two, four, eight = (trace_step(composed(*reference, f"train.micro_batch_size={n}"), 0) for n in (2, 4, 8))
    foretold, real = extrapolated_pass(hardware, two, four, 4), pass_seconds(hardware, eight)
    assert foretold.total == pytest.approx(real.total, rel=1e-6) and foretold.flops == real.flops
    assert foretold.backward == pytest.approx(real.backward, rel=1e-6)
    scaled = extrapolated(two, four, 4)
    assert 0.99 * eight.backward.total <= scaled.backward.total <= 1.001 * eight.backward.total


@pytest.mark.parametrize("path", sorted((conf_dir() / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_hardware_file_composes_and_plans(path: Path) -> None:
    if path.stem == "common":
        return
    config = composed(*SMALL, f"hardware={path.stem}", "train.micro_batch_size=1", "train.global_batch_size=1")
    hardware = fill_from_machine(config.hardware, 1)
    memory, trace = plan_memory(config, hardware, 1)
    speed = plan_speed(config, hardware, memory.sizes, pass_seconds(hardware, trace), 1)
    assert memory.fits and 0 < speed.step_sec < 60, (memory.peak, speed)


@pytest.mark.slow
def test_the_rough_bound_is_above_the_plan() -> None:
    """Or the check at the start would keep silent about a run that does not fit."""
    for overrides in (
        SMALL,
        TINY,
        ["model=base", "train.micro_batch_size=4", "engine=zero1"],
        ["model=large", "model.img_size=512", "model.window_size=32", "task=classify", "train.micro_batch_size=2"],
        [
            "model=tiny",
            "task=classify",
            "model.img_size=224",
            "model.window_size=7",
            "engine=zero0",
            "train.micro_batch_size=16",
        ],
    ):
        config = composed(*overrides, "hardware=cpu", "train.global_batch_size=128")
        memory, _ = plan_memory(
            config, fill_from_machine(config.hardware, 2, rates=False), 2 if config.engine.name != "local" else 1
        )
        assert rough_bytes(config, meta_task(config)) > memory.peak, overrides


def test_the_start_warns_where_it_does_not_fit_and_is_silent_where_it_does() -> None:
    world = World(0, 0, 2, 2, torch.device("cpu"))
    large = composed("model=base", "train.micro_batch_size=32", "hardware=cpu", "hardware.memory_gib=4")
    warning = memory_warning(large, world, meta_task(large))
    assert warning is not None and "GiB more than" in warning and "\n" not in warning
    small = composed("model=demo", "task.mask_unit_px=8", "hardware=cpu")
    assert memory_warning(small, world, meta_task(small)) is None


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    plan(*parse(list(arguments)))
    return capsys.readouterr().out


def test_the_command_prints_where_the_bytes_go(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "new" / "bytes.png"
    text = planned(
        capsys, *TINY[:5], "engine=zero3", "hardware=a100_40gb", "plan.num_gpus=16", "train.micro_batch_size=8",
        "plan.num_images=1281167", f"plan.picture={picture}",
    )  # fmt: skip
    for part in ("weights", "AdamW's averages", "ZeRO-3 live weights", "activations, stage 3", "fits on 16 x A100",
                 "images/s", "GPU-days", "checkpoint: ", "TFLOP"):  # fmt: skip
        assert part in text, part
    assert "62600 steps" not in text and f"{-(-100 * 1281167 // 2048)} steps" in text
    assert Image.open(picture).size[0] > 500


def test_the_length_is_unknown_without_images(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, *SMALL, "hardware=a100_40gb", "plan.num_gpus=1")
    assert "set plan.num_images" in text


ASKED = [*SMALL[:7], "engine=zero3", "hardware=rtx4090", "hardware.reserved_gib=0", "plan.num_gpus=4",
         "train.global_batch_size=64", "train.micro_batch_size=1"]  # fmt: skip
SHALLOW = ["model.depths=[1,1]", "model.num_heads=[2,4]", "model.pretrained_window_sizes=[0,0]"]
"""A search traces every policy and stage, each as deep as the model."""


@pytest.mark.slow
def test_the_recommended_command_composes_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """And it is at least as fast as the setting that was asked about."""
    text = planned(capsys, *ASKED, "--recommend", "run_dir=runs/x")
    command = text.strip().splitlines()[-1].split()
    assert command[:5] == ["torchrun", "--nnodes", "1", "--nproc-per-node", "4"]
    arguments = [each.strip("'") for each in command[7:]]
    assert "run_dir=runs/x" in arguments
    times = []
    for overrides in (arguments, ASKED):
        config = composed(*[each for each in overrides if not each.startswith("hardware")], "hardware=rtx4090")
        hardware = fill_from_machine(config.hardware, 4)
        memory, trace = plan_memory(config, hardware, 4)
        assert memory.fits
        times.append(plan_speed(config, hardware, memory.sizes, pass_seconds(hardware, trace), 4).step_sec)
    assert times[0] <= times[1]


@pytest.mark.parametrize(
    ("overrides", "gpus", "share"),
    [
        pytest.param(["engine=local", "model.attention=reference"], 1, 0.8, marks=pytest.mark.slow),
        (["model.attention=fused"], 2, 0.7),
    ],
)
def test_nothing_that_fits_is_faster_than_what_is_recommended(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], gpus: int, share: float
) -> None:
    """By the planner's own numbers for every setting; estimates from single images once hid the large micro-batches."""
    monkeypatch.setattr("swinv2_train.planning.search.POLICIES", ("none", "blocks"))
    config = composed(
        *ASKED, *SHALLOW, *overrides, f"plan.num_gpus={gpus}", f"train.global_batch_size={6 * gpus}",
        "train.micro_batch_size=6", "hardware.op_overhead_us=1",
    )  # fmt: skip
    hardware = fill_from_machine(config.hardware, gpus)
    largest = plan_memory(config, hardware, gpus)[0].peak
    search = Search(config, dataclasses.replace(hardware, memory_gib=share * largest / GIB), gpus)
    best = search.fastest()
    tried = [search.exact(each.setting) for each in search.estimates]
    fitting = [each for each in tried if each.memory.fits]
    assert {each.setting.micro_batch_size for each in tried} == {1, 2, 3, 6} and 0 < len(fitting) < len(tried)
    assert best is not None and best.speed.step_sec == min(each.speed.step_sec for each in fitting)
    plain = search.exact(dataclasses.replace(best.setting, sequential_stages=()))
    if plain.setting != best.setting:  # they are there for something
        assert not plain.memory.fits or plain.speed.step_sec > best.speed.step_sec


def test_a_recommendation_says_only_what_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that holds no scores has no use for sequential stages; and what is configured need not be said again."""
    monkeypatch.setattr("swinv2_train.planning.search.POLICIES", ("none", "blocks"))
    text = planned(capsys, *ASKED, "--recommend", "run_dir=runs/x", "plan.num_images=640", "model.attention=fused")
    command = text.strip().splitlines()[-1]
    assert "sequential_stages" not in command and "recompute" not in command
    assert "train.micro_batch_size=1 " not in f"{command} "  # replaced, not given twice
    for part in ("CPU memory of one rank, GiB: ", "for a node's 4 ranks", "1000 steps: ", "GPU-days"):
        assert part in text, part


@pytest.mark.slow
def test_a_run_is_planned_by_its_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its own model, batch and ranks, not the defaults that the command line would compose without them."""
    run = tmp_path / "run"
    config = composed(*SMALL[:7], "engine=zero3", "train.global_batch_size=64", "train.micro_batch_size=4")
    run.mkdir()
    (run / "config.yaml").write_text(config_yaml(config))
    start = {"argv": ["train", "model=demo", "train.global_batch_size=64", f"run_dir={run}"], "world_size": 2}
    (run / "environment.json").write_text(json.dumps([start]))
    text = planned(capsys, f"run_dir={run}", "hardware=a100_40gb", "train.micro_batch_size=8", "plan.num_images=640")
    assert "demo, 64 px" in text and "64 images a step, 8 at a time on each of 2 ranks" in text
    assert "fits on 2 x A100" in text
    _, repeated = parse([f"run_dir={run}", "train.micro_batch_size=8", "--recommend"])
    assert repeated == ["model=demo", "train.global_batch_size=64", f"run_dir={run}", "train.micro_batch_size=8"]
    with pytest.raises(ConfigError, match="engine=zero1 chooses a whole group"):
        parse([f"run_dir={run}", "engine=zero1"])  # planned the default model
    with pytest.raises(ConfigError, match="micro_batch"):
        parse([f"run_dir={run}", "train.micro_batch_size=0"])
    config, _ = parse([f"run_dir={tmp_path / 'new'}"])
    assert config.model.name == "base" and "holds no run yet" in capsys.readouterr().out


@pytest.mark.slow
def test_less_memory_recommends_a_thriftier_setting_or_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = ("none", "attention", "blocks")
    monkeypatch.setattr("swinv2_train.planning.search.POLICIES", policies)
    config = composed(*ASKED, *SHALLOW)
    hardware = fill_from_machine(config.hardware, 4)
    search = Search(config, hardware, 4)
    peaks = {policy: search.exact(Setting(3, policy, (), 16)).memory.peak for policy in policies}
    assert peaks["blocks"] < peaks["attention"] < peaks["none"]
    text = planned(capsys, *ASKED, *SHALLOW, f"hardware.memory_gib={0.9 * peaks['none'] / GIB}", "--recommend")
    assert "fits on 4 x RTX 4090" in text
    assert "train.micro_batch_size=16" not in text or "model.recompute=" in text
    text = planned(capsys, *ASKED, *SHALLOW, "hardware.memory_gib=0.001", "--recommend")
    assert text.startswith("nothing fits on 4 x RTX 4090") and "GiB more than" in text and "largest part is" in text
    text = planned(capsys, *ASKED, *SHALLOW, "hardware.memory_gib=0.001")
    assert "does not fit on 4 x RTX 4090" in text and "--recommend" in text


def test_no_odd_micro_batch_is_recommended_where_images_are_mixed_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recommended command would be refused."""
    monkeypatch.setattr("swinv2_train.planning.search.POLICIES", ("none",))
    for mixing, smallest in (("task.mixup_alpha=0.8", 2), ("task.mixup_alpha=0", 1)):
        config = composed(*ASKED, "train.micro_batch_size=2", "model.attention=fused", mixing)
        tried = Search(config, fill_from_machine(config.hardware, 4), 4).estimates
        assert min(each.setting.micro_batch_size for each in tried) == smallest


@pytest.mark.parametrize(
    ("seconds", "text"), [(30, "30 s"), (300, "5 minutes"), (7260, "2.02 hours"), (864000, "10 days")]
)
def test_a_length_is_in_units_that_a_person_reads(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_phases_hold_what_belongs_to_them() -> None:
    """Forward has no gradients yet, the backward pass makes them, and the engine's parts are in every one."""
    config = composed(*TINY, "train.global_batch_size=1", "hardware=a100_40gb")
    memory, trace = plan_memory(config, fill_from_machine(config.hardware, 1), 1)
    n = memory.sizes.parameters
    assert memory.resident == 12 * n + memory.phases["step"].pop("tables")
    assert "gradients" not in memory.phases[FORWARD]
    assert 0 < memory.phases[BACKWARD]["gradients"] < 4 * n
    assert memory.phases["step"].pop(LOADER) == 2 * trace.batch_bytes
    assert memory.phases["step"] == {"weights": 4 * n, "AdamW's averages": 8 * n, "gradients": 4 * n}


def test_compiled_blocks_are_planned_as_runs_of_elementwise_operations() -> None:
    """A run is one launch that moves what its largest member moves; products stay, and nothing outside of blocks is
    fused.  On a CPU, and with model.compile=none, the plan is of the operations as they are."""
    a, b, product = Operation(1, 10, "bf16"), Operation(2, 30, "fp32"), Operation(5, 7, "bf16")
    assert fused([a, b, product, b, product, a], [True, True, False, True, False, False]) == [
        Operation(3, 30, "bf16"), product, b, product, a,
    ]  # fmt: skip
    base = [*SMALL[:-1], "engine=zero1", "hardware=a100_40gb"]
    plain, compiled = (trace_step(composed(*base, f"model.compile={what}"), 2) for what in ("none", "auto"))
    assert len(compiled.operations) < len(plain.operations) and compiled.flops == plain.flops
    assert compiled.forward_operations < plain.forward_operations
    assert sum(each.nbytes for each in compiled.operations) < sum(each.nbytes for each in plain.operations)
    assert trace_step(composed(*base), 2, on_cpu=True).operations == (
        trace_step(composed(*base, "model.compile=none"), 2, on_cpu=True).operations
    )


def test_the_reads_of_a_pooling_window_count() -> None:
    """Or a window of 47 x 47 pixels would seem to cost what a copy costs."""
    values = torch.empty(2, 3, 8, 8, device="meta")
    cost = cost_of(torch.ops.aten.avg_pool2d.default, (values, [5, 3], [1, 1], [2, 1]), [values], [values])
    assert cost.flops == 2 * values.numel() * 15


def test_norms_move_less_on_cuda_than_on_a_cpu() -> None:
    """bf16 goes in and out of them there, where a CPU's are computed on fp32 copies (models/precision.py)."""
    config = composed(*SMALL[:-1], "engine=zero1", "model.compile=none")
    cuda, cpu = (sum(each.nbytes for each in trace_step(config, 2, on_cpu).operations) for on_cpu in (False, True))
    assert cuda < cpu


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ["(the experiment itself", "`model.attention=reference model.sequential_stages=[]`",
            "`model.attention=reference model.sequential_stages=[1]`"]
)  # fmt: skip
def test_what_the_memory_page_says_of_htc_on_the_giant_is_what_the_planner_says_today(row: str) -> None:
    """Which stages must be sequential, with the paper's largest detector on 16 cards of 40 GB."""
    page = (conf_dir().parent / "docs" / "memory.md").read_text().partition("## HTC on SwinV2-G")[2]
    overrides, peak, fits, _ = (
        next(line for line in page.splitlines() if line.startswith(f"| {row}")).strip("| ").split(" | ")
    )
    config = configs.composed(
        ["experiment=coco_htc_giant_1536", "hardware=a100_40gb", "plan.num_gpus=16", "data.shards=unused",
         *(overrides.strip("`").split() if overrides.startswith("`") else ())]
    )  # fmt: skip
    plan, _ = plan_memory(config, fill_from_machine(config.hardware, 16), 16)
    assert plan.peak / GIB == pytest.approx(float(peak), rel=0.01) and plan.fits == (fits == "yes")
