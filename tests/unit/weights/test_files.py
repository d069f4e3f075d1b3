"""Files that are no weights, or worse: each gives one clear message, and nothing in them runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
import types
import uuid
import zipfile
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.weights import load_weights, read_weights, save_weights
from swinv2_train.weights.files import open_weights
from tests.support.weights_samples import SMALL, assert_same, classifier, state_of, with_official_buffers


class Payload:
    """Pickles as a call that leaves a file behind when it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def save(content, path, kind):
    torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("place", ["pickle.pth", "repository/pytorch_model.bin"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, kind, place, wrapped):
    trace, path = tmp_path / "trace", tmp_path / place
    path.parent.mkdir(exist_ok=True)
    state = {**state_of(classifier()), "evil": Payload(trace)}
    save({"model": state, "optimizer": {}} if wrapped else state, path, kind)
    target = path if path.suffix == ".pth" else path.parent
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}: refused, .* asks for (posix|nt|os)\.system"):
        read_weights(target)
    with pytest.raises(ConfigError, match="refused, nothing of it was run"):
        load_weights(SwinTransformerV2(**SMALL), target)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload works, so its absence above means something"


def test_a_bare_pickle_and_a_call_of_eval_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, ("print('run')",))

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    with pytest.raises(ConfigError, match=r"a\.pkl: "):
        read_weights(tmp_path / "a.pkl")
    torch.save({"model": Evil()}, tmp_path / "b.pth")
    with pytest.raises(ConfigError, match="refused, .* asks for eval"):
        read_weights(tmp_path / "b.pth")


def test_what_is_no_tensor_is_refused_without_being_called_a_danger(tmp_path):
    torch.save({"model": state_of(classifier()), "id": uuid.uuid4()}, tmp_path / "a.pth")
    with pytest.raises(
        ConfigError, match=r"it asks for uuid\.UUID, which is no tensor, and what is none may be a program; use a"
    ):
        read_weights(tmp_path / "a.pth")


def test_attributes_that_a_file_gives_its_objects_do_not_stand_for_methods(tmp_path):
    """A pickle may set any attribute on a dictionary or a tensor; none of them may be called or looked up."""
    state = state_of(classifier())
    marked = state["norm.weight"].clone()
    marked.detach, marked.clone = 5, 5
    content = OrderedDict(model=OrderedDict({**state, "norm.weight": marked}))
    for mapping in (content, content["model"]):
        mapping.__dict__.update(get=5, keys=5, itemZ=5, __getitem__=5)
    save(content, tmp_path / "a.pth", "legacy")
    written = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(written.replace(b"itemZ", b"items"))  # with which it could not be saved
    model = SwinTransformerV2(**SMALL)
    load_weights(model, tmp_path / "a.pth")
    assert_same(state, state_of(model))


def test_names_that_are_let_in_stand_for_nothing(tmp_path):
    """getattr is stored by mmengine; the stand-in must not look anything up, nor give what can be called."""

    class Plain:
        def __reduce__(self):
            return (getattr, (("a",), "__class__"))

    state = state_of(classifier())
    torch.save({"model": state, "meta": Plain()}, tmp_path / "plain.pth")
    assert_same(state, dict(read_weights(tmp_path / "plain.pth")))
    torch.save({"model": {**state, "x": Plain()}}, tmp_path / "inside.pth")
    with pytest.raises(ConfigError, match="'x' is _Inert, not a tensor"):
        read_weights(tmp_path / "inside.pth")


