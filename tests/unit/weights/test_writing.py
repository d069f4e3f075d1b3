"""Exports: what the libraries read back, what is refused before a byte is written, and how little memory it takes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors
from swinv2_train.storage.safetensors_files import write_safetensors
from swinv2_train.weights import Preprocessing, load_weights, read_weights, save_weights
from swinv2_train.weights.writing import write_torch
from tests.support.weights_samples import SMALL, assert_same, classifier, simmim, state_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_safetensors_library_reads_what_we_write(tmp_path, dtype):
    """Scalars, empty tensors, odd sizes and views that are not contiguous too."""
    tensors = {
        "scalar": torch.tensor(1.5, dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "odd": torch.randn(3, 1, 5).to(dtype),
        "view": torch.randn(6, 4).to(dtype).t()[1:],
        'näme"with\\marks': torch.randn(1).to(dtype),
    }
    entries = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", entries)
    assert_same(tensors, load_file(tmp_path / "a.safetensors"))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it
    length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0, "readers that map the file want the tensors aligned"
    write_torch(tmp_path / "a.pth", {name: entry for name, entry in entries.items() if name != "empty"})
    expected = {name: tensor for name, tensor in tensors.items() if name != "empty"}
    assert_same(expected, torch.load(tmp_path / "a.pth", weights_only=True)["model"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.safetensors"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    """Complete or absent."""
    path = tmp_path / "a.safetensors"
    save_weights(classifier(), path, "microsoft")
    before = path.read_bytes()

    def fail():
        raise RuntimeError("disk gone")

    state = state_of(classifier())
    entries = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}
    entries["norm.bias"] = entries["norm.bias"]._replace(read=fail)
    for name in ("a.safetensors", "b.pth", "c"):
        with pytest.raises(RuntimeError, match="disk gone"):
            format = "huggingface" if name == "c" else "microsoft"
            save_weights(classifier(), tmp_path / name, format, weights=LazyTensors(entries))
    assert path.read_bytes() == before
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["a.safetensors"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "new/folder/a.pth", "a", "new/folder/a"])
def test_a_full_disk_leaves_nothing_and_the_same_command_works_again(tmp_path, name):
    """A folder that was left would be refused as existing, and the message must name what the user named."""
    model, path = classifier(), tmp_path / name
    format = "microsoft" if path.suffix else "huggingface"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an OSError
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
        with pytest.raises(ConfigError, match=rf"^{path}(/model\.safetensors)?: cannot be written \(File too large\)"):
            save_weights(model, path, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())
    save_weights(model, path, format)
    assert_same(state_of(model), dict(read_weights(path)))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_other_files_and_other_writers_are_left_alone(tmp_path, name):
    """Two exports to one name: the last one wins, whole."""
    model, path = classifier(), tmp_path / name
    for others in (".unfinished", ".staged.safetensors", ".staged.safetensors.unfinished"):
        (tmp_path / f"{name}{others}").write_text("mine")
    state = state_of(model)
    entries = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}

    def read_and_write():
        save_weights(classifier(), path, "microsoft")  # another export, while this one is on its way
        return state["norm.bias"]

    entries["norm.bias"] = entries["norm.bias"]._replace(read=read_and_write)
    save_weights(model, path, "microsoft", weights=LazyTensors(entries))
    assert_same(state, dict(read_weights(path)))
    assert [file.read_text() for file in sorted(tmp_path.iterdir()) if file != path] == ["mine"] * 3


@pytest.mark.parametrize("format", ["microsoft", "timm", "huggingface"])
def test_a_file_may_be_replaced_by_what_is_read_from_it(tmp_path, format):
    """Reading is lazy, so the source must last until the export is complete."""
    model, path = classifier(), tmp_path / "a.safetensors"
    save_weights(model, path, "huggingface" if format == "huggingface" else "microsoft")
    save_weights(model, path, format, weights=read_weights(path))
    assert_same(state_of(model), dict(read_weights(path)))


@pytest.mark.parametrize("make", [classifier, simmim])
def test_a_model_without_memory_tells_the_sizes_and_the_weights_come_from_elsewhere(tmp_path, make):
    model = make()
    with torch.device("meta"):
        shell = SwinTransformerV2(**{**SMALL, "num_classes": 7 if make is classifier else 0})
        shell = shell if make is classifier else SimMIM(shell)
    for format, suffix in (("microsoft", ".pth"), ("microsoft", ".safetensors"), ("huggingface", "")):
        ours, theirs = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        save_weights(model, ours, format)
        save_weights(shell, theirs, format, weights=state_of(model))
        assert_same(dict(read_weights(ours)), dict(read_weights(theirs)))
        with pytest.raises(ValueError, match=r"is on the meta device .* give them: weights="):
            save_weights(shell, tmp_path / f"c{suffix}", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a",
        "a.pth",
        "a.safetensors",
        "b",
        "b.pth",
        "b.safetensors",
    ]


def test_a_simmim_encoder_is_written_alone_for_timm(tmp_path):
    model = simmim()
    with pytest.raises(ConfigError, match=r"cannot hold a SimMIM model .* save_weights\(model\.encoder, \.\.\.\)"):
        save_weights(model, tmp_path / "a.safetensors", "timm")
    save_weights(model.encoder, tmp_path / "a.safetensors", "timm")
    headless = classifier(num_classes=0)
    load_weights(headless, tmp_path / "a.safetensors")
    expected = {name: value for name, value in state_of(model.encoder).items() if name != "mask_token"}
    assert_same(expected, state_of(headless))


def preprocessing(size: tuple[int, int], squash: bool = False) -> Preprocessing:
    return Preprocessing((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), size, 0.9, squash, "bicubic")


@pytest.mark.parametrize(
    "format, overrides, match",
    [
        (
            "timm",
            {"extra_norm_period": 2},
            r"format=timm cannot hold the extra norms .*norm3.*; export format=microsoft",
        ),
        ("huggingface", {"extra_norm_period": 2}, r"format=huggingface cannot hold the extra norms"),
        ("huggingface", {"window_size": (4, 8)}, r"cannot hold window_size \(4, 8\)"),
        ("huggingface", {"pretrained_window_sizes": ((4, 3), 4, 4, 4)}, r"cannot hold pretrained_window_sizes"),
        ("huggingface", {"pretrained_window_sizes": (1, 4, 4, 4)}, r"cannot hold pretrained_window_sizes"),
        ("huggingface", {"img_size": (64, 128)}, r"cannot hold the 4x8 map of stage 3 with window 4"),
        ("huggingface", {"window_size": 3}, r"cannot hold window 3 on the 16x16 map of stage 1"),
        ("huggingface", {"img_size": 72}, r"cannot hold img_size \(72, 72\) with maps of odd size"),
        ("coreml", {}, r"format \(coreml\) is not written; choose one of microsoft, timm, huggingface"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, format, overrides, match):
    with pytest.raises(ConfigError, match=match):
        save_weights(classifier(**overrides), tmp_path / "a", format)
    assert not list(tmp_path.iterdir())


def test_more_refusals_of_exports(tmp_path):
    wide = {"img_size": (64, 96), "depths": (2, 2), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}
    with pytest.raises(ConfigError, match=r"cannot hold a SimMIM model of img_size \(64, 96\)"):
        save_weights(simmim(**wide), tmp_path / "a", "huggingface")
    with pytest.raises(ConfigError, match=r"cannot hold a crop to \(64, 96\)"):
        save_weights(classifier(**wide), tmp_path / "a", "huggingface", preprocessing=preprocessing((64, 96)))
    model, state = classifier(), state_of(classifier())
    for weights, match in (
        ({name: value for name, value in state.items() if name != "norm.bias"}, "weights lack norm.bias"),
        ({**state, "more": state["norm.bias"]}, "weights have more, unlike the model"),
        ({**state, "norm.bias": torch.zeros(3)}, r"norm\.bias is \(3,\), the model has \(64,\)"),
        ({**state, "norm.bias": torch.zeros(64, dtype=torch.int64)}, r"norm\.bias is torch\.int64, not a float"),
    ):
        with pytest.raises(ConfigError, match=match):
            save_weights(model, tmp_path / "a", "microsoft", weights=weights)
    assert not list(tmp_path.iterdir())
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError, match="is a directory; format=timm writes one file"):
        save_weights(model, tmp_path / "directory", "timm")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; format=huggingface writes a directory"):
        save_weights(model, tmp_path / "file", "huggingface")
    for name, format in (("below.safetensors", "timm"), ("below.pth", "timm"), ("below", "huggingface")):
        with pytest.raises(ConfigError, match=rf"{name}.*: cannot be written \(.*\); choose another path"):
            save_weights(model, tmp_path / "file" / name, format)
    for name, format in (("x" * 5000 + ".pth", "timm"), ("x" * 5000, "huggingface")):
        with pytest.raises(ConfigError, match=r"cannot be written \(File name too long\)"):
            save_weights(model, tmp_path / name, format)
    assert (tmp_path / "file").read_text() == "mine"
    for name in ("a", "a.ckpt", "a.pth.tar", "a.safetensor"):
        with pytest.raises(
            ConfigError, match=rf"{name}: format=timm writes a file that ends in one of \.safetensors, "
        ):
            save_weights(model, tmp_path / name, "timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]
    (path,) = save_weights(model, tmp_path / "A.PTH", "microsoft")
    assert_same(torch.load(path, weights_only=True)["model"], state)


def test_a_huggingface_export_names_its_classes_and_its_crop(tmp_path):
    written = save_weights(classifier(), tmp_path, "huggingface", preprocessing=preprocessing((64, 64)))
    assert [path.name for path in written] == ["model.safetensors", "config.json", "preprocessor_config.json"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"]["6"] == "LABEL_6" and len(config["label2id"]) == 7
    assert config["architectures"] == ["Swinv2ForImageClassification"]
    assert (config["image_size"], config["window_size"], config["pretrained_window_sizes"]) == (64, 4, [4, 4, 4, 2])
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (processor["size"], processor["crop_size"]) == ({"shortest_edge": 71}, {"height": 64, "width": 64})
    save_weights(classifier(num_classes=0), tmp_path, "huggingface")
    assert not (tmp_path / "preprocessor_config.json").exists(), "an older export's"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Swinv2Model"]


# --------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("format", ["microsoft", "timm", "huggingface"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_writing_holds_one_tensor_at_a_time(tmp_path, format, suffix):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Counted(torch.Tensor):
        pass

    def reader(tensor):
        def read():
            nonlocal most
            copy = tensor.clone().as_subclass(Counted)
            alive.add(copy)
            most = max(most, len(alive))
            return copy

        return read

    model = classifier()
    entries = {name: LazyTensor(tuple(t.shape), t.dtype, reader(t)) for name, t in state_of(model).items()}
    path = save_weights(model, tmp_path / f"a{suffix}", format, weights=LazyTensors(entries))[0]
    assert most == 1
    assert_same(state_of(model), dict(read_weights(path)))


MEASURE = """
import sys, threading, time
import torch
from swinv2_train.models import SwinTransformerV2
from swinv2_train.weights import load_weights, read_weights, save_weights
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors

