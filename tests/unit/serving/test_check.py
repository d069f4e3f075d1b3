"""A file that says something else than the model is no file."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.config import ConfigError, MachineError
from swinv2_train.export import parse, run
from swinv2_train.serving import write
from swinv2_train.serving.check import Case, largest_difference
from tests.support.evaluation import CLASSIFY, MODEL, save_model


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_one_wrong_number_of_one_batch_is_found(wrong):
    cases = [Case(torch.zeros(count), torch.ones(count, 4)) for count in (1, 3)]
    assert largest_difference(lambda x: torch.ones(len(x), 4) + 5e-5, cases, "x") == pytest.approx(5e-5, abs=1e-6)

    def broken(images):
        found = torch.ones(len(images), 4)
        if len(images) == 3:
            found[-1, 2] += wrong
        return found

    with pytest.raises(MachineError, match=r"x differs from the model by .* for images \(3,\)"):
        largest_difference(broken, cases, "x")
    with pytest.raises(MachineError, match=r"x gives \(3, 1\) for images \(1,\), the model \(1, 4\)"):
        largest_difference(lambda images: torch.ones(3, 1), cases, "x")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """serve() of a small model whose tracing and writing cost nothing, and whose file computes `computes`."""
    save_model(tmp_path / "model.pth")

    def call(computes, *arguments):
        served = []
        monkeypatch.setattr(write, "traced", lambda each, *_: served.append(each))
        monkeypatch.setattr(write, "write_program", lambda program, path, description: path.write_bytes(b"program"))
        monkeypatch.setattr(write, "read_program", lambda path: lambda images: computes(served[0], images))
        config, request = parse(
            [f"weights={tmp_path / 'model.pth'}", "format=torch_export", f"out={tmp_path / 'out' / 'model.pt2'}",
             *CLASSIFY, *MODEL, *arguments]
        )  # fmt: skip
        with torch.no_grad():
            run(config, request)

    return call


def test_an_export_that_computes_something_else_leaves_no_file(command, tmp_path, capsys):
    with pytest.raises(MachineError, match="model.pt2 differs from the model by 0.01"):
        command(lambda served, images: served(images) + 0.01)
    assert list((tmp_path / "out").iterdir()) == []
    command(lambda served, images: served(images))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.pt2", "model.pt2.json"]
    assert '"largest_difference"' in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"out \(.*model.pt2\) exists; name a new file, or remove it"):
        command(lambda served, images: served(images))
