"""The k-NN vote and the linear probe against plain float64 solutions; what is refused; a run that does not notice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swinv2_train import train
from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import guarded
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.distributed import World
from swinv2_train.engine.adamw import avoid_compiler
from swinv2_train.evaluation import knn as neighbours_module
from swinv2_train.evaluation import linear_probe
from swinv2_train.evaluation.features import Labelled, hits
from swinv2_train.evaluation.knn import knn
from swinv2_train.evaluation.linear_probe import (
    classified,
    fit_logistic,
    in_tenth,
    linear,
    loss_and_gradient,
    standardise_,
)
from swinv2_train.evaluation.probe import check_probe, open_probe
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.evaluation import evaluated, make_images, write_images
from tests.support.harness import run_distributed
from tests.support.one_rank import ONE

avoid_compiler()  # as every engine and the evaluate command do, for L-BFGS would import torch._dynamo

CLASSES = 7


def nothing() -> None: ...


def blobs(count: int, seed: int, spread: float = 1.0, dims: int = 12) -> Labelled:
    """Noise around a point for each class, the points the same for all seeds."""
    points = torch.randn(CLASSES, dims, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, dims, generator=generator)
    return Labelled(points[labels] + spread * noise, labels, torch.arange(count))


# --------------------------------------------------------------------------------------------------------------------
# k-NN


def plain_knn(training: Labelled, testing: Labelled, neighbours: int, temperature: float) -> list[float]:
    """Every query on its own, in float64; neighbours by similarity, then class; classes by votes, then number."""
    first = five = 0
    bank = training.features.double().numpy()
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for query, label in zip(testing.features.double().numpy(), testing.labels.tolist(), strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        pairs = sorted(zip((-similarity).round(7).tolist(), training.labels.tolist(), similarity.tolist(), strict=True))
        votes: dict[int, float] = {}
        for _, neighbour, near in pairs[:neighbours]:
            votes[neighbour] = votes.get(neighbour, 0.0) + math.exp(near / temperature)
        order = sorted(votes, key=lambda number: (-votes[number], number))
        first += order[0] == label
        five += label in order[:5]
    return [100 * first / len(testing), 100 * five / len(testing)]


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (200, 0.02), (999, 0.5)])
def test_knn_is_the_plain_vote_whatever_the_blocks(neighbours, temperature, monkeypatch):
    """Blocks bound the memory and must change nothing; with few votes some classes are in no top-5."""
    training, testing = blobs(300, 1, 3.0), blobs(150, 2, 3.0)
    expected = plain_knn(training, testing, neighbours, temperature)
    assert 25 < expected[0] < 95 and expected[1] < 100
    for queries, rows in ((1024, 8192), (64, 17), (1, 299)):
        monkeypatch.setattr(neighbours_module, "QUERIES", queries)
        monkeypatch.setattr(neighbours_module, "ROWS", rows)
        assert knn(training, testing, CLASSES, neighbours, temperature, ONE, nothing) == pytest.approx(expected)


def test_of_equally_similar_images_those_of_lower_classes_vote():
    """Six equal images of classes 5 to 0 and two neighbours: 0 and 1 vote, and 0 is first."""
    training = Labelled(torch.ones(6, 4), torch.tensor([5, 4, 3, 2, 1, 0]), torch.arange(6))
    for label, expected in ((0, [100, 100]), (1, [0, 100]), (2, [0, 0])):
        testing = Labelled(torch.full((1, 4), 3.0), torch.tensor([label]), torch.arange(1))
        assert knn(training, testing, 6, 2, 0.07, ONE, nothing) == expected


def test_near_neighbours_outvote_many_far_ones_at_a_low_temperature():
    """One image at similarity 1 against four at 0.6: exp(0.4 / T) against 4."""
    features = torch.tensor([[1.0, 0.0]] + [[0.6, 0.8]] * 4)
    training = Labelled(features, torch.tensor([1, 0, 0, 0, 0]), torch.arange(5))
    testing = Labelled(torch.tensor([[2.0, 0.0]]), torch.tensor([1]), torch.arange(1))
    assert knn(training, testing, 2, 5, 0.2, ONE, nothing)[0] == 100
    assert knn(training, testing, 2, 5, 0.4, ONE, nothing)[0] == 0
    assert knn(training, testing, 2, 5, 1e-4, ONE, nothing)[0] == 100  # exp(1 / T) itself would overflow


def test_hits_of_equal_scores_go_to_the_lower_class():
    scores = torch.tensor([[1.0, 3, 3, 2, 0, -1, -math.inf]] * 7)
    first, five = ([float(hits(scores[:1], torch.tensor([label]))[part]) for label in range(7)] for part in (0, 1))
    assert first == [0, 1, 0, 0, 0, 0, 0]
    assert five == [1, 1, 1, 1, 1, 0, 0]


# --------------------------------------------------------------------------------------------------------------------
# The linear probe


def newton(features: Tensor, labels: Tensor, counts: Tensor, strength: float) -> np.ndarray:
    """The minimum by Newton's method on the whole Hessian, float64: (C + 1, classes)."""
    x = np.concatenate([features.double().numpy(), np.ones((len(features), 1))], axis=1)
    wanted = np.eye(CLASSES)[labels.numpy()]
    counted = counts.double().numpy() / float(counts.sum())
    dims = x.shape[1]
    penalty = np.diag([strength] * (dims - 1) + [0.0])
    theta = np.zeros((dims, CLASSES))
    for _ in range(30):
        logits = x @ theta
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = x.T @ ((p - wanted) * counted[:, None]) + penalty @ theta
        hessian = np.zeros((dims, CLASSES, dims, CLASSES))
        for a in range(CLASSES):
            for b in range(CLASSES):
                slope = counted * p[:, a] * ((a == b) - p[:, b])
                hessian[:, a, :, b] = x.T @ (x * slope[:, None]) + (a == b) * penalty
        size = dims * CLASSES
        # the biases are known up to a common number, so the Hessian is singular
        step = np.linalg.lstsq(hessian.reshape(size, size), gradient.reshape(size), rcond=1e-12)[0]
        theta -= step.reshape(dims, CLASSES)
    assert np.abs(gradient).max() < 1e-12
    return theta


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_the_fit_is_the_minimum_that_newtons_method_finds(strength):
    """Samples that do not count are as if they were not there."""
    samples = blobs(400, 3)
    counts = (torch.arange(400) % 5 > 0).float()
    found = fit_logistic(torch.zeros(13, CLASSES, dtype=torch.float64), samples, counts, strength, 300, ONE, nothing)
    expected = torch.from_numpy(newton(samples.features, samples.labels, counts, strength))
    least, _ = loss_and_gradient(expected, samples, counts, strength, 320, ONE.device)
    loss, _ = loss_and_gradient(found, samples, counts, strength, 320, ONE.device)
    assert float(loss - least) < 1e-6  # measured worst 2.4e-8, of losses from 0.026 to 1.34
    p, q = ((samples.features.double() @ theta[:-1] + theta[-1]).softmax(dim=1) for theta in (found, expected))
    assert float((p - q).abs().max()) < 2e-2  # measured worst 3.5e-3 at the weakest strength, else 2.2e-4


