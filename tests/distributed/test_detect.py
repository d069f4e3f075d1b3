"""Object detection on several ranks: equal calls whatever the images hold, and the losses of one process."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch

from swinv2_train import train
from swinv2_train.config.command_line import guarded
from swinv2_train.distributed import all_reduce_sum
from swinv2_train.engine import build_engine
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.report.page import write_report
from swinv2_train.tasks import build_task
from swinv2_train.training.param_groups import build_param_groups
from tests.support.configs import composed
from tests.support.detection import object_shards
from tests.support.detector import CASCADE, DETECT, HEADS, HTC, crops, part, randomised
from tests.support.evaluation import evaluated
from tests.support.harness import run_distributed
from tests.support.one_rank import ONE

ZERO_3 = ("engine=zero3", "engine.persistence_threshold=0")
COUNTS = {
    "objects everywhere": [2, 1, 3, 4, 1, 2],
    "none on the last rank": [2, 1, 3, 4, 0, 0],
    "on the first image alone": [3, 0, 0, 0, 0, 0],
    "no object at all": [0, 0, 0, 0, 0, 0],
}


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    """Imported once here: torchvision's bring torch's compiler, 3 s of each rank's start."""
    importlib.import_module("torchvision.ops")


LOSS_RTOL = 5e-6  # measured worst 4e-7 over 2 steps
NORM_RTOL = 5e-5


def steps(world, overrides: tuple[str, ...], micro: int, counts: list[int]) -> list[tuple[float, float]]:
    """[loss, gradient norm] of 2 steps on six images, this rank's part of them, with as many evaluations."""
    config = composed(
        [*DETECT, "data.shards=unused", "run_dir=x", "model.drop_path_rate=0", f"train.micro_batch_size={micro}",
         *overrides]
    )  # fmt: skip
    torch.manual_seed(0)
    task = randomised(build_task(config, torch.device("cpu")))
    engine = build_engine(
        task.module, build_param_groups(task.module, config.optim), config, world, 1, task.block_types
    )
    batch = part(crops(counts), list(range(world.rank * micro, (world.rank + 1) * micro)))
    history = []
    for step in range(2):
        loss = task.loss(engine.forward, batch)
        engine.backward(loss)
        norm = engine.step(1e-3)
        history.append((float(all_reduce_sum(loss.detach().double())) / world.world_size, norm))
        view = batch["images"][0].numpy()[:, : 48 + 8 * world.rank]
        task.found(engine.evaluate, [view], (30, 40), counts=step != world.rank)
    return history


