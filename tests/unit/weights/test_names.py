"""Everyone's names to ours and back, bit for bit."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.weights import load_weights, read_weights, save_weights
from swinv2_train.weights.names import reordered_merging
from tests.support.one_rank import ONE
from tests.support.weights_samples import (
    SMALL,
    assert_same,
    classifier,
    current_timm,
    mmpretrain,
    old_timm,
    simmim,
    state_of,
    with_official_buffers,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "weight_names.json"
EXTRA = {"depths": (2, 2, 6, 2), "extra_norm_period": 6}
TWO_STAGES = {"depths": (2, 2), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}


def rpe(state):
    return {name.replace("cpb_mlp", "rpe_mlp"): value for name, value in state.items()}


@pytest.mark.parametrize(
    "rename, format, overrides",
    [
        (with_official_buffers, "microsoft", {}),
        (rpe, "microsoft", {}),
        (old_timm, "microsoft", {}),
        (current_timm, "timm", {}),
        (mmpretrain, "mmpretrain", {}),
        (mmpretrain, "mmpretrain", EXTRA),
        (partial(mmpretrain, num_stages=2), "mmpretrain", TWO_STAGES),
        (current_timm, "timm", TWO_STAGES),
        (old_timm, "microsoft", TWO_STAGES),
        (with_official_buffers, "microsoft", EXTRA),
        (current_timm, "timm", {"num_classes": 0}),
        (old_timm, "microsoft", {"num_classes": 0}),
        (mmpretrain, "mmpretrain", {"num_classes": 0}),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_every_naming_is_recognised_and_read_bit_for_bit(tmp_path, rename, format, overrides, suffix):
    """The names come from tables that the package does not share."""
    model = classifier(**overrides)
    state, path = state_of(model), tmp_path / f"a.{suffix}"
    theirs = {name: value.contiguous() for name, value in rename(state).items()}
    torch.save({"state_dict": theirs}, path) if suffix == "pth" else save_file(theirs, path)
    weights = read_weights(path)
    assert weights.format == format
    assert_same(state, dict(weights))
    if format in ("timm", "microsoft", "mmpretrain"):
        assert_same(state, dict(read_weights(path, format)))


@pytest.mark.parametrize("with_decoder", [True, False])
def test_official_simmim_files_read_into_simmim_and_into_a_classifier(tmp_path, with_decoder):
    state = rpe(with_official_buffers(state_of(simmim())))
    if not with_decoder:
        state = {name: value for name, value in state.items() if not name.startswith("decoder")}
    torch.save({"model": state}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").format == "simmim"
    model = classifier()
    head = model.head.weight.clone()
    with pytest.raises(
        ConfigError, match=r"has no head \(head\.bias, head\.weight\); head=fresh starts with a new one"
    ):
        load_weights(model, tmp_path / "a.pth")
    report = load_weights(model, tmp_path / "a.pth", head="auto")
    assert report.missing == ("head.weight", "head.bias") and torch.equal(head, model.head.weight)
    assert torch.equal(
        model.layers[2].blocks[1].attn.cpb_mlp[0].weight, state["encoder.layers.2.blocks.1.attn.rpe_mlp.0.weight"]
    )
    again = simmim()
    nn.init.zeros_(again.decoder[0].weight)
    if with_decoder:
        assert not load_weights(again, tmp_path / "a.pth").missing
        assert_same(state_of(simmim()), state_of(again))
    else:
        with pytest.raises(
            ConfigError, match=r"lacks a part of the SimMIM decoder or mask token \(decoder\.0\.bias, decoder"
        ):
            load_weights(again, tmp_path / "a.pth")


def test_names_of_the_peers_are_the_golden_ones(tmp_path):
    """What other programs have to find in our files, written down; mmpretrain's was read in its 1.2.0."""
    golden = json.loads(GOLDEN.read_text())
    small = {"depths": (1, 1), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}
    for module, kind in ((classifier(**small), "classifier"), (simmim(**small), "simmim")):
        for format in ("microsoft", "timm", "huggingface"):
            if (format, kind) != ("timm", "simmim"):
                file = save_weights(module, tmp_path / f"{format}-{kind}.safetensors", format)[0]
                assert sorted(load_file(file)) == sorted(golden[f"{format} {kind}"]), (format, kind)
    named = mmpretrain(state_of(classifier(**small)), num_stages=2)
    assert sorted(named) == sorted(golden["mmpretrain classifier"])