@pytest.fixture
def foreign_modules(monkeypatch):
    """yacs and mmengine as training programs pickle them; neither is installed."""

    def module(name, **content):
        made = types.ModuleType(name)
        for key, value in content.items():
            value.__module__ = name
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["__immutable__"] = False

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.arange(3.0)
            self._statistics_methods = {"mean": HistoryBuffer.mean}
            self._recent = deque

        def mean(self):
            return 0

    HistoryBuffer.__qualname__, HistoryBuffer.mean.__qualname__ = "HistoryBuffer", "HistoryBuffer.mean"
    CfgNode.__qualname__ = "CfgNode"
    module("yacs")
    module("yacs.config", CfgNode=CfgNode)
    HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"
    for name in ("mmengine", "mmengine.logging"):
        module(name)
    module("mmengine.logging.history_buffer", HistoryBuffer=HistoryBuffer)

    def make():
        buffer = HistoryBuffer()
        del buffer._recent
        return {
            "config": CfgNode({"MODEL": CfgNode({"TYPE": "swinv2"}), "lr": 0.1}),
            "args": argparse.Namespace(lr=0.1, model="swinv2"),
            "message_hub": {"log": buffer, "scalar": np.float64(1.5)},
            "lr_scheduler": {"last": np.float32(0.5), "rates": np.ones(2)},
        }

    yield make


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_training_checkpoints_of_others_read_without_their_packages(tmp_path, foreign_modules, kind, monkeypatch):
    """Official ones hold a yacs config, timm's an argparse namespace, mmengine's buffers and numpy scalars."""
    state = state_of(classifier())
    save({"model": with_official_buffers(state), "epoch": 3, **foreign_modules()}, tmp_path / "a.pth", kind)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("yacs", "mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    assert_same(state, dict(read_weights(tmp_path / "a.pth")))


@pytest.mark.parametrize("key", ["model", "state_dict", "state_dict_ema", "model_state_dict", "module", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod."])
def test_containers_and_wrappers_come_off(tmp_path, key, prefix):
    state = state_of(classifier())
    torch.save({key: {prefix + name: value for name, value in state.items()}, "epoch": 1}, tmp_path / "a.pth")
    assert_same(state, dict(read_weights(tmp_path / "a.pth")))


def test_trained_weights_go_before_averaged_ones_and_the_report_says_so(tmp_path):
    state = state_of(classifier())
    torch.save({"state_dict_ema": {n: v + 1 for n, v in state.items()}, "state_dict": state}, tmp_path / "a.pth")
    model = SwinTransformerV2(**SMALL)
    report = load_weights(model, tmp_path / "a.pth")
    assert_same(state, state_of(model))
    assert report.left_out == ("state_dict_ema.*",) and "1 left out: state_dict_ema.*" in str(report)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_weight_file_gives_one_message_with_its_path(tmp_path):
    def refused(name, match, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}.*{match}") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)

    refused("absent.pth", "there is no such file")
    refused("empty.pth", "the file is empty; fetch it again", b"")
    refused(
        "page.pth",
        r"neither a safetensors nor a torch file \(it begins with b'<!DOCTYPE html><'",
        b"<!DOCTYPE html><html>",
    )
    refused("pointer.safetensors.txt", "Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1")
    refused("noise.safetensors", "damaged or truncated safetensors", bytes(range(200)))
    refused("noise.pth", "damaged or truncated torch file|cannot be read as weights", b"\x80\x02" + bytes(range(200)))
    refused("zip.pth", "damaged or truncated torch file", b"PK\x03\x04" + bytes(100))
    (tmp_path / "directory").mkdir()
    refused("directory", "directory without weights")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "holds list, not named tensors")
    torch.save({"model": {}}, tmp_path / "nothing.pth")
    refused("nothing.pth", "holds no tensors")
    torch.save({"model": {"epoch": 3}}, tmp_path / "number.pth")
    refused("number.pth", "'epoch' is int, not a tensor")
    torch.save({"model": {"x": torch.eye(3).to_sparse()}}, tmp_path / "sparse.pth")
    refused("sparse.pth", "x is sparse, quantized or nested")
    torch.save({"model": {"x": torch.nested.nested_tensor([torch.ones(2)])}}, tmp_path / "nested.pth")
    refused("nested.pth", "x is sparse, quantized or nested")
    torch.save({"model": {"x": torch.ones(2, device="meta")}}, tmp_path / "meta.pth")
    refused("meta.pth", "x is on the meta device and has no values")
    torch.save({1: torch.ones(2), "1": torch.ones(2)}, tmp_path / "numbered.pth")
    refused("numbered.pth", "1 is no name of a tensor")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(state_of(classifier()), protocol=4))
    refused("pickle.pth", r"cannot be read as weights \(Unsupported operand [0-9]+\); fetch it again$")
    refused("x" * 5000, r"cannot be read \(File name too long\)")
    save_file({n: v.to(torch.float8_e4m3fn) for n, v in state_of(classifier()).items()}, tmp_path / "f8.safetensors")
    refused("f8.safetensors", "is F8_E4M3; save it as float32")
    state = state_of(classifier())
    save_file({**state, "norm.weight": torch.ones(64, dtype=torch.int64)}, tmp_path / "int.safetensors")
    refused("int.safetensors", "norm.weight is torch.int64, not a float")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "legacy.pth"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused_before_anything_changes(tmp_path, name, share):
    path = tmp_path / name
    if name == "legacy.pth":
        save(state_of(classifier()), path, "legacy")
    else:
        save_weights(classifier(), path, "microsoft")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    model = SwinTransformerV2(**SMALL)
    before = state_of(model)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_weights(model, path)
    assert_same(before, state_of(model))


def test_an_archive_that_somebody_compressed_reads_as_torch_reads_it(tmp_path):
    """Mapped, its bytes would be taken for numbers."""
    state = state_of(classifier())
    torch.save({"model": state}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as plain,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "b.pth").stat().st_size < (tmp_path / "a.pth").stat().st_size
    assert_same(state, dict(read_weights(tmp_path / "b.pth")))


def test_an_archive_whose_list_is_damaged_gives_the_same_weights_or_none(tmp_path):
    """Every bit of what the list says of two tensors, flipped: mapped records are not looked at by torch itself."""
    state, path = {"a": torch.arange(40.0), "b": -torch.arange(40.0)}, tmp_path / "a.pth"
    torch.save(state, path)
    whole = path.read_bytes()
    refused = 0
    for record in (b"a/data/0", b"a/data/1"):
        name = whole.rindex(record)  # the list is at the end of the file, and a record of it 46 bytes before its name
        for bit in range(8 * (name - 46), 8 * (name + len(record))):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                entries = open_weights(path).entries
            except ConfigError:
                refused += 1
                continue
            assert_same(state, {name: entry.read() for name, entry in entries.items()})
    assert refused > 400  # of 864: the others are dates, versions and the like, which mean nothing here


def test_an_index_must_name_files_that_are_there_and_hold_what_it_says(tmp_path):
    state = state_of(classifier())
    index = tmp_path / "model.safetensors.index.json"
    save_file(state, tmp_path / "one.safetensors")

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write(dict.fromkeys(state, "one.safetensors"))
    assert_same(state, dict(read_weights(tmp_path)))
    assert_same(state, dict(read_weights(index)))
    write(dict.fromkeys(state, "two.safetensors"))
    with pytest.raises(ConfigError, match=r"names 'two.safetensors', which is not beside it"):
        read_weights(tmp_path)
    save_file(state, tmp_path.parent / "elsewhere.safetensors")
    write(dict.fromkeys(state, "../elsewhere.safetensors"))
    with pytest.raises(ConfigError, match="not beside it"):
        read_weights(tmp_path)
    write({**dict.fromkeys(state, "one.safetensors"), "more.weight": "one.safetensors"})
    with pytest.raises(ConfigError, match=r"one\.safetensors does not hold more\.weight, which it lists"):
        read_weights(tmp_path)
    for content, match in (
        ("{", "cannot be read as an index"),
        ("[" * 200000, "cannot be read as an index"),
        ('{"weight_map": {"a": ["x"]}}', "weight_map does not give a file for each tensor"),
        ('{"weight_map": {"a": {"b": 1}}}', "weight_map does not give a file for each tensor"),
        ('{"weight_map": []}', "weight_map does not give a file for each tensor"),
        ('{"weight_map": {}}', "weight_map lists no tensors"),
    ):
        index.write_text(content)
        with pytest.raises(ConfigError, match=f"^{re.escape(str(index))}: .*{match}.*; fetch it again$"):
            read_weights(tmp_path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_what_was_read_does_not_change_with_its_file(tmp_path, name):
    (path,) = save_weights(classifier(), tmp_path / name, "microsoft")
    read = dict(read_weights(path))
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(state_of(classifier()), read)


def test_a_file_may_hold_half_precision(tmp_path):
    """float32 parameters take the values; nothing is rounded further."""
    state = {name: value.bfloat16() for name, value in state_of(classifier()).items()}
    save_file(state, tmp_path / "half.safetensors")
    model = SwinTransformerV2(**SMALL)
    load_weights(model, tmp_path / "half.safetensors")
    assert_same({name: value.float() for name, value in state.items()}, state_of(model))
