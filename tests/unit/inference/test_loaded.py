"""swinv2_train.load: a model in a program answers as the commands do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import swinv2_train
from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import load_run_config
from swinv2_train.evaluate import EvaluateRequest, evaluate
from swinv2_train.inference.pixels import pixels
from swinv2_train.models import swin_v2
from swinv2_train.weights import save_weights
from swinv2_train.weights.huggingface import Preprocessing
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.small_run import SMALL, run_alone

CLASSES = ("ant", "bee", "cat")


def make_pictures(folder: Path, each: int) -> list[Path]:
    rng = np.random.default_rng(each)
    paths = []
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 60, (20, 24, 3)) + 90 * (np.arange(3) == number)
            paths.append(folder / name / f"{i}.png")
            Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, paths of 12 test images, evaluate's line of them)."""
    folder = tmp_path_factory.mktemp("loaded")
    make_pictures(folder / "train", 8)
    paths = make_pictures(folder / "test", 4)
    config = composed([
        "experiment=cifar10_finetune", *SMALL, f"run_dir={folder / 'run'}", f"data.shards={folder / 'train'}",
        f"data.eval_shards={folder / 'test'}", "task.init_from=null", "task.num_classes=3", "train.max_steps=4",
        "data.num_workers=0",
    ])  # fmt: skip
    assert run_alone(config) == 0
    line = run_distributed(lambda world: evaluate(config, EvaluateRequest()), 1, init=False)[0]
    return folder / "run", paths, line