def test_the_merging_reorder_equals_a_merging_by_unfold():
    """mmpretrain merges by nn.Unfold; the reordered weight gives the official merging the same output."""
    torch.manual_seed(0)
    dim = 6
    maps, weight = torch.randn(2, 8, 10, dim), torch.randn(2 * dim, 4 * dim)
    columns = nn.Unfold(kernel_size=2, stride=2)(maps.permute(0, 3, 1, 2)).transpose(1, 2)  # (B, H/2*W/2, 4C)
    theirs = columns @ weight.t()
    ours = reordered_merging(LazyTensor(tuple(weight.shape), weight.dtype, lambda: weight), "x").read()
    parts = [maps[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    official = torch.cat(parts, dim=-1).flatten(1, 2) @ ours.t()
    assert (official - theirs).abs().max() < 1e-5  # measured 4e-6; an unordered weight differs by 20
    assert (torch.cat(parts, dim=-1).flatten(1, 2) @ weight.t() - theirs).abs().max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("first", ["microsoft", "timm", "huggingface"])
@pytest.mark.parametrize("second", ["microsoft", "timm", "huggingface"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("num_classes", [7, 0])
def test_a_way_through_any_two_formats_returns_every_bit(tmp_path, first, second, suffix, num_classes):
    model = classifier(num_classes=num_classes)
    one = save_weights(model, tmp_path / f"one{suffix}", first)[0]
    other = SwinTransformerV2(**{**SMALL, "num_classes": num_classes})
    load_weights(other, one if one.is_file() else one.parent)
    two = save_weights(other, tmp_path / f"two{suffix}", second, weights=read_weights(one))[0]
    assert_same(state_of(model), dict(read_weights(two)))
    assert_same(state_of(model), dict(read_weights(two, second)))


@pytest.mark.parametrize("format", ["microsoft", "huggingface"])
def test_a_simmim_model_returns_every_bit(tmp_path, format):
    model, other = simmim(), SimMIM(SwinTransformerV2(**{**SMALL, "num_classes": 0}))
    path = tmp_path / "a.safetensors"
    save_weights(model, path, format)
    report = load_weights(other, path)
    assert_same(state_of(model), state_of(other))
    assert report.format == {"microsoft": "simmim", "huggingface": "huggingface"}[format]
    assert_same(state_of(model), dict(read_weights(path, format)))


def test_a_wrong_or_unknown_format_is_named_with_the_known_ones(tmp_path):
    save_weights(classifier(), tmp_path / "a.safetensors", "microsoft")
    for format in ("timm", "microsoft"):  # timm's older layout is the official one
        assert read_weights(tmp_path / "a.safetensors", format).format == format
    for format in ("huggingface", "mmpretrain", "simmim"):
        with pytest.raises(
            ConfigError,
            match=f"not of format={format} but of microsoft; the formats are microsoft, simmim, timm, huggingface, "
            r"mmpretrain, torchvision; the file's names begin with ",
        ):
            read_weights(tmp_path / "a.safetensors", format)
    with pytest.raises(ConfigError, match=r"format \(keras\) is unknown; the formats are: microsoft, "):
        read_weights(tmp_path / "a.safetensors", "keras")

    def refused(names, match):
        save_file({name: torch.zeros(2) for name in names}, tmp_path / "b.safetensors")
        with pytest.raises(ConfigError, match=match):
            read_weights(tmp_path / "b.safetensors")

    refused(
        ["conv1.weight", "bn1.weight"],
        "not the names of a Swin V2 model; the formats are .* begin with bn1.weight, conv1",
    )
    refused(["features.0.0.weight"], "not the names of a Swin V2 model")
    refused(["stages.0.blocks.0.attn.meta_mlp.fc1.weight"], "looks like timm's swin_transformer_v2_cr")
    refused(["layers.0.blocks.0.attn.relative_position_bias_table"], "weights of Swin V1")


def test_two_names_for_one_weight_and_two_namings_in_one_file_are_refused(tmp_path):
    state = state_of(classifier())
    name = "layers.0.blocks.0.attn.cpb_mlp.0.weight"
    save_file({**state, name.replace("cpb", "rpe"): state[name].clone()}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"cpb_mlp\.0\.weight and layers.*rpe_mlp\.0\.weight are the same weight"):
        read_weights(tmp_path / "a.safetensors")
    mixed = {
        **{name: value.contiguous() for name, value in mmpretrain(state).items()},
        "head.weight": torch.ones(7, 64),
    }
    save_file(mixed, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"names of mmpretrain and official ones \(head\.weight\)"):
        read_weights(tmp_path / "b.safetensors")


def test_queries_keys_and_values_that_only_add_up_are_refused(tmp_path):
    """Joined they would have the right shape, and every value would be in the wrong place."""
    path = save_weights(classifier(), tmp_path, "huggingface")[0]
    state = load_file(path)
    stem = "swinv2.encoder.layers.0.blocks.0.attention.self"
    state[f"{stem}.query.weight"], state[f"{stem}.value.weight"] = torch.zeros(10, 8), torch.zeros(6, 8)
    save_file(state, path)
    with pytest.raises(ConfigError, match=r"query\.weight \(10, 8\) .* do not belong together"):
        read_weights(path)


@pytest.mark.parametrize("kind", ["classifier", "simmim"])
def test_a_run_of_our_own_reads_by_its_directory_or_its_checkpoint(tmp_path, kind):
    """Its newest complete checkpoint, through the engine that wrote it."""
    from swinv2_train.checkpoint import COMPLETE
    from swinv2_train.engine.state.files import snapshot, tensor_specs
    from swinv2_train.engine.state.pieces import whole_pieces

    model = classifier() if kind == "classifier" else simmim()
    state = state_of(model)
    step = tmp_path / "checkpoints" / "step_00000007"
    (step / "engine").mkdir(parents=True)
    described = tensor_specs({name: (tuple(tensor.shape), tensor.dtype, False) for name, tensor in state.items()})
    world = ONE
    sums = snapshot(whole_pieces(state), described, {"engine": "local"}, world, None).write(step / "engine")
    files = {f"engine/{name}": {"bytes": sum.num_bytes, "crc32": "", "rank": 0} for name, sum in sums.items()}
    (step / COMPLETE).write_text(json.dumps({"step": 7, "world_size": 1, "files": files}))
    for path in (tmp_path, step):
        weights = read_weights(path)
        assert weights.format == "run"
        assert_same(state_of(model), dict(weights))
    target = classifier(num_classes=5)
    assert load_weights(target, tmp_path, head="fresh").format == "run"
    assert torch.equal(target.norm.bias, (model if kind == "classifier" else model.encoder).norm.bias)
    with pytest.raises(ConfigError, match="is a run directory of our own, not a file of format=timm"):
        read_weights(tmp_path, "timm")
    (step / COMPLETE).unlink()
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        read_weights(tmp_path)


def test_a_huggingface_directory_reads_whatever_its_name_and_its_folders(tmp_path):
    """A step in the name, or a folder called checkpoints, does not make a run of it."""
    model = classifier()
    save_weights(model, tmp_path / "step_00005000", "huggingface")
    save_weights(model, tmp_path / "other", "huggingface")
    (tmp_path / "other" / "checkpoints").mkdir()
    for name in ("step_00005000", "other"):
        weights = read_weights(tmp_path / name)
        assert weights.format == "huggingface"
        assert_same(state_of(model), dict(weights))
    (tmp_path / "step_00000007").mkdir()
    with pytest.raises(ConfigError, match="step_00000007 is a directory without weights: .* nor a complete checkpoint"):
        read_weights(tmp_path / "step_00000007")
