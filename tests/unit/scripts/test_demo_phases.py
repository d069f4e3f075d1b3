"""The demo's way from phase to phase, without data or training."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import demo, demo_length
from swinv2_train.config import ConfigError

pytestmark = pytest.mark.slow
LENGTH_FOR = demo.length_for


class Phases:
    """Records what the demo starts; every phase ends as it is told."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.codes: dict[str, int] = {}
        self.scores: dict[str, float] | None = {"val/top1": 50.0}

    def fetch(self, arguments: list[str]) -> int:
        self.calls.append(["fetch", *arguments])
        return self.codes.get("fetch", 0)

    def ranks(self, command: list[str]) -> int:
        self.calls.append(command)
        return self.codes.get(next(part for part in command if part.startswith("experiment=")), 0)

    def evaluate(self, run_dir: Path) -> dict[str, float] | None:
        self.calls.append(["evaluate", str(run_dir)])
        return self.scores

    def names(self) -> list[str]:
        return [next((part[11:] for part in call if part.startswith("experiment=")), call[0]) for call in self.calls]


@pytest.fixture
def phases(monkeypatch) -> Phases:
    recorded = Phases()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the demo sets it; this puts it back
    monkeypatch.setattr(demo, "precision_for", lambda run_dir: "fp32")
    monkeypatch.setattr(demo.fetch_cifar10, "run", recorded.fetch)
    monkeypatch.setattr(demo, "run_ranks", recorded.ranks)
    monkeypatch.setattr(demo, "length_for", lambda *arguments: (0, None))
    monkeypatch.setattr(demo, "evaluate", recorded.evaluate)
    monkeypatch.setattr(demo, "print_table", lambda *arguments: None)
    return recorded


def test_phases_come_in_order_and_the_second_starts_from_the_first(phases, tmp_path):
    """Fetch from data.source, pre-train, fine-tune from that run, evaluate that one."""
    assert demo.main(["--runs", str(tmp_path), "data.source=/mirror", "train.epochs=1", "task.mask_ratio=0.5"]) == 0
    assert phases.names() == ["fetch", "cifar10_simmim", "cifar10_finetune", "evaluate"]
    fetch, pretrain, finetune, evaluation = phases.calls
    assert fetch[-2:] == ["--source", "/mirror"]
    assert {f"run_dir={tmp_path}/pretrain", "train.epochs=1", "task.mask_ratio=0.5"} <= set(pretrain)
    assert {f"run_dir={tmp_path}/finetune", f"task.init_from={tmp_path}/pretrain", "train.epochs=1"} <= set(finetune)
    assert "task.mask_ratio=0.5" not in finetune and evaluation == ["evaluate", f"{tmp_path}/finetune"]


def test_images_come_from_their_own_source_unless_one_is_given(phases, tmp_path):
    demo.main(["--runs", str(tmp_path)])
    assert "--source" not in phases.calls[0]


def test_a_demo_that_goes_on_trains_as_long_as_it_was_begun(phases, tmp_path, monkeypatch):
    """Both phases, whatever there is time for now: other epochs would be another schedule from the middle on."""
    chosen = demo_length.LENGTHS[3]
    demo_length.keep(tmp_path, chosen)
    monkeypatch.setattr(demo, "length_for", LENGTH_FOR)
    assert demo.main(["--runs", str(tmp_path), "--minutes", "1000", "optim.lr=1.0e-3"]) == 0
    _, pretrain, finetune, _ = phases.calls
    assert chosen.overrides[0] in finetune and not {*chosen.overrides} & {*pretrain}
    assert "optim.lr=1.0e-3" in finetune and chosen.overrides[1] not in finetune  # the user's
    assert (pretrain[-1], finetune[-1]) == (f"train.epochs={chosen.pretrain:g}", f"train.epochs={chosen.finetune:g}")
    assert phases.names() == ["fetch", "cifar10_simmim", "cifar10_finetune", "evaluate"]  # and no step was timed


@pytest.mark.parametrize("code", [1, 2, 3])
@pytest.mark.parametrize(
    ("phase", "left_out"),
    [("fetch", 3), ("experiment=cifar10_simmim", 2), ("experiment=cifar10_finetune", 1)],
)
def test_a_phase_that_does_not_end_well_ends_the_demo_with_its_exit_code(phase, left_out, code, phases, tmp_path):
    """Fine-tuning from a pre-training that was stopped would be of no use and take minutes."""
    phases.codes[phase] = code
    assert demo.main(["--runs", str(tmp_path)]) == code
    assert len(phases.calls) == 4 - left_out


def test_an_evaluation_that_failed_is_no_success(phases, tmp_path):
    phases.scores = None
    assert demo.main(["--runs", str(tmp_path)]) == 1


def test_wrong_override_is_refused_before_anything_is_fetched(phases, tmp_path):
    """Not after 170 MB, and not in the second phase after the minutes of the first."""
    with pytest.raises(ConfigError, match="task.label_smoothing"):
        demo.main(["--runs", str(tmp_path), "task.label_smoothing=7"])
    assert phases.calls == []


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (3, 3), (130, 3), (143, 3), (137, 137)])
def test_a_signal_that_torchrun_has_passed_on_is_a_stop(code, expected, monkeypatch):
    """It has waited for the ranks, which save; a rank that was killed is none."""
    monkeypatch.setattr(demo, "torchrun", lambda arguments: code)
    assert demo.run_ranks(["-m", "x"]) == expected


def test_a_stop_is_said_and_ends_the_demo(phases, tmp_path, capsys):
    phases.codes["experiment=cifar10_simmim"] = 3
    assert demo.main(["--runs", str(tmp_path)]) == 3 and phases.names() == ["fetch", "cifar10_simmim"]
    assert "stopped; nothing is complete; `make demo` goes on from there" in capsys.readouterr().out
