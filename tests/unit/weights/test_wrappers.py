"""What training programs put around a model's names comes off, and what a file holds beside is left out by name."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.weights import load_weights, match_weights, read_weights, save_weights
from swinv2_train.weights.matching import model_facts
from tests.support.weights_samples import SMALL, assert_same, classifier, simmim, state_of


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["net.", "backbone.", "student.", "teacher.", "model.backbone.", "module.net.", "learner.online.body."]
)
@pytest.mark.parametrize("format", ["microsoft", "timm", "huggingface"])
def test_any_prefix_comes_off_when_a_swin_v2_is_left(tmp_path, prefix, format):
    """Lightning modules and self-supervised learners call the model as they like; none of these could be read."""
    model = classifier()
    save_weights(model, tmp_path / "plain", format) if format == "huggingface" else None
    if format == "huggingface":
        source = dict(read_all(tmp_path / "plain" / "model.safetensors"))
    else:
        save_weights(model, tmp_path / "plain.safetensors", format)
        source = dict(read_all(tmp_path / "plain.safetensors"))
    save_file(prefixed(source, prefix), tmp_path / "a.safetensors")
    fresh = SwinTransformerV2(**SMALL)
    report = load_weights(fresh, tmp_path / "a.safetensors")
    assert_same(state_of(model), state_of(fresh))
    bare = prefix.replace("module.", "")
    assert f"'{bare}' taken off the names" in str(report)
    assert all(text.startswith(prefix) for text in report.converted.values())


def read_all(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda name: name.replace("layers.", "layers.", 1).replace("attn.", "attn.module."),
        lambda name: f"model._orig_mod.{name}".replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
    ],
)
def test_wrappers_come_off_inside_of_names(tmp_path, wrap):
    """torch.compile, DistributedDataParallel and FSDP wrap single blocks too."""
    state = state_of(classifier())
    save_file({wrap(name): value for name, value in state.items()}, tmp_path / "a.safetensors")
    assert_same(state, dict(read_weights(tmp_path / "a.safetensors")))


def test_a_loss_s_own_weights_beside_the_model_are_left_out_and_named(tmp_path):
    state = state_of(classifier())
    beside = {"loss.weight": torch.ones(7), "criterion.centre": torch.ones(3), "queue": torch.zeros(2)}
    save_file({**prefixed(state, "model."), **beside}, tmp_path / "a.safetensors")
    fresh = SwinTransformerV2(**SMALL)
    report = load_weights(fresh, tmp_path / "a.safetensors")
    assert_same(state, state_of(fresh))
    assert set(report.left_out) == {"loss.*", "criterion.*", "queue"}
    assert "3 left out" in str(report) and "loss.*" in str(report) and "'model.' taken off" in str(report)


def test_a_head_beside_its_backbone_is_kept(tmp_path):
    """{backbone: Swin V2, head: Linear} is one model; to leave its head out would be to lose it."""
    state = state_of(classifier())
    renamed = {name if name.startswith("head.") else f"backbone.{name}": value for name, value in state.items()}
    save_file(renamed, tmp_path / "a.safetensors")
    assert_same(state, dict(read_weights(tmp_path / "a.safetensors")))


def test_of_a_student_and_its_teacher_the_teacher_is_taken_and_the_report_says_so(tmp_path):
    """The teacher is the student's EMA, which DINO's own evaluation takes too."""
    state = state_of(classifier())
    other = {name: value + 1 for name, value in state.items()}
    save_file({**prefixed(other, "student."), **prefixed(state, "teacher.")}, tmp_path / "a.safetensors")
    torch.save({"student": other, "teacher": state}, tmp_path / "a.pth")
    for name, left in (("a.safetensors", "student.*"), ("a.pth", "student.*")):
        fresh = SwinTransformerV2(**SMALL)
        report = load_weights(fresh, tmp_path / name)
        assert_same(state, state_of(fresh))
        assert report.left_out == (left,)


def test_an_average_beside_a_plain_model_is_left_out_by_name(tmp_path):
    state = state_of(classifier())
    other = prefixed({name: value + 1 for name, value in state.items()}, "ema.")
    save_file({**state, **other}, tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors")
    assert_same(state, dict(weights))
    assert weights.left_out == ("ema.*",)


def test_a_simmim_model_keeps_its_encoder_and_decoder_behind_a_prefix(tmp_path):
    state = state_of(simmim())
    save_file(prefixed(state, "net."), tmp_path / "a.safetensors")
    assert_same(state, dict(read_weights(tmp_path / "a.safetensors")))


def test_two_names_of_one_weight_are_refused(tmp_path):
    state = state_of(classifier())
    save_file({**state, "module.norm.weight": state["norm.weight"] + 1}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"module.norm.weight and norm.weight are the same weight; keep one"):
        read_weights(tmp_path / "a.safetensors")


# --- weights that are not there, or are no numbers


def test_empty_tensors_of_zero_3_say_so_and_name_the_remedy(tmp_path):
    """torch.save of a model under ZeRO-3 writes names without values; "shapes differ" told nobody what to do."""
    state = {name: torch.empty(0) if value.ndim > 1 else value for name, value in state_of(classifier()).items()}
    torch.save({"module": state}, tmp_path / "a.pth")
    with pytest.raises(
        ConfigError, match=r"\d+ of \d+ tensors are empty \(patch_embed.*\(0,\)\): saved under ZeRO-3"
    ) as e:
        read_weights(tmp_path / "a.pth")
    assert "swinv2_train.export run_dir=DIR" in str(e.value) and "zero_to_fp32.py" in str(e.value)


def test_weights_that_are_no_numbers_are_named_and_counted(tmp_path):
    """A run that started from them failed at its first step, or an evaluation said 14.29 %, and nothing said why."""
    model = classifier()
    state = state_of(model)
    state["norm.weight"][:3] = float("nan")
    state["layers.0.blocks.0.attn.qkv.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / "a.safetensors")
    report = load_weights(SwinTransformerV2(**SMALL), tmp_path / "a.safetensors")
    assert report.not_finite == {
        "layers.0.blocks.0.attn.qkv.weight": (1, state["layers.0.blocks.0.attn.qkv.weight"].numel()),
        "norm.weight": (3, state["norm.weight"].numel()),
    }
    assert "warning: 2 weights hold NaN or infinity: " in str(report) and "norm.weight (3 of 64 values)" in str(report)
    save_file(state_of(model), tmp_path / "b.safetensors")
    assert "NaN" not in str(load_weights(SwinTransformerV2(**SMALL), tmp_path / "b.safetensors"))


# --- names of strangers


@pytest.mark.parametrize(
    "name",
    [
        "layers.2000000000.blocks.0.attn.proj.weight",
        "layers.0.blocks.2000000000.attn.proj.weight",
        "layers.0.blocks.2000000000.norm3.weight",
        "layers." + "9" * 5000 + ".blocks.0.norm1.weight",
        "layers.2000000000.downsample.norm.weight",
        "net.layers.2000000000.blocks.0.norm1.weight",
        "encoder.layers.2000000000.blocks.0.attention.self.query.weight",
        "backbone.stages.2000000000.blocks.0.attn.w_msa.proj.weight",
    ],
)
def test_a_number_in_a_name_costs_no_time(tmp_path, name):
    """One name in a file of 160 kB made reading end never: there were loops up to the number."""
    save_file({**state_of(classifier()), name: torch.ones(2)}, tmp_path / "a.safetensors")
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"has the number (20000|9).*, but the file holds \d+ tensors") as caught:
        read_weights(tmp_path / "a.safetensors")
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 700
    model_facts({name: (2,)})  # whose loops the names of a model fill, too
    assert time.process_time() - started < 2


def test_a_message_about_long_names_is_short(tmp_path):
    """Each of the names in it had a megabyte."""
    names = [f"layers.0.blocks.0.attn.{'x' * 10**6}{index}" for index in range(9)]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    shapes = {name: tuple(value.shape) for name, value in state_of(classifier()).items()}
    with pytest.raises(ConfigError) as caught:
        match_weights(read_weights(tmp_path / "a.safetensors"), shapes)
    assert len(str(caught.value)) < 3000 and "characters ...]" in str(caught.value)


def test_a_prefix_of_a_hundred_thousand_parts_is_read(tmp_path):
    """They came off one after the other, by recursion."""
    state = prefixed(state_of(classifier()), "module." * 20_000)
    save_file(state, tmp_path / "a.safetensors")
    assert len(read_weights(tmp_path / "a.safetensors")) == len(state)


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "a length of petabytes": (struct.pack("<Q", 2**60) + b"{}", "its header is said to hold"),
    "a header of 90 MB": (struct.pack("<Q", 90 * 2**20) + b"{}", "its header is said to hold"),
    "depth": (struct.pack("<Q", 10**5) + b"[" * 10**5, "a damaged or truncated"),
    "a name twice": (f'{{"norm.weight":{ENTRY},"norm.weight":{ENTRY}}}', "norm.weight stands twice in its header"),
    "a huge shape": ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, "damaged or truncated"),
    "a huge offset": ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "damaged or truncated"),
    "offsets that overlap": (
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, "damaged or truncated",
    ),
    "an offset before the start": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "damaged or trunc"),
    "a million names": (
        {f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(12_000)}, "12,000 tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path, what):
    header, match = HEADERS[what]
    path = tmp_path / "a.safetensors"
    if isinstance(header, bytes):
        path.write_bytes(header)
    else:
        header_file(path, header.encode() if isinstance(header, str) else header, b"\0" * 4)
    started = time.process_time()
    with pytest.raises(ConfigError, match=match):
        read_weights(path)
    assert time.process_time() - started < 3


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    """A stride of 0 makes a terabyte of four bytes; to copy it took the memory of the machine."""
    torch.save({"model": {"norm.weight": torch.ones(1).expand(2**40)}}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"norm.weight is \(1099511627776,\), of which the file holds 4 bytes alone"):
        read_weights(tmp_path / "a.pth")


def test_a_compressed_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 2**27)
    started = time.process_time()
    with pytest.raises(ConfigError, match="bytes are said to unpack to 134,217,728"):
        read_weights(tmp_path / "a.pth")
    assert time.process_time() - started < 3


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "a\0b", "x" * 10**6, "sub/model.bin"])
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    with pytest.raises(ConfigError, match="which is not beside it|File name too long") as caught:
        read_weights(index)
    assert len(str(caught.value)) < 1000


def test_a_name_of_mmpretrain_without_any_stage_is_refused(tmp_path):
    """Found by the fuzz suite: "max() arg is an empty sequence"."""
    save_file({"norm.attn.w_msa.norm": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="has names of mmpretrain and official ones"):
        read_weights(tmp_path / "a.safetensors")


def test_containers_inside_of_containers_come_off(tmp_path):
    state = state_of(classifier())
    torch.save({"state_dict": {"model": state, "model_ema": state}, "epoch": 3}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert_same(state, dict(weights))
    assert weights.left_out == ("state_dict.model_ema.*",)
