"""A run with LoRA behind every command: what they say is what its module with adapters computes, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import swinv2_train as s2
from swinv2_train import embed, evaluate, look, predict, replay, train
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED
from swinv2_train.export import parse
from swinv2_train.export import run as export
from swinv2_train.models.lora import is_adapter, merged_weight
from swinv2_train.training.lora import build_trained_task
from swinv2_train.weights import read_weights
from tests.support.configs import composed
from tests.support.evaluation import MEAN, STD, make_images
from tests.support.harness import run_distributed
from tests.support.small_run import SMALL, run_alone

pytestmark = pytest.mark.slow

RANK, ALPHA, DECAY = 3, 7.0, 0.5
IMAGES = make_images(5, seed=2)
ATOL = 1e-5  # measured worst 3e-7; without the adapters 1e-2


class Trained(NamedTuple):
    """A run with adapters, and what plain torch makes of its checkpoint."""

    run_dir: Path
    base: Path
    """The run that it began with."""
    module: Any
    """With the adapters in it."""
    images: str
    """A folder of IMAGES by their numbers, below the folders of their classes."""

    def logits(self, **more: bool) -> Tensor:
        """Of IMAGES, (5, 4)."""
        pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            return self.module((pixels - MEAN) / STD, **more)


def words_of(run_dir: Path, shards: tuple[str, str], *more: str) -> list[str]:
    return [
        "task=classify", "data=cifar10", "model=demo", "task.num_classes=4", *SMALL, *shards, f"run_dir={run_dir}",
        "train.epochs=null", "optim.schedule.name=constant", "optim.schedule.warmup_epochs=0", "optim.lr=0.02",
        "data.num_workers=0", "train.checkpoint_every_steps=1", "train.keep_checkpoints=9", *more,
    ]  # fmt: skip


LORA = (f"optim.lora.rank={RANK}", f"optim.lora.alpha={ALPHA}")


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("lora")
    base, run_dir = folder / "base", folder / "run"
    assert run_alone(composed(words_of(base, shards, "train.max_steps=2"))) == EXIT_DONE
    more = (*LORA, f"task.init_from={base}", f"optim.ema_decay={DECAY}", "train.max_steps=4")
    config = composed(words_of(run_dir, shards, *more))
    assert run_alone(config) == EXIT_DONE
    module = build_trained_task(config, torch.device("cpu")).module
    module.load_state_dict(dict(read_checkpoint_weights(find_checkpoint(run_dir))))
    for number, image in enumerate(IMAGES):
        path = folder / "images" / str(number % 4) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return Trained(run_dir, base, module.eval(), str(folder / "images"))


def ordered(folder: str) -> list[int]:
    """The numbers of the images, in the order of the folder."""
    return [int(path.stem) for path in sorted(Path(folder).rglob("*.png"), key=str)]


def called(command: Any, *words: str) -> Any:
    config, request = command.parse(list(words))
    call = getattr(command, command.__name__.rpartition(".")[2])
    return run_distributed(lambda world: call(config, request), 1, init=False)[0]


def test_predict_embed_evaluate_and_look_say_what_the_adapted_module_computes(trained, tmp_path, capfd):
    logits, run = trained.logits(), f"run_dir={trained.run_dir}"
    expected, order = logits.softmax(dim=1).numpy(), ordered(trained.images)
    base = s2.load(trained.base)
    images = [IMAGES[number] for number in order]
    others = np.array([base.predict(image, top_k=4).probabilities[0] for image in images])
    assert np.abs(others - expected[order].max(axis=1)).max() > 100 * ATOL, "the base says something else"

    called(predict, run, f"images={trained.images}", f"out={tmp_path / 'a.jsonl'}", "top_k=4")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for row, number in zip(rows, order, strict=True):
        assert row["probabilities"] == pytest.approx(expected[number][row["classes"]], abs=ATOL)
    loaded = s2.load(trained.run_dir)
    for number, answer in zip(order, loaded.predict(images, top_k=4), strict=True):
        assert answer.probabilities == pytest.approx(expected[number][list(answer.classes)], abs=ATOL)

    called(embed, run, f"images={trained.images}", f"out={tmp_path / 'f'}", "queries=0")
    features = trained.logits(features=True).numpy()[order]
    np.testing.assert_allclose(np.load(tmp_path / "f" / "pooled.npy"), features, atol=ATOL)
    np.testing.assert_allclose(loaded.features(images).numpy(), features, atol=ATOL)

    scores = called(evaluate, run, f"data.eval_shards={trained.images}", "data.eval_crop_pct=1")
    labels = torch.tensor([number % 4 for number in range(len(IMAGES))])
    assert scores["val/loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert scores["val/top1"] == pytest.approx(100 * float((logits.argmax(dim=1) == labels).float().mean()))

    called(look, run, f"images={trained.images}", f"out={tmp_path / 'look.html'}", "neighbours=2")
    page = (tmp_path / "look.html").read_text()
    said = re.findall(r"(\d): (\d+\.\d) % \(stage", page)
    assert {(int(c), float(p)) for c, p in said} == {
        (int(row.argmax()), round(100 * float(row.max()), 1)) for row in expected
    }  # fmt: skip

    export(*parse([run, "format=microsoft", f"out={tmp_path / 'merged.pth'}"]))
    capfd.readouterr()
    merged = f"weights={tmp_path / 'merged.pth'}"
    again = called(evaluate, run, merged, f"data.eval_shards={trained.images}", "data.eval_crop_pct=1")
    assert again["val/loss"] == scores["val/loss"]
    called(predict, run, merged, f"images={trained.images}", f"out={tmp_path / 'b.jsonl'}", "top_k=4")
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()


def test_exports_of_every_kind_hold_the_merged_weights(trained, tmp_path):
    """Adapters are added before names are converted: transformers keeps qkv in three parts, timm and ours in one."""
    own = read_weights(trained.run_dir)
    for format, out in (("huggingface", "hf"), ("timm", "timm.safetensors"), ("microsoft", "m.pth")):
        export(*parse([f"run_dir={trained.run_dir}", f"format={format}", f"out={tmp_path / out}"]))
        written = read_weights(tmp_path / out)
        assert set(written) == set(own) and not any(map(is_adapter, written))
        assert all(torch.equal(written[name], own[name]) for name in own), format
    assert "LoRA: rank 3, alpha 7, on `qkv`" in (tmp_path / "hf" / "README.md").read_text()
    out = tmp_path / "m.pt2"
    export(*parse([f"run_dir={trained.run_dir}", "format=torch_export", f"out={out}"]))
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255
    said = torch.export.load(out).module()((pixels - MEAN) / STD)
    torch.testing.assert_close(said, trained.logits(), rtol=0, atol=1e-4)


def test_averages_are_those_of_the_adapters_and_are_merged_with_each_other(trained):
    """Recomputed from every step's checkpoint; the base has none but itself."""
    steps = [trained.run_dir / "checkpoints" / f"step_{step:08d}" for step in range(1, 5)]
    first = read_checkpoint_weights(steps[0])
    average = dict(read_checkpoint_weights(steps[0], averaged=True))
    for step in steps[1:]:
        for name, value in read_checkpoint_weights(step).items():
            average[name] = DECAY * average[name] + (1 - DECAY) * value
    found = read_checkpoint_weights(steps[-1], averaged=True)
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        trained_here = is_adapter(name) or name.startswith("head.")
        assert trained_here or torch.equal(value, first[name]), name
    merged = read_weights(trained.run_dir, averaged=True)
    layer = "layers.0.blocks.0.attn.qkv"
    a, b = average[f"{layer}.lora_A"], average[f"{layer}.lora_B"]
    expected = merged_weight(average[f"{layer}.weight"], a, b, ALPHA / RANK)
    torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=0, atol=1e-6)
    plain = read_weights(trained.run_dir)[f"{layer}.weight"]
    assert (plain - expected).abs().max() > 1e-4
    loaded = s2.load(trained.run_dir, ema=True).module.state_dict()
    assert all(torch.equal(loaded[name], merged[name]) for name in loaded)


