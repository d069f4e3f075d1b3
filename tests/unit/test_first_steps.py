"""The notebook of docs/: it runs as it stands there, in a kernel of its own, and is kept without what it printed."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first_steps.ipynb"


def test_the_notebook_is_kept_without_outputs_and_its_links_lead_somewhere():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.source
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert targets and all((NOTEBOOK.parent / target).is_file() for target in targets)


@pytest.mark.slow
def test_the_notebook_runs_and_its_model_has_learned(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = ["".join(out.get("text", "") + str(out.get("data", {}).get("text/plain", "")) for out in cell.outputs)
             for cell in cells]  # fmt: skip
    pictures = [any("image/png" in out.get("data", {}) for out in cell.outputs) for cell in cells]
    assert pictures == [True, True, False, False, True, False, False]
    steps = re.findall(r"step (\d+)/(\d+)  loss", shown[1])
    assert steps and steps[-1][0] == steps[-1][1], "the run speaks into the notebook, not to the kernel's terminal"
    assert "TrainedRun(run_dir=" in shown[2]
    assert int(re.search(r"(\d+)% of new pictures are right", shown[3])[1]) >= 75
    assert float(re.search(r"same answers: (\S+) apart", shown[6])[1]) < 1e-5