def test_loss_and_gradient_are_autograds_in_any_blocks(monkeypatch):
    samples, counts = blobs(50, 4), torch.rand(50)
    theta = torch.randn(13, CLASSES, dtype=torch.float64, requires_grad=True)
    logits = samples.features.double() @ theta[:-1] + theta[-1]
    losses = torch.nn.functional.cross_entropy(logits, samples.labels, reduction="none")
    expected = (losses * counts).sum() / 40 + 0.3 / 2 * theta[:-1].square().sum()
    expected.backward()
    for elements in (2**24, 12 * 7):
        monkeypatch.setattr(linear_probe, "ELEMENTS", elements)
        loss, gradient = loss_and_gradient(theta.detach(), samples, counts, 0.3, 40.0, ONE.device)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(gradient, theta.grad, rtol=1e-5, atol=1e-6)


def test_separable_classes_are_all_found_and_features_scales_do_not_matter():
    """Features that differ in scale by 10^5, far from 0, and one that is constant."""
    scores = []
    for scale, offset in ((torch.ones(12), 0.0), (torch.logspace(-3, 2, 12), 50.0)):
        shares = [
            replace(own, features=torch.cat([(own.features + offset) * scale, torch.full((len(own), 1), 0.3)], dim=1))
            for own in (blobs(300, 5, 0.1), blobs(200, 6, 0.1))
        ]  # fmt: skip
        scores.append(linear(*shares, CLASSES, ONE, nothing))
    assert scores == [[100, 100], [100, 100]]


