"""The golden curves, exactly; and that they notice what they are there for."""

from __future__ import annotations

import json
import warnings

import pytest

from scripts import refresh_golden
from tests.support import curves

LOSSES = {"train/loss": [0.9, 0.8, 0.7], "train/grad_norm": [2.0, 1.0, 0.5], "val/loss": 0.6}
MACHINE = {"torch": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the runs, so that a curve finds the one it starts from."""
    return tmp_path_factory.mktemp("curves")


@pytest.mark.slow
@pytest.mark.parametrize("name", curves.CURVES)
def test_curve_is_the_golden_one(name, folder):
    """A change of numbers is never an accident: made on purpose, it comes with scripts/refresh_golden.py.

    Bit for bit on the kind of machine that made the file; on another one, which a warning names, within a tolerance.
    """
    golden, machine = curves.read_golden(name), curves.machine()
    others = [
        f"{key}: {machine[key]} here, {golden['machine'].get(key)} there"
        for key in machine
        if machine[key] != golden["machine"].get(key)
    ]
    if others:
        warnings.warn(
            f"golden curve {name} is of another machine, so not compared exactly: {'; '.join(others)}", stacklevel=1
        )
    values = curves.compute(folder, [name])[name]
    wrong = curves.differences(curves.CURVES[name], golden["values"], values, exact=not others)
    assert not wrong, "\n".join([*wrong, 'if on purpose: python scripts/refresh_golden.py --reason "..."'])


@pytest.mark.slow
def test_a_learning_rate_larger_by_a_ten_millionth_is_noticed(tmp_path):
    """Within a few steps, whose numbers do not depend on the run's length."""
    curve, golden = curves.CURVES["reference"], curves.read_golden("reference")
    keys, found = ("train/loss", "train/grad_norm"), []
    for number, lr in enumerate((2.0e-3, 2.0e-3 * (1 + 1e-7))):
        overrides = ("train.max_steps=8", f"optim.lr={lr!r}")
        values = curves.compute(tmp_path / str(number), ["reference"], overrides)["reference"]
        found.append({key: values[key] for key in keys})
    first = {key: golden["values"][key][:8] for key in keys}
    assert not curves.differences(curve, first, found[0], exact=golden["machine"] == curves.machine())
    assert curves.differences(curve, found[0], found[1], exact=True)


def test_every_curve_has_a_file_with_a_reason_and_no_file_is_left_over():
    files = {path.name for path in curves.FOLDER.glob("curve_*")}
    assert files == {curves.path_of(name).name for name in curves.CURVES}
    for name in curves.CURVES:
        golden = curves.read_golden(name)
        losses = golden["values"]["train/loss"]
        assert len(losses) == curves.STEPS and golden["machine"].keys() == curves.machine().keys()
        assert golden["history"][-1]["last_loss"] == losses[-1]
        assert all(len(entry["reason"].split()) >= refresh_golden.FEWEST_WORDS for entry in golden["history"])


def test_differences_are_named_with_their_step():
    curve = curves.Curve((), loss_tolerance=0.1)
    for exact in (True, False):
        assert curves.differences(curve, LOSSES, LOSSES, exact) == []
    near = LOSSES | {"train/loss": [0.9, 0.8, 0.7 * (1 + 1e-15)]}
    assert near != LOSSES and curves.differences(curve, LOSSES, near, exact=False) == []
    (line,) = curves.differences(curve, LOSSES, near, exact=True)
    assert line.startswith("train/loss: from step 3 on, 0.70000000") and line.endswith("instead of 0.7, worst 1.1e-15")
    (line,) = curves.differences(curve, LOSSES, LOSSES | {"val/loss": 0.7}, exact=False)
    assert line == "val/loss: 0.7 instead of 0.6, worst 1.7e-01"
    (line,) = curves.differences(curve, LOSSES, LOSSES | {"train/loss": [0.9, 0.8]}, exact=True)
    assert line == "train/loss: 2 steps instead of 3, worst inf"
    assert curves.differences(curve, LOSSES, {"train/loss": [0.9]}, exact=False)
    assert curves.differences(curve, LOSSES, LOSSES | {"train/loss": [0.9, float("nan"), 0.7]}, exact=False)


@pytest.mark.parametrize("reason", [(), ("--reason", ""), ("--reason", "new numbers")])
def test_refresh_without_a_reason_is_refused(reason, capsys):
    """Before anything is computed or written."""
    before = {path: path.read_bytes() for path in curves.FOLDER.rglob("*") if path.is_file()}
    assert refresh_golden.main([*reason, "reference"]) == 2
    assert "must say in 3 words or more why" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in curves.FOLDER.rglob("*") if path.is_file()}


def test_refresh_writes_what_changed_and_why(tmp_path):
    path = tmp_path / "curve_a.json"
    assert refresh_golden.refresh(path, MACHINE, LOSSES, "a first curve", "2026-01-01") == "a: last loss none to 0.7"
    assert refresh_golden.refresh(path, MACHINE, LOSSES, "nothing is new", "2026-01-02") is None
    values = LOSSES | {"train/loss": [0.9, 0.8, 0.71]}
    assert refresh_golden.refresh(path, MACHINE, values, "a better norm", "2026-01-03") == "a: last loss 0.7 to 0.71"
    assert json.loads(path.read_text()) == {
        "machine": MACHINE,
        "history": [
            {"date": "2026-01-01", "reason": "a first curve", "last_loss_before": None, "last_loss": 0.7},
            {"date": "2026-01-03", "reason": "a better norm", "last_loss_before": 0.7, "last_loss": 0.71},
        ],
        "values": values,
    }
    assert [each.name for each in tmp_path.iterdir()] == ["curve_a.json"], "and nothing half-written"
