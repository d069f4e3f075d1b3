"""Real files of each format, loaded as others load them, beside the model on sizes that no check has seen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from swinv2_train.config import ConfigError
from swinv2_train.export import parse, run
from swinv2_train.models import SwinTransformerV2
from swinv2_train.serving import graphs, write
from swinv2_train.serving.graphs import data_beside
from swinv2_train.serving.int8 import quantize
from swinv2_train.tasks import build_task
from swinv2_train.weights import load_weights, save_weights
from tests.support.configs import composed
from tests.support.evaluation import MEAN, STD, write_images
from tests.support.segmenter import SEGMENT

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[3] / "docs" / "serving.md"
NAMES = ("ant", "bee", "cat", "dog")
SIDES = (48, 80)
MODEL = (
    "task=classify", "task.num_classes=4", "data=cifar10", "model=demo", "model.embed_dim=16", "model.depths=[1,2]",
    "model.num_heads=[1,2]", "model.img_size=[48,80]", "model.window_size=7", "model.pretrained_window_sizes=[0,6]",
    "model.attention=fused", "runtime.num_threads=1", "train.micro_batch_size=4",
)  # fmt: skip
CLIPS = (
    "task.cutmix_alpha=0", "task.erasing_prob=0", "model.frames=4", "model.patch_frames=2", "model.window_frames=2",
    "data.frame_stride=3",
)  # fmt: skip
ATOL = 1e-4  # measured worst 4e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier whose windows divide no map, with its file of weights in the folder of the same run of tests."""
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    found = SwinTransformerV2(
        img_size=SIDES, num_classes=4, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=7,
        pretrained_window_sizes=(0, 6), drop_path_rate=0.0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_weights(found, folder / "weights.pth", "microsoft", classes=NAMES)
    found.folder = folder
    return found


@pytest.fixture(scope="module", autouse=True)
def traced_and_loaded_once():
    """A model's program serves every file that is written of it here, and what was loaded of a file to be checked is
    what a test loads of it: of any size the one takes most of a minute, the other a third of it.  What is traced
    depends neither on the format nor on what becomes of its numbers."""
    trace, load, programs, loaded = write.traced, torch.export.load, {}, {}

    def traced(served, images, any_size):
        weights = sum(parameter.detach().double().sum().item() for parameter in served.parameters())
        key = (weights, served.normalise is None, any_size, images.shape, images.dtype)
        if key not in programs:
            programs[key] = trace(served, images, any_size)
        return programs[key]

    def loaded_program(path):
        content = Path(path).read_bytes()
        if content not in loaded:
            loaded[content] = load(path)
        return loaded[content]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "traced", traced)
        patch.setattr(torch.export, "load", loaded_program)
        yield


def export(model, out, *arguments):
    run(*parse([f"weights={model.folder / 'weights.pth'}", f"out={out}", *MODEL, *arguments]))


