"""What the planner says that ranks send each other, against every collective and every TCP byte of a real step."""

from __future__ import annotations

import pytest

from benchmarks.communication_volume import MIB, compose, counted, gloo_sent, nbytes_of, predicted
from swinv2_train.planning.communication import GATHER, SCATTER, SUM
from tests.support.harness import run_distributed

MODEL, TASK = "model=demo model.img_size=16 model.window_size=2", "task=classify task.num_classes=10"
SYNCED = "task=segment task.num_classes=10 task.head_channels=32 task.aux_channels=16 task.head_norm=sync_batch"
CASES = {
    2: [
        ("engine=zero0", 1),
        ("engine=zero1", 2),
        ("engine=zero1 engine.precision=fp32", 2),
        ("engine=zero2", 2),
        (f"engine=zero1 {SYNCED}", 1),
        ("engine=zero3", 1),
        ("engine=zero3 model.recompute=blocks", 2),
        ("engine=zero3 engine.persistence_threshold=0", 1),
        ("engine=zero3 engine.max_reuse_distance=1000000000 engine.max_live_parameters=1000000000", 1),
    ],
    4: [
        ("engine=zero2", 1),
        ("engine=zero3 model.recompute=attention", 1),
        *((f"engine=zero{stage} engine.communication_data_type=fp32", 1) for stage in (1, 2, 3)),
    ],
}


@pytest.mark.slow
@pytest.mark.serial  # it reads the counters of the loopback device, which is everybody's
@pytest.mark.parametrize("ranks", CASES)
def test_a_step_sends_what_the_planner_says(ranks: int) -> None:
    """The scaling curves stand on these bytes: all stages, accumulation, recomputation, both reuse distances."""
    tasks = [
        (MODEL if "task=" in case else f"{MODEL} {TASK}", case, accumulation) for case, accumulation in CASES[ranks]
    ]
    configs = [compose(f"{task} {overrides}", ranks, accumulation) for task, overrides, accumulation in tasks]
    volumes = run_distributed(lambda world: [counted(config, world) for config in configs], ranks)
    for number, (case, config) in enumerate(zip(CASES[ranks], configs, strict=True)):
        planned = predicted(config, ranks)
        for volume in (each[number] for each in volumes):
            for kind in (GATHER, SCATTER, SUM):
                # measured worst 0.01 %
                assert nbytes_of(planned, kind) == pytest.approx(volume.nbytes[kind], rel=0.005, abs=256), (case, kind)
            for real in (volume.wire_sent, volume.wire_received):  # measured worst 0.5 %: headers of small messages
                assert real > MIB and gloo_sent(planned, ranks) == pytest.approx(real, rel=0.02), case
            messages = sum(each.calls for each in planned)
            assert messages == pytest.approx(volume.calls.total(), rel=0.2, abs=1), case  # measured worst 33 for 39
