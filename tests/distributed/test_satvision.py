"""SatVision's recipe at toy size, from tars of KEY.input.npy to weights that others take.  Real commands."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config import Config
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.models import SwinTransformerV2
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.train import train as train_run
from swinv2_train.training import loop
from swinv2_train.weights import load_weights
from swinv2_train.weights.export import ExportRequest, export
from tests.support.commands import keys_per_step
from tests.support.configs import composed
from tests.support.evaluation import evaluated
from tests.support.harness import run_distributed
from tests.support.images import npy
from tests.support.shard_files import write_plain_tar

BANDS, CLASSES, SIZE = 14, 3, 16
SATVISION = "experiment=simmim_satvision_giant_128"
SMALL = (
    "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", f"model.img_size={SIZE}",
    "model.window_size=2", "model.pretrained_window_sizes=[0,0]", "model.recompute=none", "data.nodata=[nan]",
    "model.drop_path_rate=0",  # which every rank draws for itself
    "train.loss_mean=global",  # or the mean of micro-batches' means, which ranks cut
    "train.global_batch_size=12", "train.micro_batch_size=2", "train.log_every_steps=1", "data.lanes=2",
    "train.checkpoint_every_steps=2", "data.record_keys=true", "data.num_workers=0",
    "engine.precision=fp32", "log.wandb=disabled", "log.progress=none", "runtime.num_threads=1",
    "optim.schedule.warmup_steps=1",
)  # fmt: skip
LOW = np.array([0, 0, 0, 0, 0, 223.1222, 0, 178.9174, 204.3739, 204.7677, 194.8686, 202.1759, 201.3823, 203.3537])
HIGH = np.array([*[100] * 5, 352.7182, 100, 261.292, 282.5529, 319.0373, 295.0209, 324.0677, 321.5254, 285.9848])
"""Reflectance in percent, and brightness temperatures in kelvin, by the paper."""


def arrays(count: int, seed: int, size: tuple[int, int] = (20, 24)) -> list[np.ndarray]:
    """float32 (*size, 14) each, a corner of every third not measured."""
    rng = np.random.default_rng(seed)
    found = [(LOW + (HIGH - LOW) * rng.random((*size, BANDS))).astype(np.float32) for _ in range(count)]
    for array in found[::3]:
        array[:9, :9] = np.nan
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, str]:
    """18 images to train with and 7 to evaluate, in tars as others write them."""
    folder = tmp_path_factory.mktemp("satvision")
    for name, images in (("train", arrays(18, 0)), ("val", arrays(7, 1, (SIZE, SIZE)))):
        rows = [(f"{name}{i}.input.npy", npy(image)) for i, image in enumerate(images)]
        labels = [(f"{name}{i}.cls", str(i % CLASSES).encode()) for i in range(len(images))]
        write_plain_tar(
            folder / f"{name}-000000.tar", sorted(rows + labels, key=lambda each: each[0].partition(".")[0])
        )
    return f"data.shards={folder}/train-000000.tar", f"data.eval_shards={folder}/val-000000.tar"


def start(config: Config, ranks: int, may_die: bool = False) -> None:
    codes = run_distributed(lambda world: guarded(lambda: train_run(config)), ranks, init=False, may_die=may_die)
    assert codes == [None if may_die else EXIT_DONE] * ranks


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory) -> Path:
    """A run on 2 ranks that is killed in its third step, goes on with 3 until its fourth, and with 1 to its end."""
    folder = tmp_path_factory.mktemp("pretrained")

    def config(name: str, steps: int) -> Config:
        return composed([SATVISION, *SMALL, shards[0], f"run_dir={folder / name}", f"train.max_steps={steps}"])

    start(config("plain", 6), 2)
    with pytest.MonkeyPatch.context() as patch:
        step = loop.take_step

        def dies(run: Any, *arguments: Any) -> Any:
            if run.position.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(run, *arguments)

        patch.setattr(loop, "take_step", dies)
        start(config("run", 6), 2, may_die=True)
    start(config("run", 3), 2)
    assert losses(folder / "run") == losses(folder / "plain")[:3]  # bit for bit, on as many ranks
    start(config("run", 5), 3)
    start(config("run", 6), 1)
    assert losses(folder / "run") == pytest.approx(losses(folder / "plain"), rel=1e-5)
    assert len(set(losses(folder / "run"))) == 6
    assert keys_per_step(folder / "run") == keys_per_step(folder / "plain")
    assert list((folder / "run" / "pictures").glob("*.png")) and (folder / "run" / "report.html").is_file()
    return folder / "run"


@pytest.fixture(scope="module")
def finetuned(pretrained, shards, tmp_path_factory) -> Config:
    """A classifier that began with the encoder of that run, of the same bands with the same scales."""
    data = composed([SATVISION, *SMALL, shards[0], "run_dir=r"]).data
    config = composed([
        "model=giant", "task=classify", f"task.num_classes={CLASSES}", f"task.init_from={pretrained}",
        f"model.in_chans={BANDS}", "task.rand_augment=null", "task.color_jitter=0", "data.image_member=input.npy",
        f"data.scale.factor={data.scale.factor}", f"data.scale.offset={data.scale.offset}", f"data.mean={data.mean}",
        f"data.std={data.std}", "data.dihedral=true", "data.eval_crop=squash", "data.eval_crop_pct=1.0",
        "train.max_steps=2", "engine=zero3", "train.eval_every_steps=2", *SMALL, *shards,
        f"run_dir={tmp_path_factory.mktemp('finetuned') / 'run'}",
    ])  # fmt: skip
    start(config, 2)
    return config


def inputs() -> torch.Tensor:
    """What a model is to be given of the images of evaluation, by the paper's minima and maxima: (7, 14, 16, 16)."""
    images = (np.stack(arrays(7, 1, (SIZE, SIZE))) - LOW) / (HIGH - LOW)
    return torch.from_numpy(np.nan_to_num(images)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("format", ["microsoft", "timm", "huggingface"])
def test_what_was_trained_is_exported_with_its_14_bands(format, finetuned, tmp_path):
    """The same logits from everybody's model, and as many of them right as the evaluate command says."""
    sizes = {"img_size": SIZE, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
    ours = SwinTransformerV2(**sizes, in_chans=BANDS, num_classes=CLASSES, pretrained_window_sizes=(0, 0)).eval()
    ours.load_state_dict(read_checkpoint_weights(find_checkpoint(Path(finetuned.run_dir))), strict=False)
    out = tmp_path / ("out" if format == "huggingface" else "out.safetensors")
    export(finetuned, ExportRequest(format, out))
    images = inputs()
    with torch.no_grad():
        expected = ours(images)
        if format == "timm":
            import timm

            theirs = timm.models.SwinTransformerV2(**sizes, in_chans=BANDS, num_classes=CLASSES)
            timm.models.load_checkpoint(theirs.eval(), str(out))
            found = theirs(images)
        elif format == "huggingface":
            import transformers

            theirs = transformers.AutoModelForImageClassification.from_pretrained(out)
            assert theirs.config.num_channels == BANDS
            found = theirs.eval()(images).logits
        else:
            theirs = SwinTransformerV2(
                **sizes, in_chans=BANDS, num_classes=CLASSES, pretrained_window_sizes=(0, 0)
            ).eval()
            load_weights(theirs, out)
            found = theirs(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std(0).min() > 1e-4  # the images differ for the model


def test_the_evaluate_command_sees_what_the_model_was_made_for(finetuned, capfd):
    model = SwinTransformerV2(
        img_size=SIZE, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2, in_chans=BANDS,
        num_classes=CLASSES, pretrained_window_sizes=(0, 0),
    )  # fmt: skip
    load_weights(model.eval(), find_checkpoint(Path(finetuned.run_dir)))
    labels = torch.arange(7) % CLASSES
    with torch.no_grad():
        logits = model(inputs())
    line = evaluated(capfd, f"run_dir={finetuned.run_dir}")
    assert line["images"] == 7
    assert line["val/top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert line["val/loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
