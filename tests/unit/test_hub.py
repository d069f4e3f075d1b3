"""A trained run pushed to a hub and pulled again by every command, against a server that speaks the hub's protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from swinv2_train import load
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config import Config
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED
from swinv2_train.config.saved import read_saved_config
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.weights import read_weights
from tests.support import commands
from tests.support.configs import composed
from tests.support.hub_server import TOKEN, serve_hub, use_hub
from tests.support.images import encoded
from tests.support.processes import finished, forked_command
from tests.support.small_run import SMALL, run_alone
from tests.support.weights_samples import assert_same

pytestmark = pytest.mark.slow

REPO = "me/small"


def composed_run(run_dir: Path, shards: tuple[str, str], *overrides: str) -> Config:
    given = ("train.max_steps=1", "task.num_classes=4", "task.init_from=null", *overrides)
    return composed(["experiment=cifar10_finetune", f"run_dir={run_dir}", *SMALL, *shards, *given])


@pytest.fixture(scope="module")
def run_dir(shards, tmp_path_factory) -> Path:
    """One step, and its evaluation."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert run_alone(composed_run(path, shards)) == EXIT_DONE
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as server:
        use_hub(monkeypatch, server, str(tmp_path / "home"))
        yield server


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return finished(forked_command(f"swinv2_train.{name}", *arguments, **pipes))


def pushed(run_dir: Path, out: Path, *more: str) -> dict[str, Any]:
    done = command("export", f"run_dir={run_dir}", "format=huggingface", f"out={out}", f"hub={REPO}", *more)
    assert done.returncode == EXIT_DONE, done.stderr
    line: dict[str, Any] = json.loads(done.stdout)
    return line


def test_what_is_pushed_is_what_is_pulled_and_scores_the_same(hub, run_dir, tmp_path):
    """Bit for bit; two ranks of a host fetch once; and the token is in nothing that was written."""
    line = pushed(run_dir, tmp_path / "out", "license=mit", "hub_private=true")
    there = dict(hub.files(REPO))
    for path in (tmp_path / "out").iterdir():
        assert there.pop(path.name) == path.read_bytes(), path.name
    assert list(there) == [".gitattributes"] and hub.repositories[REPO].private
    assert line["commit"] in hub.repositories[REPO].commits and line["hub"] == f"{hub.url}/{REPO}"
    assert line["address"] == f"hf://{REPO}@{line['commit']}"
    pulled, trained = read_weights(f"hf://{REPO}"), read_checkpoint_weights(find_checkpoint(run_dir))
    assert_same({name: trained[name] for name in trained}, {name: pulled[name] for name in pulled})

    shutil.rmtree(tmp_path / "home")
    hub.asked.clear()
    evaluation = commands.start(f"run_dir={run_dir}", f"weights=hf://{REPO}", module="swinv2_train.evaluate")
    code, output = commands.finish(evaluation)
    assert code == EXIT_DONE, output
    scores = json.loads(next(text for text in output.splitlines() if text.startswith("{")))
    assert scores["weights"] == f"hf://{REPO}@{line['commit']}/model.safetensors"
    own = json.loads(command("evaluate", f"run_dir={run_dir}").stdout)
    assert scores["val/loss"] == pytest.approx(own["val/loss"], rel=1e-6)
    gets = {path: count for path, count in hub.asked.items() if path.startswith("GET") and "resolve" in path}
    assert set(gets.values()) == {1}, gets
    written = [path for folder in ("out", "home") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    for path in (*written, *run_dir.rglob("*.*")):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_front_door_takes_an_address_and_says_which_commit_it_was(hub, run_dir, tmp_path):
    line = pushed(run_dir, tmp_path / "out")
    model = load(f"hf://{REPO}")
    assert model.weights == f"hf://{REPO}@{line['commit']}/model.safetensors"
    image = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(image))
    ours, runs = (each.predict(tmp_path / "images" / "a.png") for each in (model, load(run_dir)))
    assert ours.probabilities == pytest.approx(runs.probabilities, rel=1e-5)