def test_a_run_may_start_from_one_with_adapters_of_other_sizes(trained, shards, tmp_path):
    """From its merged weights, with or without adapters of its own."""
    still = ("optim.lr=0", "train.max_steps=1", f"task.init_from={trained.run_dir}")
    own = read_weights(trained.run_dir)
    for name, more in (("full", ()), ("again", ("optim.lora.rank=1", "optim.lora.targets=[fc1]"))):
        assert run_alone(composed(words_of(tmp_path / name, shards, *still, *more))) == EXIT_DONE
        found = read_weights(tmp_path / name)
        assert all(torch.equal(found[key], own[key]) for key in own), name


def test_a_bad_step_of_a_run_with_adapters_is_repeated(trained, shards, tmp_path):
    """The first step leaves adapters beyond all bounds; the second one overflows in a layer that has one."""
    more = (*LORA, f"task.init_from={trained.base}", "train.max_steps=3", "optim.lr=1e30")
    config = composed(words_of(tmp_path / "run", shards, *more))
    assert run_distributed(lambda world: train.train(config), 1, init=False) == [EXIT_FAILED]
    before = read_checkpoint_weights(find_checkpoint(tmp_path / "run"))
    lines = run_distributed(lambda world: replay.replay(config, None), 1, init=False)[0]
    assert lines[-1].startswith("step 2 here: not finite again ("), lines
    assert "the output of layers.0.blocks.0." in lines[1] or "the output of head" in lines[1], lines
    kept = read_checkpoint_weights(tmp_path / "run" / "bad_steps" / "checkpoints" / "step_00000001")
    assert set(kept) == set(before) and any(map(is_adapter, kept))
    assert all(torch.equal(kept[name], before[name]) for name in before)