def test_the_strength_is_chosen_on_the_tenth_that_is_held_out(monkeypatch):
    """100 features of noise and 400 images: the weakest penalty overfits, which the fitted images do not show."""

    def noisy(count: int, seed: int) -> Labelled:
        plain = blobs(count, seed, 2.0)
        noise = torch.randn(count, 100, generator=torch.Generator().manual_seed(seed + 100))
        return Labelled(torch.cat([plain.features, noise], dim=1), plain.labels, plain.positions)

    def score(*strengths: float) -> float:
        monkeypatch.setattr(linear_probe, "STRENGTHS", strengths)
        return linear(noisy(400, 7), noisy(1000, 8), CLASSES, ONE, nothing)[0]

    weak, chosen = score(1e-5), score(1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
    assert chosen > weak + 5, (weak, chosen)  # 55.8 and 45.5


def test_the_tenth_is_a_function_of_the_position_alone():
    """Whatever share of the samples a rank has; pinned, because another tenth is another score."""
    whole = in_tenth(torch.arange(100_000))
    assert whole.float().mean() == pytest.approx(0.1, abs=0.003)
    assert torch.equal(in_tenth(torch.arange(5, 100_000, 7)), whole[5::7])
    assert whole[:60].nonzero().flatten().tolist() == [2, 18, 29, 30, 31, 43]
    for period in (2, 10, 1000):  # sorted or interleaved classes are all represented
        assert whole[::period].float().mean() == pytest.approx(0.1, abs=0.04)


def test_standardised_features_have_mean_0_and_variance_1_over_those_to_learn_from():
    training, testing = blobs(200, 9), blobs(100, 10)
    mean, std = training.features.mean(dim=0), training.features.std(dim=0, correction=0)
    expected = (testing.features - mean) / std
    standardise_([training, testing])
    torch.testing.assert_close(testing.features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(training.features.mean(dim=0), torch.zeros(12), rtol=0, atol=1e-6)
    assert classified(torch.zeros(13, CLASSES, dtype=torch.float64), training, torch.zeros(200), ONE.device).sum() == 0


# --------------------------------------------------------------------------------------------------------------------
# Features


def test_features_are_the_pooled_normed_last_map():
    """Features are the same of an encoder, of a classifier and inside SimMIM; 8C channels with four stages; float32
    of bf16.
    """
    sizes: dict[str, Any] = {
        "img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 2,
        "patch_size": 2, "drop_path_rate": 0.0,
    }  # fmt: skip
    classifier = SwinTransformerV2(num_classes=5, **sizes).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder = SwinTransformerV2(num_classes=0, **sizes).eval()
    encoder.load_state_dict({k: v for k, v in classifier.state_dict().items() if not k.startswith("head.")})
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = encoder.forward_features(images)[-1].mean(dim=(2, 3))
        assert expected.shape == (3, 64) and expected.std() > 0.1
        assert torch.equal(classifier(images, features=True), expected)
        assert torch.equal(encoder(images), expected)
        simmim = SimMIM(encoder, encoder_stride=16)
        assert torch.equal(simmim(images)["features"], expected) and list(simmim(images)) == ["features"]
        rounded = simmim.bfloat16()(images)["features"]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.1)


# --------------------------------------------------------------------------------------------------------------------
# A run


SMALL = (
    "model=demo", "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", "model.img_size=16",
    "model.window_size=2", "data=cifar10", "train.global_batch_size=8", "train.micro_batch_size=4",
    "train.log_every_steps=1", "train.picture_every_steps=100", "log.wandb=disabled", "log.progress=none",
    "engine=local", "engine.precision=fp32", "runtime.num_threads=1", "optim.schedule.warmup_epochs=0",
    "model.drop_path_rate=0.3", "optim.lr=1e-2",
)  # fmt: skip
SIMMIM = ("task=simmim", "task.mask_unit_px=4", "task.mask_ratio=0.5")
PLAIN = ("task.rand_augment=null", "task.erasing_prob=0", "task.mixup_alpha=0", "task.cutmix_alpha=0")
PROBES = "probe.methods=[knn,linear]"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    """Patterns of 30 unlabelled and 30 labelled training images and 13 of evaluation, of 3 colours."""
    folder = tmp_path_factory.mktemp("shards")

    def write(name: str, count: int, seed: int, labelled: bool = True) -> str:
        images = make_images(count, seed) // 4
        for number in range(count):
            images[number, :, :, number % 3] += 60
        return write_images(folder, name, images, [number % 3 if labelled else None for number in range(count)])

    return {
        "unlabelled": write("unlabelled", 30, 1, labelled=False),
        "labelled": write("labelled", 30, 2),
        "test": write("test", 13, 3),
    }


def compose(*overrides: str) -> Config:
    """A SimMIM run unless the task is given."""
    return composed([*(SIMMIM if "task=classify" not in overrides else ()), *SMALL, *overrides])


def run_alone(*configs: Config) -> list[int]:
    """train() of each in one process of its own; the exit codes."""

    def command(world: World) -> list[int]:
        found = []
        for config in configs:
            found.append(guarded(lambda config=config: train.train(config)))
        return found

    return run_distributed(command, 1, init=False)[0]


@pytest.mark.slow
def test_a_run_with_probes_takes_the_steps_of_one_without(shards, tmp_path, capfd):
    """Losses bit for bit and images in their order; drop path and masks draw random numbers; workers are there too."""
    common = (
        f"data.shards={shards['unlabelled']}", f"data.eval_shards={shards['test']}", "train.max_steps=7",
        "train.eval_every_steps=3", "data.record_keys=true", "data.num_workers=1",
    )  # fmt: skip
    probes = (PROBES, "probe.every_steps=2", f"probe.shards={shards['labelled']}", "train.keep_best=probe/knn_top1")
    plain = compose(*common, f"run_dir={tmp_path / 'plain'}")
    probed = compose(*common, *probes, f"run_dir={tmp_path / 'probed'}")
    assert run_alone(plain) == run_alone(probed) == [0]
    lines = {name: {line["step"]: line for line in read_metrics(tmp_path / name)} for name in ("plain", "probed")}
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        with_probes, without = ([line.get(name) for line in lines[run].values()] for run in ("probed", "plain"))
        assert with_probes == without and len(set(without)) > 2, name
    keys = [(tmp_path / run / "sample_keys" / "rank_00000.jsonl").read_text() for run in ("plain", "probed")]
    assert keys[0] == keys[1]
    # both schedules meet at step 6; the last step has everything
    names = {"probe/knn_top1", "probe/knn_top5", "probe/linear_top1", "probe/linear_top5"}
    assert [step for step, line in lines["probed"].items() if names <= line.keys()] == [2, 4, 6, 7]
    assert [step for step, line in lines["probed"].items() if "val/loss" in line] == [3, 6, 7]
    assert not any(names & line.keys() for line in lines["plain"].values())
    assert all(line[name] == 100 for line in lines["probed"].values() for name in names & line.keys() if "top5" in name)
    assert capfd.readouterr().out.count("probe/knn_top1") == 4
    check_evaluation(capfd, f"run_dir={tmp_path / 'probed'}", lines["probed"][7])


def check_evaluation(capfd: Any, run_dir: str, last: dict[str, Any]) -> None:
    """The evaluate command measures at the last checkpoint what the run did."""
    line = evaluated(capfd, run_dir)
    probed = {name: value for name, value in last.items() if name.startswith("probe/")}
    assert probed and {name: line[name] for name in probed} == probed


@pytest.mark.slow
def test_a_classifier_is_probed_before_its_head(shards, tmp_path, capfd):
    """Colours are found by an encoder that has learned nothing; the best checkpoint is known by the probe's score."""
    config = compose(
        "task=classify", "task.num_classes=3", f"data.shards={shards['labelled']}", PROBES, "probe.every_steps=1",
        f"data.eval_shards={shards['test']}", "train.max_steps=2", "train.keep_best=probe/linear_top1", "optim.lr=0",
        f"run_dir={tmp_path / 'run'}", *PLAIN,
    )  # fmt: skip
    assert run_alone(config) == [0]
    first, last = (line for line in read_metrics(tmp_path / "run"))
    assert last["probe/linear_top1"] == 100 > last["val/top1"]
    assert first["probe/linear_top1"] == 100
    for step in (1, 2):
        state = json.loads((tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
        assert state["best"] == {"metric": "probe/linear_top1", "value": 100}
    check_evaluation(capfd, f"run_dir={tmp_path / 'run'}", last)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("probe.every_steps=5",), r"probe.every_steps \(5\) is given, but probe.methods is empty; set probe.methods="),
        ((PROBES,), r"probe.methods \(knn,linear\) needs .* probe.eval_shards and data.eval_shards have no value; set"),
        ((PROBES, "data.eval_shards=a.tar", "data.shards='pipe:cat a.tar'", "optim.schedule.warmup_steps=0"),
         r"data.shards \(pipe:.*probe.shards=PATTERN"),
        ((PROBES, "probe.eval_shards='pipe:cat a.tar'"), r"probe.eval_shards \(pipe:cat a.tar\) is a pipe"),
        (("probe.methods=[knn]", "train.keep_best=probe/linear_top1", "data.eval_shards=a.tar"),
         r"train.keep_best \(probe/linear_top1\) needs probe.methods=\[linear\]; set it"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_kept_is_refused_before_anything_starts(overrides, message):
    config = compose("data.shards=a.tar", "train.max_steps=5", "run_dir=unused", "data.eval_shards=null", *overrides)
    with pytest.raises(ConfigError, match=message):
        check_probe(config, training=True)


def test_an_evaluation_does_not_look_at_the_runs_schedule():
    """A run with probe.every_steps may be evaluated without probes."""
    config = compose("data.shards=a.tar", "run_dir=unused", "probe.every_steps=5", "train.keep_best=probe/knn_top1")
    check_probe(config, training=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("probe.method=[knn]",), "probe.methods"),
        (("probe.methods=[svm]",), r"probe.methods \(svm\) is none of knn, linear"),
        (("train.keep_best=probe/svm_top1",), r"train.keep_best \(probe/svm_top1\) is none of .*, probe/knn_top1"),
        (("probe.knn_temperature=0",), r"probe.knn_temperature \(0.0\) must be more than 0"),
    ],
)
def test_unknown_names_are_refused_by_the_gate(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose("data.shards=a.tar", "run_dir=unused", *overrides)


def test_images_without_labels_are_refused_before_the_run_directory_is_made(shards, tmp_path, capfd):
    """SimMIM's own images often have none: the message names the key that takes labelled ones."""
    base = (f"data.eval_shards={shards['test']}", "train.max_steps=1", PROBES, f"run_dir={tmp_path / 'run'}")
    assert run_alone(compose(*base, f"data.shards={shards['unlabelled']}")) == [2]
    said = capfd.readouterr().err
    assert "data.shards: 30 of 30 samples have no readable label" in said and "probe.shards=PATTERN" in said
    assert not (tmp_path / "run").exists()
    config = compose(*base, f"data.shards={shards['labelled']}", f"probe.eval_shards={shards['unlabelled']}")
    with pytest.raises(ConfigError, match="probe.eval_shards: 30 of 30 .*name some by probe.eval_shards=PATTERN"):
        open_probe(config, {})
    config = compose(*base, "data.shards=gone.tar")
    with pytest.raises(ConfigError, match=r"data.shards names 'gone.tar'.*\(probe.methods needs labelled images"):
        open_probe(config, {})
    known = {shards["labelled"]: open_manifest(shards["labelled"])}
    config = compose(*base, f"data.shards={shards['labelled']}")
    assert open_probe(config, known)[0] is known[shards["labelled"]]  # not read again