def anonymous_mib():  # not the pages of mapped files, which the kernel takes back when it wants
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

class Peak(threading.Thread):
    def __enter__(self):
        self.base = self.top = anonymous_mib()
        self.done = False
        self.start()
        return self
    def run(self):
        while not self.done:
            self.top = max(self.top, anonymous_mib())
            time.sleep(0.0005)
    def __exit__(self, *_):
        self.done = True
        self.join()

folder = sys.argv[1]
sizes = dict(num_classes=9, embed_dim=96, depths=(1, 1, 1, 4), num_heads=(3, 6, 12, 24))
with torch.device("meta"):
    shell = SwinTransformerV2(**sizes)
entries = {n: LazyTensor(tuple(t.shape), torch.float32, lambda t=t: torch.full(t.shape, 0.5))
           for n, t in shell.state_dict().items()}
print("total", sum(t.numel() for t in shell.state_dict().values()) * 4 / 2**20)
print("largest", max(t.numel() for t in shell.state_dict().values()) * 4 / 2**20)
steps = [(None, "a.safetensors", "microsoft"), ("a.safetensors", "b", "huggingface"), ("b", "c.pth", "timm"),
         ("c.pth", "d.safetensors", "microsoft")]
for source, target, format in steps:
    with Peak() as peak:
        weights = LazyTensors(entries) if source is None else read_weights(folder + "/" + source)
        save_weights(shell, folder + "/" + target, format, weights=weights)
        del weights
    print(target, peak.top - peak.base)
model = SwinTransformerV2(**sizes)
with Peak() as peak:
    load_weights(model, folder + "/b")
print("load", peak.top - peak.base)
with Peak() as peak:
    everything = dict(read_weights(folder + "/b"))
print("everything", peak.top - peak.base)
"""


@pytest.mark.slow
def test_converting_and_loading_take_the_memory_of_a_few_tensors(tmp_path):
    """A giant's export must not need the whole model's 12 GB a second time."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back, so that every use is seen
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    print(measured)
    total, largest = measured.pop("total"), measured.pop("largest")
    assert total > 10 * largest
    assert measured.pop("everything") > 0.9 * total, "the measurement sees what is held"
    assert max(measured.values()) < 2.5 * largest, measured  # measured worst 1.5: three parts of a qkv and their sum