def test_a_run_that_starts_again_takes_no_newer_weights(hub, run_dir, shards, tmp_path):
    """Killed before its first checkpoint, with the repository's branch moved in between."""
    first = pushed(run_dir, tmp_path / "out")["commit"]
    frozen = ("optim.lr=0", "optim.schedule.warmup_lr=0", "optim.schedule.min_lr=0")
    config = composed_run(tmp_path / "run", shards, f"task.init_from=hf://{REPO}", *frozen)
    pinned = f"hf://{REPO}@{first}/model.safetensors"
    assert run_alone(config) == EXIT_DONE
    assert read_saved_config(tmp_path / "run" / "config.yaml").task.init_from == pinned
    assert f"weights from {pinned}" in (tmp_path / "run" / "environment.json").read_text()
    old = hub.files(REPO)["model.safetensors"]
    hub.add(REPO, {"model.safetensors": old[:-64] + bytes(64)})
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run_alone(config) == EXIT_DONE
    assert read_saved_config(tmp_path / "run" / "config.yaml").task.init_from == pinned
    trained, source = (read_checkpoint_weights(find_checkpoint(path)) for path in (tmp_path / "run", run_dir))
    assert all(torch.equal(trained[name], source[name]) for name in source)
    config.run_dir = str(tmp_path / "other")
    assert run_alone(config) == EXIT_DONE
    assert read_saved_config(tmp_path / "other" / "config.yaml").task.init_from not in (pinned, f"hf://{REPO}")


def test_a_push_that_fails_keeps_what_was_written_and_says_how_it_is_sent(hub, run_dir, tmp_path):
    hub.faults["upload"] = 507
    out = tmp_path / "out"
    done = command("export", f"run_dir={run_dir}", "format=huggingface", f"out={out}", f"hub={REPO}")
    assert done.returncode == EXIT_FAILED and done.stdout == "", done.stderr
    assert f"hub ({REPO}): the hub fails (507)" in done.stderr and TOKEN not in done.stderr
    assert f"{out} is whole: `hf upload {REPO} {out}` sends it" in done.stderr
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip


def test_the_card_of_a_run_says_what_the_run_says(run_dir, tmp_path):
    done = command("export", f"run_dir={run_dir}", "format=huggingface", f"out={tmp_path / 'small'}")
    assert done.returncode == EXIT_DONE, done.stderr
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.license is None and "None is stated here" in card.text
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    logged = read_metrics(run_dir)[-1]
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert scores == {"Top-1": pytest.approx(logged["val/top1"], abs=1e-4), "Top-5": pytest.approx(100)}
    count = sum(tensor.numel() for tensor in read_checkpoint_weights(find_checkpoint(run_dir)).values())
    assert f"{count:,}" in card.text and "after step 1 and 8 images seen" in card.text
    assert "max_steps: 1" in card.text and "Trained on 1 ranks" in card.text


def test_a_directory_of_timm_is_built_by_timm_and_says_its_sizes(hub, run_dir, tmp_path):
    """What timm builds of it says what the run's model says; of its sizes none is that of a published model."""
    import timm

    out = tmp_path / "timm"
    done = command("export", f"run_dir={run_dir}", "format=timm", f"out={out}", f"hub={REPO}")
    assert done.returncode == EXIT_DONE, done.stderr
    theirs, ours = timm.create_model(f"local-dir:{out}", pretrained=True).eval(), load(run_dir).module
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images=images), rtol=0, atol=1e-5)
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (3, 16, 16) and data["mean"] == pytest.approx((0.4914, 0.4822, 0.4465))
    again = load(f"hf://{REPO}")
    assert (again.config.model.img_size, again.config.model.window_size) == ([16, 16], 2)
    assert ModelCard.load(out / "README.md").data.library_name == "timm"
