"""The export command: a run's float32 masters in everybody's format, and other people's weights in another's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swinv2_train import export
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config import ConfigError
from swinv2_train.config.arguments import last_of_each
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from swinv2_train.weights import load_weights
from swinv2_train.weights import read_weights as read_file
from tests.support.evaluation import CLASSES, CLASSIFY, MODEL, SIZE, make_model, save_model
from tests.support.processes import finished, forked_command
from tests.support.small_run import run_alone

pytestmark = pytest.mark.slow


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return finished(forked_command("swinv2_train.export", *arguments, **pipes))


@pytest.fixture
def run_dir(settings, tmp_path) -> Path:
    """A trained run of one step."""
    config = settings("train.max_steps=1")
    assert run_alone(config) == EXIT_DONE
    return tmp_path / "run"


@pytest.mark.parametrize("format", ["microsoft", "timm", "huggingface"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_runs_masters_arrive_bit_for_bit(format, suffix, run_dir, tmp_path):
    """What is exported is what was trained, in every format that we read back."""
    out = tmp_path / ("exported" if format == "huggingface" else f"exported.{suffix}")
    request = export.ExportRequest(format, out)
    files = export.export(export.compose_source([f"run_dir={run_dir}"], ())[0], request)
    assert all(path.is_file() for path in files)
    trained, exported = read_checkpoint_weights(find_checkpoint(run_dir)), read_file(out)
    assert exported.format == format and set(exported) == set(trained)
    for name, tensor in trained.items():
        assert torch.equal(exported[name], tensor), name


def test_the_command_says_in_one_line_what_it_wrote(run_dir, tmp_path):
    done = command(f"run_dir={run_dir}", "format=huggingface", f"out={tmp_path / 'hf'}")
    assert done.returncode == EXIT_DONE and done.stdout.count("\n") == 1, done.stderr
    line = json.loads(done.stdout)
    assert line["weights"].endswith("step_00000001") and line["format"] == "huggingface"
    assert sorted(Path(path).name for path in line["files"]) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip


def test_a_run_exported_to_huggingface_gives_transformers_our_logits_and_our_pixels(run_dir, tmp_path):
    """The whole chain: uint8 image -> their preprocessing -> their model, against ours."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    config = export.compose_source([f"run_dir={run_dir}"], ())[0]
    out = tmp_path / "hf"
    export.export(config, export.ExportRequest("huggingface", out))
    theirs = AutoModelForImageClassification.from_pretrained(out).eval()
    processor = AutoImageProcessor.from_pretrained(out, use_fast=False)
    ours = make_model()
    load_weights(ours, out)
    image = torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    pixels = processor(images=image, return_tensors="pt").pixel_values
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.data.mean, config.data.std))
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).logits, ours(pixels), rtol=0, atol=1e-5)


def test_a_pretraining_run_keeps_its_decoder_in_huggingface_and_is_refused_by_timm(settings, tmp_path):
    from transformers import Swinv2ForMaskedImageModeling

    config = settings("train.max_steps=1", task="simmim")
    assert run_alone(config) == EXIT_DONE
    export.export(config, export.ExportRequest("huggingface", tmp_path / "hf"))
    theirs = Swinv2ForMaskedImageModeling.from_pretrained(tmp_path / "hf")
    trained = read_checkpoint_weights(find_checkpoint(tmp_path / "run"))
    assert torch.equal(theirs.decoder[0].weight, trained["decoder.0.weight"])
    assert torch.equal(theirs.swinv2.embeddings.mask_token, trained["encoder.mask_token"])
    with pytest.raises(ConfigError, match="format=timm cannot hold a SimMIM model"):
        export.export(config, export.ExportRequest("timm", tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()


def test_other_peoples_weights_are_converted_without_a_run(tmp_path):
    """timm's file to Hugging Face, with the model section on the command line."""
    import timm

    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "num_classes": CLASSES}
    model = timm.models.swin_transformer_v2.SwinTransformerV2(img_size=SIZE, window_size=2, **sizes)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    done = command(
        f"weights={tmp_path / 'timm.pth'}", "format=huggingface", f"out={tmp_path / 'hf'}", *CLASSIFY, *MODEL
    )
    assert done.returncode == EXIT_DONE, done.stderr
    again = read_file(tmp_path / "hf")
    assert torch.equal(again["layers.1.blocks.0.attn.qkv.weight"], model.layers[1].blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=timm", "out=x.pth"], "run_dir has no value; set it on the command line: run_dir=DIR$"),
        (
            ["ema=true"],
            r"run_dir has .* run_dir=DIR; nor has format, out: format=micro.*onnx out=PATH$",
        ),
        (["weights=w"], r"format has .*; nor has out: out=PATH$"),
        (
            ["weights=w", "model.embed_dim=???"],
            r"model.embed_dim has .*; nor has format, out: format=m.* out=PATH$",
        ),
        (
            ["weights=w", "out=x.pth"],
            r"format has no value; set it on the command line: format=microsoft\|timm\|hugg",
        ),
        (["weights=w", "format=timm"], "out has no value; set it on the command line: out=PATH"),
        (["weights=w", "format=keras", "out=x"], r"format \(keras\) is not written; choose one of microsoft, timm"),
        (["weights=w", "checkpoint=c", "format=timm", "out=x"], "weights and checkpoint are both given"),
        (["run_dir=r", "weights_format=timm", "format=timm", "out=x"], "weights_format is of weights=PATH"),
        (["weights=w", "format=timm", "out={exists}"], r"out \(.*exists.pth\) exists; name a new file"),
        (["weights=nowhere.pth", "format=timm", "out=x.pth"], "nowhere.pth"),
        (["weights={exists}", "format=timm", "out=x.pth", "model.depths=[1,2]"], r"depths \(1, 1\); the model has"),
        (["weights={exists}", "format=timm", "out=x.pth", "model.dephts=[1,2]"], "did you mean model.depths"),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "exists.pth")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = () if any(argument.startswith(("run_dir", "ema")) for argument in arguments) else (*CLASSIFY, *MODEL)
    filled = [argument.format(exists=tmp_path / "exists.pth") for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["export", *last_of_each([*model, *filled])])
    with pytest.raises(SystemExit) as stopped:
        export.main()
    assert stopped.value.code == EXIT_USER_ERROR
    error = capsys.readouterr().err
    import re

    assert re.search(message, error) and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_cfg_prints_the_configuration_and_help_the_usage(tmp_path, monkeypatch, capsys):
    """As the train and evaluate commands do; nothing is written."""
    for argument, expected in (("--cfg", "embed_dim: 8"), ("--help", "format=huggingface out=DIR")):
        out = tmp_path / "x.pth"
        arguments = ["weights=w.pth", "format=timm", f"out={out}", *CLASSIFY, *MODEL, argument, "job"]
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        with pytest.raises(SystemExit) as stopped:
            export.main()
        assert stopped.value.code == EXIT_DONE and expected in capsys.readouterr().out and not out.exists()