CASES = {
    2: [("mask_rcnn", "objects everywhere"), ("cascade", "none on the last rank"), ("boxes alone", "no object at all")],
    3: [("htc with its semantic branch", "on the first image alone"), ("mask_rcnn", "no object at all")],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", CASES)
def test_zero_3_does_not_wait_for_ranks_whose_images_hold_nothing_and_loses_what_one_process_loses(ranks):
    """And evaluates images of unequal sizes, of which some do not count."""
    overrides = {case: (*HEADS[case[0]], "engine.precision=fp32") for case in CASES[ranks]}

    def run(world):
        return {case: steps(world, (*ZERO_3, *each), 6 // ranks, COUNTS[case[1]]) for case, each in overrides.items()}

    found = run_distributed(run, ranks, timeout_sec=400)
    assert all(each == found[0] for each in found)
    for case, each in overrides.items():
        alone = steps(ONE, ("engine=local", *each), 6, COUNTS[case[1]])
        for ours, theirs in zip(found[0][case], alone, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=LOSS_RTOL), case
            assert ours[1] == pytest.approx(theirs[1], rel=NORM_RTOL), case


STAGES = {
    "zero 0": ("engine=zero0",),
    "zero 1, fused attention": ("engine=zero1", "model.attention=fused"),
    "zero 2, sequential attention": ("engine=zero2", "model.sequential_stages=[1,2]", "model.attention=reference"),
    "zero 3, recomputed": (*ZERO_3, "model.recompute=blocks"),
    "zero 1, averages of the weights": ("engine=zero1", "optim.ema_decay=0.5"),
    "zero 1, the encoder slower": ("engine=zero1", "optim.encoder_lr_scale=0.1"),
}


@pytest.mark.slow
def test_every_stage_and_policy_takes_the_steps_of_plain_torch():
    """On two ranks of three images each."""
    counts = COUNTS["none on the last rank"]

    def run(world):
        return {
            name: steps(world, (*case, *CASCADE, "engine.precision=fp32"), 3, counts) for name, case in STAGES.items()
        }

    first, second = run_distributed(run, 2, timeout_sec=400)
    assert first == second
    slower = ("optim.encoder_lr_scale=0.1",)
    alone = {each: steps(ONE, ("engine=local", *CASCADE, *each), 6, counts) for each in ((), slower)}
    assert alone[()] != alone[slower]
    for name, case in STAGES.items():
        for ours, theirs in zip(first[name], alone[slower if slower[0] in case else ()], strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=LOSS_RTOL), name
            assert ours[1] == pytest.approx(theirs[1], rel=NORM_RTOL), name


@pytest.mark.slow
def test_coordinates_stay_in_float32_under_bf16():
    """A box of 1,000 px rounded to bfloat16 would be 4 px off: what the module is given is what it computes with."""

    def run(world):
        config = composed([*DETECT, "data.shards=unused", "run_dir=x", *HTC, *ZERO_3, "engine.precision=bf16"])
        task = randomised(build_task(config, torch.device("cpu")))
        engine = build_engine(
            task.module, build_param_groups(task.module, config.optim), config, world, 1, task.block_types
        )
        batch = crops([2, 3])
        batch["boxes"] = batch["boxes"] + 0.001
        kept = []
        head = task.module.decoder.roi_head
        losses = head.losses

        def noted(pyramid, proposals, objects):
            found = losses(pyramid, proposals, objects)
            kept.append((objects.boxes, proposals.boxes, found))
            return found

        head.losses = noted
        loss = task.loss(engine.forward, batch)
        engine.backward(loss)
        engine.step(1e-3)
        (given, proposed, found), weight = kept[0], task.module.decoder.rpn_head.rpn_conv.weight
        return [torch.equal(given, batch["boxes"]), proposed.dtype, found.dtype, loss.dtype, weight.dtype]

    seen = run_distributed(run, 2, timeout_sec=120)
    assert seen[0] == seen[1] == [True, torch.float32, torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_on_other_ranks_as_planned(tmp_path, capfd):
    """From shards through the command, with stochastic depth and averages; the choice of what is learnt from, too.  And
    what the evaluate command finds of it is the same on any number of ranks: four images, each once.
    """
    shards = object_shards(tmp_path / "objects")
    common = (*ZERO_3, *CASCADE, "engine.precision=fp32", "train.max_steps=4", "train.checkpoint_every_steps=2",
              "train.keep_checkpoints=3", "optim.ema_decay=0.5", "optim.lr=1e-4")  # fmt: skip
    keys = ("train/loss", "train/grad_norm", "val/box_ap", "val/mask_ap", "val_ema/box_ap")
    for name, overrides, ranks, micro in (("same", (), 2, 3), ("others", ("model.drop_path_rate=0",), 3, 2)):
        whole = trained(tmp_path / name, shards, *common, *overrides)
        for path in (tmp_path / name / "checkpoints").glob("step_*4"):
            shutil.rmtree(path)
        again = trained(tmp_path / name, shards, *common, *overrides, ranks=ranks, micro=micro)
        for step in (3, 4):
            found, expected = ({key: line[step][key] for key in keys if key in line[step]} for line in (again, whole))
            assert len(found) == (2 if step == 3 else 5)
            assert found == (expected if ranks == 2 else pytest.approx(expected, rel=1e-3, abs=1e-6)), step
    run_dir = tmp_path / "same"
    asked = (f"run_dir={run_dir}", "task.class_names=[bus,car,tram]", "task.eval_scales=[1.0,0.75]",
             "task.eval_flip=true", "task.soft_nms=linear", "task.score_threshold=0.0")  # fmt: skip
    outs = (tmp_path / "alone", run_dir / "evaluation")
    lines = [evaluated(capfd, *asked, f"out={out}", ranks=ranks) for out, ranks in zip(outs, (1, 3), strict=True)]
    tables = [json.loads((out / "evaluation.json").read_text()) for out in outs]
    assert lines[0] == lines[1] and tables[0] == tables[1] and lines[0]["images"] == 4
    assert tables[0]["classes"] == ["bus", "car", "tram"] and sum(tables[0]["class_objects"]) == 9
    assert len(tables[0]["box_precision_at_recall"]) == 101 and (run_dir / "evaluation" / "picture.png").is_file()
    page = write_report(run_dir, curves=False).read_text()
    assert "Precision over recall, mask" in page and "right objects beside those that are found" in page
    assert "<td>tram</td>" in page and "The commonest confusions" in page


def trained(run_dir, shards, *overrides, ranks=2, micro=3):
    """What the train command writes about each step."""
    config = composed(
        [*DETECT, *shards, "log.progress=none", f"train.micro_batch_size={micro}", f"run_dir={run_dir}", *overrides]
    )
    codes = run_distributed(lambda _: guarded(lambda: train.train(config)), ranks, init=False, timeout_sec=200)
    assert codes == [0] * ranks
    return {line["step"]: line for line in read_metrics(run_dir)}