def test_a_runs_answers_are_those_that_evaluate_scores(trained):
    run_dir, paths, line = trained
    model = swinv2_train.load(run_dir, device="cpu")
    answers = model.predict(paths, batch_size=5)
    right = [answer.label == path.parent.name for answer, path in zip(answers, paths, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(line["val/top1"])
    losses = [
        -np.log(answer.probabilities[answer.labels.index(path.parent.name)])
        for answer, path in zip(answers, paths, strict=True)
    ]
    assert np.mean(losses) == pytest.approx(line["val/loss"], abs=1e-5)
    assert model.classes == CLASSES and sum(answers[0].probabilities) == pytest.approx(1, abs=1e-6)
    assert [len(answer.classes) for answer in model.predict(paths[:2], top_k=2)] == [2, 2]


def test_mirrored_and_enlarged_crops_are_averaged_by_answers_and_scores_alike(trained):
    """The views by hand: the crop of a larger image is that of a smaller share of it."""
    run_dir, paths, _ = trained
    views = ("task.eval_flip=true", "task.eval_scales=[1.0,1.3]")
    found = swinv2_train.load(run_dir, *views, device="cpu").predict(paths, top_k=3)
    total = np.zeros((len(paths), 3))
    for scale in (1.0, 1.3):
        model = swinv2_train.load(run_dir, f"data.eval_crop_pct={1 / scale}", device="cpu")
        for mirrored in (False, True):
            cut = [model.transform(pixels(path, None), {}, None)["images"] for path in paths]
            images = model.task.normalise(torch.stack([each.flip(-1) if mirrored else each for each in cut]))
            with torch.no_grad():
                total += model.module(images).double().softmax(dim=1).numpy() / 4
    for answer, row in zip(found, total, strict=True):
        assert answer.probabilities == pytest.approx(np.sort(row)[::-1].tolist(), abs=1e-6)
    config = load_run_config(run_dir, views)
    line = run_distributed(lambda world: evaluate(config, EvaluateRequest()), 1, init=False)[0]
    right = [CLASSES.index(path.parent.name) for path in paths]
    assert line["val/top1"] == pytest.approx(100 * np.mean(total.argmax(axis=1) == right))
    assert line["val/loss"] == pytest.approx(-np.log(total[range(len(paths)), right]).mean(), abs=1e-5)


def test_one_picture_has_one_answer_however_it_is_held(trained):
    run_dir, paths, _ = trained
    model = swinv2_train.load(next((run_dir / "checkpoints").glob("step_*")), device="cpu")
    picture = Image.open(paths[0])
    array = np.asarray(picture)
    forms = [paths[0], str(paths[0]), paths[0].read_bytes(), picture, array, torch.tensor(array).permute(2, 0, 1)]
    first = model.predict(forms[0])
    assert all(model.predict(form) == first for form in forms)
    features = model.features(forms)
    assert features.shape == (6, 16) and features.dtype == torch.float32
    assert torch.allclose(features, model.features(paths[0]).expand(6, -1), atol=1e-6)
    grey = model.features([array[..., 0], array[..., :1].repeat(3, axis=2)])
    assert torch.equal(grey[0], grey[1])
    assert model.predict([]) == [] and model.features([]).shape == (0, 16)


def test_what_cannot_be_answered_says_why(trained, tmp_path):
    run_dir, paths, _ = trained
    model = swinv2_train.load(run_dir, device="cpu")
    (tmp_path / "half.png").write_bytes(paths[0].read_bytes()[:200])
    wrong = [
        (tmp_path / "absent.png", "absent.png: No such file"),
        (tmp_path / "half.png", "half.png: "),
        (np.zeros((8, 8, 3), np.float32), "a photograph is uint8"),
        (np.zeros((8, 8, 4), np.uint8), "a photograph is uint8"),
    ]
    for image, message in wrong:
        with pytest.raises(ConfigError, match=message):
            model.predict([paths[0], image])
    with pytest.raises(ConfigError, match="top_k"):
        model.predict(paths[0], top_k=0)
    with pytest.raises(ConfigError, match="no config.yaml|no weights|cannot be|is no"):
        swinv2_train.load(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swinv2_tiny_patch4_window8_64.pth", "directory", "unnamed.safetensors"])
def test_other_weights_say_what_they_can_and_ask_for_the_rest(name, tmp_path):
    model = swin_v2("tiny", num_classes=5, img_size=64, window_size=8).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    if name == "directory":
        how = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64), 0.5, False, "bilinear")
        save_weights(model, tmp_path / name, "huggingface", preprocessing=how, classes=["a", "b"])
    else:
        save_weights(model, tmp_path / name, "microsoft")
    given = ()
    if name == "unnamed.safetensors":
        with pytest.raises(ConfigError, match="does not say its model.window_size"):
            swinv2_train.load(tmp_path / name)
        given = ("model.window_size=8", "model.img_size=64")
    loaded = swinv2_train.load(tmp_path / name, *given, device="cpu")
    data = loaded.config.data
    if name == "directory":
        assert (data.mean, data.eval_crop_pct, data.interpolation) == ([0.1, 0.2, 0.3], 0.5, "bilinear")
        assert loaded.classes == ("a", "b")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    answer = swinv2_train.load(tmp_path / name, *given, "data.eval_crop_pct=1.0", device="cpu").predict(pixels)
    normalised = (torch.tensor(pixels) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    with torch.no_grad():
        expected = model(normalised.permute(2, 0, 1)[None]).softmax(dim=1)[0]
    assert answer.probabilities == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
    assert answer.labels[0] == (["a", "b", "2", "3", "4"] if loaded.classes else list("01234"))[int(expected.argmax())]


def test_a_deep_grey_image_of_pillows_is_the_one_of_its_file(tmp_path):
    """Pillow's own conversion to RGB clips 16 bits: every pixel above 255 was white."""
    values = np.random.default_rng(0).integers(0, 2**16, (8, 9), dtype=np.uint16)
    image = Image.fromarray(values)
    image.save(tmp_path / "deep.png")
    assert image.mode == "I;16"
    assert torch.equal(pixels(image, None), pixels(tmp_path / "deep.png", None))
    assert torch.equal(pixels(image, None)[0], torch.from_numpy((values >> 8).astype(np.uint8)))


@pytest.mark.parametrize("image", [None, 5, Image.new("I", (8, 8)), Image.new("F", (8, 8))])
def test_what_is_no_image_is_told(image):
    with pytest.raises(ConfigError, match="an image is a path|no defined black and white"):
        pixels(image, None)


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"a.png is no regular file"):
        pixels(tmp_path / "a.png", None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(("seed=1", "seed=2"), "seed is given twice"), (("hydra.run.dir=x",), "Hydra's own"), (("seed",), "no KEY=VALUE")],
)
def test_overrides_are_a_command_lines(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        swinv2_train.load(tmp_path, *overrides)


@pytest.mark.slow
def test_values_of_bands_are_looked_at_as_files_are(tmp_path):
    """Arrays go through the decoder of files: bands are chosen, and what was not measured is known."""
    model = swin_v2("tiny", num_classes=2, img_size=32, window_size=4, in_chans=2).eval()
    save_weights(model, tmp_path / "w.pth", "microsoft")
    keys = (
        "model.window_size=4", "model.img_size=32", "data.bands=[3,0]", "data.mean=[1.0,2.0]", "data.std=[2.0,3.0]",
        "data.nodata=[-1]", "data.eval_crop_pct=1.0",
    )  # fmt: skip
    loaded = swinv2_train.load(tmp_path / "w.pth", *keys, device="cpu")
    values = np.random.default_rng(1).normal(2, 3, (32, 32, 4)).astype(np.float32)
    values[:5] = -1
    np.save(tmp_path / "values.npy", values)
    tensor = torch.tensor(values).permute(2, 0, 1)
    normalised = (tensor[[3, 0]] - torch.tensor([1.0, 2.0]).view(2, 1, 1)) / torch.tensor([2.0, 3.0]).view(2, 1, 1)
    normalised[:, :5] = 0
    with torch.no_grad():
        expected = model.pooled_features(normalised[None])
    found = loaded.features([values, tensor, tmp_path / "values.npy"])
    torch.testing.assert_close(found, expected.expand(3, -1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="bands"):
        loaded.predict(values[..., :2])


def test_simmim_has_features_and_no_classes(settings):
    config = settings("train.max_steps=1", "task.mask_unit_px=4", task="simmim")
    assert run_alone(config) == 0
    loaded = swinv2_train.load(config.run_dir, device="cpu")
    picture = np.zeros((16, 16, 3), np.uint8)
    assert loaded.features(picture).shape == (16,)
    with pytest.raises(ConfigError, match="no head that names classes"):
        loaded.predict(picture)


@pytest.mark.slow
def test_an_encoder_alone_has_features_and_no_classes(tmp_path):
    model = swin_v2("tiny", num_classes=0, img_size=64, window_size=8).eval()
    save_weights(model, tmp_path / "swinv2_tiny_window8_64.pth", "timm")
    loaded = swinv2_train.load(tmp_path / "swinv2_tiny_window8_64.pth", "data.eval_crop_pct=1.0", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = loaded.config.data
    normalised = (torch.tensor(pixels) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    with torch.no_grad():
        expected = model.pooled_features(normalised.permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(loaded.features(pixels), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="no head that names classes"):
        loaded.predict(pixels)
