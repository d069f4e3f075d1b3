"""The demo's length: chosen by what steps take on this machine, kept when it goes on, and never against the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import demo, demo_length
from scripts.demo_length import LENGTHS, Length, Timed, Work, choose, seconds
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED

WORK = Work(epoch_steps=195.0, eval_batches=39.0, eval_every_steps=391)


def test_the_seconds_are_those_of_all_that_runs():
    """By hand: 1 epoch and 4; evaluations after 391 steps, at the end, and by the command."""
    pretrain, finetune = Timed(0.5, 20.0), Timed(0.6, 30.0)
    wanted = 195 * 0.5 + 780 * 0.6 + 3 * 39 * 0.6 / 3 + 20 + 30 + 30
    assert seconds(LENGTHS[1], pretrain, finetune, WORK) == pytest.approx(wanted)


def test_the_best_length_that_fits_is_chosen():
    around = 20.0
    for length in LENGTHS:
        for step in (0.01, 0.1, 1.0):
            pretrain, finetune = Timed(step, around), Timed(1.2 * step, around)
            needed = seconds(length, pretrain, finetune, WORK)
            better = [each for each in LENGTHS if seconds(each, pretrain, finetune, WORK) <= needed]
            assert choose(needed, pretrain, finetune, WORK) is better[0]
    assert choose(1.0, Timed(60, 60), Timed(60, 60), WORK) is LENGTHS[-1]  # the shortest there is
    every = [seconds(each, Timed(1, 0), Timed(1.2, 0), WORK) for each in LENGTHS]
    assert every == sorted(every, reverse=True)


@pytest.fixture
def timing(monkeypatch, tmp_path: Path) -> list[list[str]]:
    """Ranks that take half a second a step, the first two longer, and say so as a run does."""
    calls: list[list[str]] = []

    def ranks(command: list[str]) -> int:
        calls.append(command)
        config = compose_overrides(command[2:])
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True)
        lines = [
            {"step": step, "images_seen": 256 * step, "perf/step_sec": 9.0 if step < 3 else 0.5}
            for step in range(1, config.train.max_steps + 1)
        ]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return EXIT_DONE

    class Shards:
        def __init__(self, shards: str) -> None:
            self.num_samples = 50_000 if "train" in shards else 10_000

    monkeypatch.setattr(demo, "run_ranks", ranks)
    monkeypatch.setattr(demo, "open_manifest", Shards)
    return calls


def lengths(runs: Path, minutes: float, overrides: list[str]) -> tuple[int, demo_length.Length | None]:
    commands = [
        [f"experiment=cifar10_{name}", f"run_dir={runs}/{folder}", *overrides]
        for name, folder in (("simmim", "pretrain"), ("finetune", "finetune"))
    ]
    return demo.length_for(runs, commands, [compose_overrides(each) for each in commands], 60 * minutes, overrides)


@pytest.mark.slow
def test_the_choice_is_said_and_kept_by_a_demo_that_goes_on(timing, tmp_path, capsys):
    """Half a second a step: 1 and 4 epochs are 488 s of steps and 20 s of evaluations, 3 and 6 are 878 s and 26 s."""
    assert lengths(tmp_path, 9, []) == (EXIT_DONE, LENGTHS[1])
    said = capsys.readouterr().out
    assert "a step takes 0.50 s and 0.50 s: epochs of pre-training 1, of fine-tuning 4 (top-1 63.2 %" in said
    assert len(timing) == 2 and not (tmp_path / "timed").exists()
    assert lengths(tmp_path, 60, []) == (EXIT_DONE, LENGTHS[1])  # and not what fits an hour
    assert len(timing) == 2 and "as it was begun: epochs of pre-training 1" in capsys.readouterr().out
    assert lengths(tmp_path / "other", 60, [])[1] is LENGTHS[0]
    assert "top-1 66.8 % when it was tried" in capsys.readouterr().out
    assert lengths(tmp_path / "third", 1, [])[1] is LENGTHS[-1]
    assert "which is the shortest there is" in capsys.readouterr().out


def test_a_choice_of_an_earlier_version_is_kept(tmp_path):
    """It wrote epochs alone, and had no overrides."""
    (tmp_path / "length.json").write_text('{"pretrain": 2, "finetune": 4}\n')
    kept = demo_length.kept(tmp_path)
    assert kept == Length(2, 4, None, ()) and "(not tried)" in kept.text()


def test_the_overrides_of_every_length_are_a_fine_tuning(tmp_path):
    for length in LENGTHS:
        compose_overrides(["experiment=cifar10_finetune", f"run_dir={tmp_path}", *length.overrides])


@pytest.mark.parametrize("override", ["train.epochs=1", "train.max_steps=40"])
def test_what_the_user_names_is_not_measured(override, timing, tmp_path):
    assert lengths(tmp_path, 15, [override]) == (EXIT_DONE, None) and timing == []


def test_runs_that_were_begun_without_a_choice_go_on_as_they_are(timing, tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "config.yaml").touch()
    assert lengths(tmp_path, 1, []) == (EXIT_DONE, None) and timing == []


def test_a_stop_while_steps_are_timed_is_a_stop_and_nothing_is_kept(timing, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_ranks", lambda command: EXIT_STOPPED)
    assert lengths(tmp_path, 15, []) == (EXIT_STOPPED, None)
    assert demo_length.kept(tmp_path) is None