def session(path):
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(found.run(None, {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def onnx_file(model):
    """Of any size."""
    export(model, model.folder / "model.onnx", "format=onnx", "dynamic_size=true")
    return model.folder / "model.onnx"


@torch.no_grad()
def compare(served, model, sizes):
    for batch, sides in sizes:
        images = torch.randn(batch, 3, *sides)
        torch.testing.assert_close(served(images), model(images), rtol=ATOL, atol=ATOL, msg=f"{batch} of {sides}")


ANY_SIZES = ((1, (48, 80)), (2, (16, 16)), (4, (16, 200)), (3, (56, 56)), (1, (128, 24)))


def test_a_graph_of_any_size_is_the_model_on_every_size_and_batch(onnx_file, model):
    compare(session(onnx_file), model, ANY_SIZES)
    said = json.loads(Path(f"{onnx_file}.json").read_text())
    assert said["input"]["shape"] == ["batch", 3, "height", "width"]
    assert (said["input"]["multiple_of"], said["input"]["at_least"]) == (8, 16)


def test_a_program_of_any_size_is_the_model_on_every_size_and_batch(model):
    out = model.folder / "any.pt2"
    export(model, out, "format=torch_export", "dynamic_size=true")
    compare(torch.export.load(out).module(), model, ANY_SIZES)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def without_us(program: str, folder: Path) -> str:
    """What a program prints that cannot import this package."""
    words = [sys.executable, "-c", f"import sys; sys.modules['swinv2_train'] = None\n{program}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_documents_program_names_the_models_class(onnx_file, model):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIDES, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(model.folder / "cat.png")
    with torch.no_grad():
        images = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - MEAN) / STD
        expected = NAMES[int(model(images[None]).argmax())]
    assert without_us(blocks()[0], model.folder) == expected


def test_a_program_of_one_size_takes_pixels_and_needs_nothing_of_ours(model):
    out = model.folder / "model.pt2"
    export(model, out, "format=torch_export", "preprocess=true")
    pixels = torch.randint(0, 256, (5, 3, *SIDES), dtype=torch.uint8)
    with torch.no_grad():
        said = torch.export.load(out).module()(pixels)
        torch.testing.assert_close(said, model((pixels / 255 - MEAN) / STD), rtol=ATOL, atol=ATOL)
    program = blocks()[1].replace("torch.randn(2, *", "torch.ones(2, *").replace("[1:])", "[1:], dtype=torch.uint8)")
    assert without_us(program, model.folder) == "torch.Size([2, 4])"


def test_integers_cost_little_and_weights_may_lie_beside_the_graph(model, monkeypatch, capsys):
    """Large models': above 2 GiB protobuf holds them no more; here above nothing."""
    monkeypatch.setattr(graphs, "ONE_FILE_BYTES", 0)
    images = np.random.default_rng(1).integers(0, 256, (24, *SIDES, 3), dtype=np.uint8)
    with torch.no_grad():
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - MEAN) / STD
        labels = model(pixels).argmax(dim=1).tolist()
    shards = write_images(model.folder, "train", images, labels)
    given = [f"data.shards={shards}", f"data.eval_shards={shards}", "data.num_workers=0"]
    folder = model.folder / "static"
    export(model, folder / "int8.onnx", "format=onnx", "int8=static", *given)
    line = json.loads(capsys.readouterr().out)
    assert line["images"] == 24 and line["float32"]["val/top1"] == 100
    assert line["int8"]["val/top1"] >= 80 and line["int8"]["bytes"] < line["float32"]["bytes"]
    assert sorted(path.name for path in folder.iterdir()) == ["int8.onnx", "int8.onnx.data", "int8.onnx.json"]
    assert json.loads((folder / "int8.onnx.json").read_text())["int8"] == "static"
    assert (session(folder / "int8.onnx")(pixels).argmax(dim=1) == torch.tensor(labels)).sum() >= 19
    exact = model.folder / "plain" / "large.onnx"
    export(model, exact, "format=onnx")
    compare(session(exact), model, [(2, SIDES)])
    quantize(exact, model.folder / "dynamic.onnx", {})
    said = session(model.folder / "dynamic.onnx")(pixels)
    assert (said.argmax(dim=1) == torch.tensor(labels)).sum() >= 19
    assert (model.folder / "dynamic.onnx.data").stat().st_size < data_beside(exact).stat().st_size


@torch.no_grad()
@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("kind", ["clips", "simmim"])
def test_models_of_clips_and_pretrained_encoders_give_the_same_numbers(kind, format, tmp_path):
    """Of pixels as they are decoded, in batches that no check has seen."""
    sizes = (
        "model=demo", "model.embed_dim=16", "model.depths=[1,2]", "model.num_heads=[1,2]", "model.img_size=[16,24]",
        "model.window_size=2", "runtime.num_threads=1", "data=labelled",
    )  # fmt: skip
    own = {
        "clips": ("task=classify", "task.num_classes=3", "task.rand_augment=null", *CLIPS),
        "simmim": ("task=simmim", "task.mask_unit_px=8"),
    }[kind]
    words = (*sizes, *own)
    task = build_task(composed([*words, "run_dir=r", "data.shards=s"]), torch.device("cpu"))
    for parameter in task.module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    save_weights(task.module, tmp_path / "w.pth", "microsoft")
    out = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    weights = f"weights={tmp_path / 'w.pth'}"
    run(*parse([*words, weights, f"format={format}", f"out={out}", "preprocess=true"]))
    frames = (4,) if kind == "clips" else ()
    pixels = torch.randint(0, 256, (7, 3, *frames, 16, 24), dtype=torch.uint8)
    module, images = task.module.eval(), task.normalise(pixels)
    wanted = module(images) if kind == "clips" else module.encoder.pooled_features(images)
    said = session(out) if format == "onnx" else torch.export.load(out).module()
    for some in (slice(0, 1), slice(1, 7)):
        torch.testing.assert_close(said(pixels[some]), wanted[some], rtol=ATOL, atol=ATOL)
    assert wanted.std(dim=0).max() > 1e-2, "images of which the model says the same"
    about = json.loads(Path(f"{out}.json").read_text())
    assert about["input"]["shape"] == ["batch", 3, *frames, 16, 24]
    assert about["output"]["name"] == ("logits" if kind == "clips" else "features")
    how = about["preprocessing"]
    assert (how.get("frames"), how.get("frame_stride")) == ((4, 3) if frames else (None, None))
    if frames:
        other = f"out={tmp_path / 'any'}{out.suffix}"
        with pytest.raises(ConfigError, match="dynamic_size=true: a model of clips has windows in time"):
            run(*parse([*words, weights, f"format={format}", other, "dynamic_size=true"]))
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted((out.name, f"{out.name}.json", "w.pth"))


@torch.no_grad()
def test_a_segmentation_scores_the_same_pixels(tmp_path):
    task = build_task(composed([*SEGMENT, "run_dir=r", "data.shards=s"]), torch.device("cpu"))
    for parameter in task.module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    save_weights(task.module, tmp_path / "w.pth", "microsoft")
    run(*parse([*SEGMENT, f"weights={tmp_path / 'w.pth'}", "format=onnx", "opset=18", f"out={tmp_path / 'm.onnx'}"]))
    load_weights(task.module.eval(), tmp_path / "w.pth")
    images = torch.randn(2, 3, 32, 32)
    wanted = torch.nn.functional.interpolate(task.module(images)["logits"], 32, mode="bilinear")
    torch.testing.assert_close(session(tmp_path / "m.onnx")(images), wanted, rtol=ATOL, atol=ATOL)
