"""Scaling curves: what a step sends, how long the fabric takes, and 8 to 1,024 GPUs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swinv2_train.config import Config, ConfigError, HardwareConfig
from swinv2_train.engine.model_sizes import LayerSizes, ModelSizes
from swinv2_train.plan import parse, plan
from swinv2_train.planning.communication import (
    GATHER,
    INTER,
    INTRA,
    SCATTER,
    SUM,
    Collective,
    collectives,
    message_sec,
    ring,
    seconds,
    sent_by_card,
)
from swinv2_train.planning.hardware import fill_from_machine
from swinv2_train.planning.memory import model_sizes, plan_memory
from swinv2_train.planning.scaling import COUNTS, scaling_curve
from swinv2_train.planning.speed import PassSeconds, measured_pass, optimizer_seconds, pass_seconds, plan_speed
from swinv2_train.planning.trace import meta_task
from tests.support import configs

pytestmark = pytest.mark.slow

DEMO = ["model=demo", "task=classify", "task.num_classes=10", "engine=zero3", "hardware=a100_40gb",
        "train.global_batch_size=4096", "train.micro_batch_size=64"]  # fmt: skip
SIZES = ModelSizes(
    parameters=1000 + 2 * 2010 + 500,
    largest_parameter=1000,
    groups=(5500, 20),
    layers=LayerSizes(2010, 10, 20),
    blocks=((1000,), (2000, 10), (2000, 10)),
    others=(500,),
)


def composed(*overrides: str) -> Config:
    return configs.composed(["run_dir=unused", "data.shards=unused", *overrides])


def volume(*overrides: str, ranks: int = 4, accumulation: int = 3) -> dict[tuple[str, str], int]:
    engine = composed(*overrides).engine
    found = collectives(engine, SIZES, ranks, accumulation, backward=0.6)
    return {(each.kind, each.what): each.nbytes for each in found if each.what != "norms"}


def test_the_bytes_of_every_stage() -> None:
    """By hand; tests/distributed/test_communication.py counts them in real steps."""
    n = SIZES.parameters
    assert volume("engine=zero0") == {(SUM, "gradients"): 4 * n}
    assert volume("engine=zero1") == {(SUM, "gradients"): 2 * n, (GATHER, "weights"): 2 * n}
    assert volume("engine=zero1", "engine.precision=fp32") == {(SUM, "gradients"): 4 * n, (GATHER, "weights"): 4 * n}
    assert volume("engine=zero2") == {(SUM, "gradients"): 3 * 2 * n, (GATHER, "weights"): 2 * n}
    gathered = 2 * (1000 + 2000) + 2000 + 500  # the last block and the head are kept from one pass to the next
    assert volume("engine=zero3") == {
        (GATHER, "weights"): 3 * 2 * gathered,
        (SCATTER, "gradients"): 3 * 2 * n,
        (GATHER, "small parameters"): 2 * 20,
    }
    assert volume("engine=zero3", "engine.max_reuse_distance=5000")[GATHER, "weights"] == 3 * 2 * (n - 20)
    assert volume("engine=zero3", "engine.persistence_threshold=0")[GATHER, "weights"] == 3 * 2 * (gathered + 30)
    wide = "engine.communication_data_type=fp32"
    for stage, kind, times in ((1, SUM, 1), (2, SUM, 3), (3, SCATTER, 3)):
        planned, plain = volume(f"engine=zero{stage}", wide), volume(f"engine=zero{stage}")
        assert planned == plain | {(kind, "gradients"): times * 4 * n}
    assert volume("engine=local") == volume("engine=zero3", ranks=1) == {}


def test_statistics_of_all_ranks_are_sums_that_nothing_hides() -> None:
    """Five for each norm and micro-batch: places, means and variances, and their gradients."""
    sizes = replace(SIZES, synced_norms=(512, 256))
    engine = composed("engine=zero1").engine
    found = [each for each in collectives(engine, sizes, 4, 3, 0.6) if each.what == "statistics"]
    assert found == [Collective(SUM, "statistics", 3 * 4 * (4 * 512 + 1 + 4 * 256 + 1), 3 * 10, 0.0)]
    assert collectives(engine, sizes, 1, 3, 0.6) == []


SYNCED = [
    "model=demo", "task=segment", "task.head_norm=sync_batch", "train.global_batch_size=32", "train.micro_batch_size=2",
    "engine=zero1", "hardware=a100_40gb",
]  # fmt: skip


def test_norms_over_all_ranks_are_planned_as_a_run_would_take_them() -> None:
    """Where a step has several micro-batches the run is refused, and so is the plan, by the same words."""
    config = composed(*SYNCED, "plan.scaling=strong")
    norms = [model_sizes(meta_task(each), each).synced_norms for each in (config, composed(*SYNCED[:2], *SYNCED[3:]))]
    levels = len(config.model.pretrained_window_sizes)
    assert norms == [(512,) * (4 + 1 + 2 * (levels - 1) + 1) + (256,), ()]
    with pytest.raises(ConfigError, match=r"task\.head_norm \(sync_batch\) with 4 micro-batches per step"):
        plan(*parse([*SYNCED, "plan.num_gpus=4"]))
    with pytest.raises(ConfigError, match=r"task\.head_norm \(batch\) on 4 processes"):
        plan(*parse([*SYNCED[:2], "task.head_norm=batch", *SYNCED[3:], "plan.num_gpus=4", "--recommend"]))
    curve = scaling_curve(config, fill_from_machine(config.hardware, 8), 8)
    assert [each.num_gpus for each in curve.points] == [16, 32]
    assert "task.head_norm (sync_batch) with 2 micro-batches per step" in curve.left_out[8]


def test_a_rank_sends_its_share_of_a_ring_and_a_sum_twice_that() -> None:
    by_kind = {each.kind: each for each in collectives(composed("engine=zero2").engine, SIZES, 4, 1, 0.6)}
    assert by_kind[GATHER].sent(4) == pytest.approx(0.75 * 2 * SIZES.parameters)
    assert by_kind[SUM].sent(4) != 0
    gradients = next(each for each in collectives(composed("engine=zero0").engine, SIZES, 8, 1, 0.6))
    assert gradients.sent(8) == pytest.approx(2 * 7 / 8 * 4 * SIZES.parameters)


def fabric(**rates: float) -> HardwareConfig:
    rates = {"intra_node_gb_per_sec": 240.0, "inter_node_gb_per_sec": 20.0, "op_overhead_us": 8.0} | rates
    latencies = {"intra_node_latency_us": 1.0, "inter_node_latency_us": 3.0, "gpus_per_node": 8}
    return replace(composed("hardware=a100_40gb").hardware, **(latencies | rates))  # type: ignore[arg-type]


def test_the_cards_of_a_node_carry_a_ring_together() -> None:
    """Or a ring between nodes would seem eight times as slow as it is."""
    assert ring(fabric(), 8) == (INTRA, 240e9)
    assert ring(fabric(), 16) == (INTER, 160e9)
    assert ring(fabric(inter_node_gb_per_sec=40.0), 16) == (INTRA, 240e9)
    assert sent_by_card(80.0, fabric(), 16) == 10.0 and sent_by_card(80.0, fabric(), 8) == 0.0


def test_a_short_message_waits_for_every_hop_and_a_sum_for_a_tree() -> None:
    assert message_sec(GATHER, fabric(), 8) == pytest.approx((8 + 7 * 1.0) * 1e-6)
    assert message_sec(SCATTER, fabric(), 64) == pytest.approx((8 + 56 * 1.0 + 7 * 3.0) * 1e-6)
    assert message_sec(SUM, fabric(), 64) == pytest.approx((8 + 2 * (7 * 1.0 + 3 * 3.0)) * 1e-6)


def test_only_what_overlaps_is_hidden() -> None:
    """Without overlap a step waits for every byte and message; with it for what is longer than the passes."""
    together = []
    for overlap in ("true", "false"):
        config = composed(*DEMO, f"engine.overlap_comm={overlap}")
        hardware = fill_from_machine(config.hardware, 8)
        memory, trace = plan_memory(config, hardware, 16)
        speed = plan_speed(config, hardware, memory.sizes, pass_seconds(hardware, trace), 16)
        whole = sum(sum(seconds(each, hardware, 16)) for each in speed.collectives)
        assert speed.hidden + speed.exposed + speed.latency == pytest.approx(whole)
        together.append(speed)
    assert together[0].hidden > 0 == together[1].hidden
    assert together[0].step_sec < together[1].step_sec


def test_the_last_bucket_of_a_pass_comes_after_it() -> None:
    """Its gradients are complete when nothing is left to compute; with one bucket for all of them nothing is hidden."""
    hardware = fill_from_machine(composed("hardware=a100_40gb").hardware, 8)
    for engine in ("zero1", "zero2", "zero3"):
        found = {}
        for bucket in (1000, SIZES.parameters):
            config = composed(f"engine={engine}", "engine.precision=fp32", f"engine.reduce_bucket_size={bucket}",
                              "train.global_batch_size=1024")  # fmt: skip
            speed = plan_speed(config, hardware, SIZES, PassSeconds(10.0, 0.0, 0.0, 0.6, 1, 0), 8)
            (gradients,) = (each for each in speed.collectives if each.what == "gradients")
            found[bucket] = speed, gradients
        assert found[1000][1].last == pytest.approx((SIZES.parameters - 5 * 1000) / SIZES.parameters)
        speed, gradients = found[SIZES.parameters]
        assert gradients.last == 1.0
        exposed = sum(seconds(gradients, hardware, 8))
        assert speed.exposed + speed.latency >= exposed * 0.999, engine
        assert found[1000][0].exposed < speed.exposed, engine


def test_a_measured_step_takes_the_place_of_the_estimate() -> None:
    config = composed(*DEMO, "plan.step_seconds=0.5")
    hardware = fill_from_machine(config.hardware, 8)
    memory, trace = plan_memory(config, hardware, 8)
    estimated = pass_seconds(hardware, trace)
    passes = measured_pass(config, hardware, memory.sizes.parameters, estimated, estimated)
    optimizer = optimizer_seconds(config, hardware, memory.sizes.parameters, 1)
    assert passes.total + optimizer == pytest.approx(0.5) and passes.total > 2 * estimated.total
    other = replace(estimated, products=estimated.products / 2, traffic=estimated.traffic / 4)
    changed = measured_pass(config, hardware, memory.sizes.parameters, estimated, other)
    assert changed.products == pytest.approx(passes.products / 2)
    assert changed.traffic == pytest.approx(passes.traffic / 4)
    slow_host = replace(estimated, host=2.0)  # the host was as fast as it was, whatever the estimate says
    assert measured_pass(
        config, hardware, memory.sizes.parameters, slow_host, slow_host
    ).total + optimizer == pytest.approx(0.5)
    config.plan.step_seconds = optimizer
    with pytest.raises(ConfigError, match=r"plan\.step_seconds \(.*whole step: perf/step_sec"):
        measured_pass(config, hardware, memory.sizes.parameters, estimated, estimated)


def curve_of(kind: str, *overrides: str, base: int = 8):  # type: ignore[no-untyped-def]
    config = composed(*DEMO, f"plan.scaling={kind}", *overrides)
    return scaling_curve(config, fill_from_machine(config.hardware, 8), base)


def test_strong_scaling_keeps_the_batch_and_weak_scaling_a_ranks_share() -> None:
    strong, weak = curve_of("strong", "plan.step_seconds=0.05"), curve_of("weak", "plan.step_seconds=0.05")
    assert [each.num_gpus for each in strong.points] == list(COUNTS) == [each.num_gpus for each in weak.points]
    assert {each.speed.images for each in strong.points} == {4096}
    assert [each.speed.images for each in weak.points] == [512 * gpus for gpus in COUNTS]
    assert {(each.micro_batch_size, each.accumulation_steps) for each in weak.points} == {(64, 8)}
    for each in strong.points:
        assert each.micro_batch_size * each.accumulation_steps * each.num_gpus == 4096
    assert [strong.points[i].micro_batch_size for i in (0, 3, 4, 7)] == [64, 64, 32, 4]
    for curve in (strong, weak):
        efficiency = [each.efficiency for each in curve.points]
        assert all(one > other for one, other in zip(efficiency, efficiency[1:], strict=False)) and efficiency[0] < 1
        alone = curve.points[0].speed.images / curve.points[0].alone_sec / 8
        for each in curve.points:
            assert sum(each.parts.values()) == pytest.approx(each.speed.step_sec)
            assert each.speed.images / each.alone_sec / each.num_gpus == pytest.approx(alone)
    assert weak.points[-1].efficiency > strong.points[-1].efficiency
    assert strong.points[0].speed.images_per_sec == pytest.approx(8 * 64 / 0.05, rel=0.1)


@pytest.mark.parametrize(
    ("limit", "overrides"),
    [
        ("compute", ["plan.step_seconds=10"]),
        ("intra-node", ["hardware.intra_node_gb_per_sec=0.001"]),
        ("inter-node", ["hardware.inter_node_gb_per_sec=0.0001"]),
        ("latency", ["hardware.inter_node_latency_us=10000"]),
        ("launches", ["hardware.op_overhead_us=3000", "engine=zero0", "model.recompute=blocks"]),
    ],
)
def test_the_limit_is_what_was_made_slow(limit: str, overrides: list[str]) -> None:
    assert curve_of("strong", *overrides).points[-1].limit == limit


def test_what_cannot_be_divided_is_left_out_with_its_reason() -> None:
    curve = curve_of("strong", "train.global_batch_size=576", "train.micro_batch_size=8")
    assert [(each.num_gpus, each.micro_batch_size) for each in curve.points] == [(8, 8), (16, 6), (32, 6)]
    assert curve.left_out[64] == (
        "train.global_batch_size (576) is 9 images for each of 64 GPUs, and mixup pairs them; "
        "set it to a multiple of 128"
    )
    assert curve.left_out[128] == ("train.global_batch_size (576) is not a multiple of 128 GPUs; nearest: 512, 640")
    assert "is less than one image for each of 1024 GPUs; set it to 1024" in curve.left_out[1024]
    plain = curve_of("strong", "train.global_batch_size=576", "train.micro_batch_size=8", "task.mixup_prob=0")
    assert [(each.num_gpus, each.micro_batch_size) for each in plain.points[-2:]] == [(32, 6), (64, 3)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["plan.scaling=strong", "engine=local"],
            r"plan\.scaling \(strong\) with engine\.name=local.*set engine\.name",
        ),
        (["plan.scaling=strong", "train.global_batch_size=4"], r"global_batch_size \(4\) is less than one image .* 8"),
        (["plan.scaling=strong", "train.global_batch_size=12"], r"\(12\) is not a multiple of 8 GPUs; nearest: 8, 16"),
        (
            ["plan.scaling=weak", "plan.num_gpus=3"],
            r"\(4096\) is not a multiple of micro_batch_size \(64\) x world_size",
        ),
        (
            ["--recommend", "plan.num_gpus=8", "train.global_batch_size=24", "train.micro_batch_size=2"],
            r"\(24\) cannot be divided among 8 ranks in pairs, as mixup needs; set it to a multiple of 2 x plan",
        ),
        (["plan.scaling=both"], r"plan\.scaling \(both\) is none of null, strong, weak"),
        (["plan.step_seconds=0"], r"plan\.step_seconds \(0\.0\) must be more than 0"),
        (["hardware.intra_node_latency_us=-1"], r"hardware\.intra_node_latency_us \(-1\.0\) must be at least 0"),
        (["plan.scaling=weak", "--recommend"], r"plan\.scaling \(weak\) with --recommend"),
        (["plan.json=x", "--recommend"], r"plan\.json \(x\) with --recommend"),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*parse([*DEMO, *overrides]))


def test_a_picture_without_matplotlib_is_refused_before_anything_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plan\.picture \(x\.png\): matplotlib is not installed; .*pip install -e"):
        plan(*parse([*DEMO, "plan.picture=x.png"]))


def test_the_command_prints_draws_and_writes_the_curve(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from PIL import Image

    picture, numbers = tmp_path / "a" / "curve.png", tmp_path / "b" / "curve.json"
    files = [f"plan.picture={picture}", f"plan.json={numbers}"]
    plan(*parse([*DEMO, "plan.scaling=strong", *files]))
    text = capsys.readouterr().out
    assert "not measured (plan.step_seconds)" in text and " 1,024    128" in text and "efficiency" in text
    points = json.loads(numbers.read_text())["points"]
    assert [each["num_gpus"] for each in points] == list(COUNTS)
    assert points[3]["sent_bytes_by_network_card"] == pytest.approx(points[3]["sent_bytes"] / 8)
    assert Image.open(picture).size[0] > 900
    plan(*parse([*DEMO, "plan.scaling=weak", "plan.step_seconds=0.25"]))
    assert "passes from the 0.25 s that a step of one micro-batch took" in capsys.readouterr().out


def test_the_plan_says_what_goes_over_the_fabric(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    numbers = tmp_path / "plan.json"
    plan(*parse([*DEMO, "plan.num_gpus=16", f"plan.json={numbers}"]))
    text = capsys.readouterr().out
    assert "each rank sends and receives" in text and "by each network card" in text and "MFU" in text
    written = json.loads(numbers.read_text())
    assert written["sent_bytes"] == pytest.approx(sum(each["sent_bytes"] for each in written["collectives"]))
    assert {each["kind"] for each in written["collectives"]} == {GATHER, SCATTER, SUM}
    plan(*parse([*DEMO, "engine=zero1", "plan.num_gpus=1", "train.global_batch_size=64"]))
    assert "nothing goes over the fabric" in capsys.readouterr().out
